"""Templates in the manner of those in use, with what they write and what of it is learned.

Written for these tests: each has the trait that its family is known for, without the family's special cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lorafit.data.example import Chat, Message
from lorafit.data.mask import Marks, encode, encode_prompt
from lorafit.data.template import render
from lorafit.errors import DataError
from lorafit.model import light_tokenizer

Build = Callable[..., PreTrainedTokenizerFast]
LONG = 1 << 20


@dataclass(frozen=True)
class Family:
    """A template and the special tokens that it writes. eos ends a reply. bos: written by the template, or None."""

    template: str
    eos: str
    special: tuple[str, ...]
    bos: str | None = None


FAMILIES = {
    "llama 3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"), "<|begin_of_text|>",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        "</s>", ("[INST]", "[/INST]"), "<s>",
    ),
    "gemma": Family(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", ("<start_of_turn>", "<bos>"), "<bos>",
    ),
    "phi 3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "qwen 3": Family(  # reasoning is stripped from the history
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>", "<think>", "</think>"),
    ),
    "deepseek r1": Family(  # reasoning is always stripped, and the generation prompt begins it
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|end|>", ("<|User|>", "<|Assistant|>", "<|begin|>", "<think>", "</think>"), "<|begin|>",
    ),
    "gpt-oss": Family(  # channels; the last reply ends otherwise than those before it
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking and loop.last %}"
        "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
        "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
    "generation tags": Family(  # a note stands behind each reply; what is in front of it, the model has to write itself
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}({{ m.content | length }})"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>", "<think>", "</think>"),
    ),
    "tags without the end": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>",),
    ),
    "tools": Family(
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>", "<tool_call>", "</tool_call>"),
    ),
    "drops the system message": Family(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>",),
    ),
    "dated": Family(
        "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ("<|im_start|>",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(build: Build) -> dict[str, PreTrainedTokenizerFast]:
    made = {}
    for name, family in FAMILIES.items():
        tokenizer = build(family.template, bos=None, eos=None)
        tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, family.eos]})
        tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos
        made[name] = tokenizer
    return made


def say(*turns: str, system: str | None = None, tools: Any = (), **last: Any) -> Chat:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
    messages[-1] |= last
    return Chat(tuple(messages), "f:1", tools=tuple(tools))


def learned(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """For each row that the conversation becomes: all of its text, and what of it is learned."""
    rows = encode(chat, tokenizer, LONG)
    return [(tokenizer.decode(row.input_ids), tokenizer.decode(row.input_ids[row.supervised])) for row in rows]


THINK = "<think>\nhm\n</think>\n\none"
GOLDEN = [
    (
        "llama 3", say("b", "two", system="s"),
        [(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>",
            "two<|eot_id|>",
        )],
    ),
    (
        "mistral", say("a", "one", "b", "two"),
        [("<s>[INST] a [/INST] one</s>[INST] b [/INST] two</s>", " one</s> two</s>")],
    ),
    (
        "gemma", say("a", " one "),
        [(
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\none<end_of_turn>\n",
            "one<end_of_turn>",
        )],
    ),
    ("phi 3", say("a", "one"), [("<|user|>\na<|end|>\n<|assistant|>\none<|end|>\n", "one<|end|>")]),
    (
        "qwen 3", say("a", THINK, "b", "two"),
        [
            (f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{THINK}<|im_end|>\n", f"{THINK}<|im_end|>"),
            (
                "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
                "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
                "two<|im_end|>",
            ),
        ],
    ),
    (
        "generation tags", say("a", "one", "b", "two"),
        [(
            "<|im_start|>user\na<|im_end|><|im_start|>assistant\n<think></think>one<|im_end|>(3)"
            "<|im_start|>user\nb<|im_end|><|im_start|>assistant\n<think></think>two<|im_end|>(3)",
            "<think></think>one<|im_end|><think></think>two<|im_end|>",
        )],
    ),
    (
        "tags without the end", say("a", "one"),
        [(
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n", "one<|im_end|>",
        )],
    ),
    (
        "gpt-oss", say("a", "one", "b", "two", thinking="hm"),
        [
            (
                "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>one<|return|>",
                "<|channel|>final<|message|>one<|return|>",
            ),
            (
                "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>one<|end|>"
                "<|start|>user<|message|>b<|end|><|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
                "<|start|>assistant<|channel|>final<|message|>two<|return|>",
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>",
            ),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_without_transformers_the_same_is_written(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    theirs = tokenizers[name]
    theirs.save_pretrained(tmp_path)
    own: Any = light_tokenizer.of_directory(tmp_path)
    messages: list[Message] = [{"role": "user", "content": "Where\n is it?"}, {"role": "assistant", "content": "Here."}]
    for count, prompt in ((2, False), (1, True)):
        text = render(theirs, messages[:count], prompt)
        assert render(own, messages[:count], prompt) == text
        assert own(text).input_ids == theirs(text).input_ids
    assert Marks.of(own) == Marks.of(theirs)


@pytest.mark.parametrize(("name", "chat", "expected"), GOLDEN, ids=[name for name, _, _ in GOLDEN])
def test_a_family_writes_and_learns_just_this(
    name: str, chat: Chat, expected: list[tuple[str, str]], tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    assert expected == learned(chat, tokenizers[name])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_calls_are_learned_with_their_end_and_results_are_only_read(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    messages: tuple[Message, ...] = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2."},
    )
    ((text, own),) = learned(Chat(messages, "f:1", tools=(TOOL,)), tokenizers["tools"])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert own == f"{call}2.<|im_end|>"
    assert text.startswith('<|im_start|>system\nTools: [{"type": "function"')


@pytest.mark.parametrize(
    ("name", "chat", "said"),
    [
        ("gemma", say("a", "one", system="s"), "chat template refuses the conversation: System role not supported"),
        ("mistral", say("a", "one", system="s"), "refuses the conversation: no system"),
        ("drops the system message", say("a", "one", system="Be brief."), "leaves out messages[0], from 'system'"),
        ("deepseek r1", say("a", "one"), "does not start a reply as its generation prompt does"),
        ("deepseek r1", say("a", THINK), "does not start a reply as its generation prompt does"),
        ("llama 3", say("a", "one", tools=[TOOL]), "has no place for tools"),
        ("llama 3", say("a", "one", tool_calls=[CALL]), "does not write 'add'"),
        ("llama 3", say("a", "one", thinking="hm"), "has thinking, which the chat template does not write"),
        ("gpt-oss", say("a", "on<|return|>e"), "contains the token that ends a reply"),
    ],
)
def test_what_a_family_cannot_write_is_refused_with_the_reason(
    name: str, chat: Chat, said: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(DataError) as caught:
        learned(chat, tokenizers[name])
    assert said in str(caught.value)
    assert "f:1" in str(caught.value)


words = st.text(alphabet="abc \n<>|?.é", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(FAMILIES)), turns=st.lists(words, min_size=2, max_size=6), seed=st.none() | words)
def test_whatever_is_said_each_reply_follows_the_very_tokens_that_generation_starts_from(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, turns: list[str], seed: str | None
) -> None:
    """Or the conversation is refused: nothing is ever masked in the wrong place."""
    tokenizer, chat = tokenizers[name], say(*turns[: len(turns) // 2 * 2], system=seed)
    try:
        rows = encode(chat, tokenizer, LONG)
    except DataError:
        return
    replies = chat.learned()
    starts = [(row, start) for row in rows for start in _starts(row.supervised.tolist())]
    assert len(starts) == len(replies)
    for number, (row, start) in zip(replies, starts, strict=True):
        assert encode_prompt(chat.messages[:number], tokenizer) == row.input_ids[:start].tolist()
        end = next((k for k in range(start, len(row.input_ids)) if not row.supervised[k]), len(row.input_ids))
        own = tokenizer.decode(row.input_ids[start:end])
        assert own.endswith(str(tokenizer.eos_token)) or name == "gpt-oss"
        assert chat.messages[number]["content"].strip() in own


def _starts(mask: list[bool]) -> list[int]:
    return [k for k, own in enumerate(mask) if own and not mask[k - 1]]
