from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from lorafit.data.example import Chat, Completion, Message
from lorafit.data.template import as_chat, render
from lorafit.errors import DataError

USER: Message = {"role": "user", "content": "Hello"}
REPLY: Message = {"role": "assistant", "content": "Hi"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}


def test_render_is_the_models_own_template(chatml: PreTrainedTokenizerFast) -> None:
    asked = "<|im_start|>user\nHello<|im_end|>\n"
    assert asked + "<|im_start|>assistant\n" == render(chatml, [USER], add_generation_prompt=True)
    assert asked + "<|im_start|>assistant\nHi<|im_end|>\n" == render(chatml, [USER, REPLY], add_generation_prompt=False)


@pytest.mark.parametrize("more", [{}, {"name": "n"}, {"reasoning": "hm"}])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_short_way_to_the_template_writes_what_transformers_writes(
    more: Message, prompt: bool, build: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = build(
        "{{ bos_token }}{% for m in messages %}{% set x = namespace(n=0) %}{{ m.role ~ m.content | trim ~ m.name }}"
        "{{ m.reasoning_content }}{{ m | tojson }}{{ loop.index }}{{ tools }}{{ documents }}{{ eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [SYSTEM, {**USER, "content": " <b>Ä\n"}, {**REPLY, **more}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert expected == render(tokenizer, messages, add_generation_prompt=prompt)


def test_conversations_without_a_template_are_refused(bare: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"f:3: the rows are conversations and this model has no chat template"):
        render(bare, [USER], add_generation_prompt=True, origin="f:3")


def test_what_the_template_says_is_passed_on_with_the_origin(llama2: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"f:3: the model's chat template refuses .*: System role not supported"):
        render(llama2, [SYSTEM, USER], add_generation_prompt=True, origin="f:3")


@pytest.mark.parametrize("template", ["{{ messages[0]['x']['y'] }}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{% if %}"])
def test_a_template_that_breaks_is_a_data_error(build: Callable[..., PreTrainedTokenizerFast], template: str) -> None:
    with pytest.raises(DataError, match="chat template refuses"):
        render(build(template), [USER], add_generation_prompt=True)


def test_prompt_and_completion_strings_become_what_a_chat_model_sees_in_use() -> None:
    asked, answered = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    assert Chat((asked, answered), "f:1", context=1) == as_chat(Completion("2+2=", "4", "f:1"))
