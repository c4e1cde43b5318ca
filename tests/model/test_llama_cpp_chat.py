"""The token ids that llama.cpp makes of a conversation are those that training made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.data.mask import encode_prompt
from lorafit.data.template import built_in, read_template
from lorafit.export import gguf as export_gguf
from lorafit.export.gguf_chat import chat_remarks
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from tests.data.test_families import FAMILIES, Family
from tests.llama_cpp import ServerProcess

OWN = {name: Family(read_template(name), "<|im_end|>", ("<|im_start|>",)) for name in built_in()}
TALKS = [
    [("user", "hello the 12 wo")],
    [("system", "Be brief.\nBe kind."), ("user", "  hello ")],
    [("user", "hé 図書館"), ("assistant", "the"), ("user", "and <b>?")],
    [("system", "hello"), ("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
]


def written(family: Family, hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], path: Path) -> Any:
    """A tiny model with a template and its special tokens, as a GGUF file. Returns its tokenizer."""
    directory = hf_of("llama")
    tokenizer = model_load.load_tokenizer(model_spec.read(str(gguf_of("llama", "F32"))))
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, family.eos]})
    tokenizer.eos_token, tokenizer.chat_template = family.eos, family.template
    if family.bos:
        tokenizer.add_special_tokens({"bos_token": family.bos})
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(directory)
    spec = model_spec.read(str(directory))
    model = model_load.load(spec, torch.float32).model
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    export_gguf.write_model(model, tokenizer, spec, path, "f32")
    return tokenizer


def chat_ids(model: Path, messages: list[dict[str, str]]) -> list[int]:
    with ServerProcess(model) as server:
        return server.chat_ids(messages)


WITHOUT_SYSTEM = ("mistral", "gemma", "drops the system message")


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_a_conversation_has_the_ids_of_training(
    name: str, hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = written((FAMILIES | OWN)[name], hf_of, gguf_of, tmp_path / "out.gguf")
    with ServerProcess(tmp_path / "out.gguf") as server:
        for talk in TALKS:
            messages = [{"role": role, "content": content} for role, content in talk]
            if name in WITHOUT_SYSTEM and talk[0][0] == "system":
                continue
            expected = encode_prompt(messages, tokenizer)
            assert server.chat_ids(messages) == expected, talk
            if name != "gpt-oss":  # a random model's reply is in none of its channels, which the server finds an error
                assert server.chat_count(messages) == len(expected)


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_system_message_without_a_place_goes_into_the_question_there_and_export_says_so(
    name: str, hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = written(FAMILIES[name], hf_of, gguf_of, tmp_path / "out.gguf")
    joined = [{"role": "user", "content": "Be brief.\nhello"}]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert chat_ids(tmp_path / "out.gguf", asked) == encode_prompt(joined, tokenizer)
    (remark,) = chat_remarks(tokenizer)
    assert "llama.cpp puts one into the first question" in remark
    assert chat_remarks(model_load.load_tokenizer(model_spec.read("smollm2-135m"))) == []


def test_smollm2s_conversations_have_the_ids_of_training() -> None:
    """In its own file: what an export of it takes over."""
    spec = model_spec.read("smollm2-135m")
    tokenizer = model_load.load_tokenizer(spec)
    with ServerProcess(spec.path) as server:
        for talk in TALKS:
            messages = [{"role": role, "content": content} for role, content in talk]
            expected = encode_prompt(messages, tokenizer)
            assert server.chat_ids(messages) == expected
        assert server.chat_count(messages) == len(expected)


def test_the_template_of_the_training_goes_into_the_file(
    gguf_of: Callable[..., Path], hf_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run with --template, on a GGUF file with a template of its own."""
    spec = model_spec.read(str(gguf_of("llama", "F32")))
    loaded = model_load.load(spec, torch.float32)
    loaded.tokenizer.chat_template = read_template("alpaca")
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", "f32")
    messages = [{"role": "user", "content": "hello"}]
    assert "### Instruction" in loaded.tokenizer.decode(encode_prompt(messages, loaded.tokenizer))
    assert chat_ids(tmp_path / "out.gguf", messages) == encode_prompt(messages, loaded.tokenizer)


def test_a_tokenizers_bos_that_the_template_does_not_write_is_left_out_there(
    hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    chatml = FAMILIES["qwen 3"]
    family = Family(chatml.template, chatml.eos, chatml.special, "<s>")
    tokenizer = written(family, hf_of, gguf_of, tmp_path / "out.gguf")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    messages = [{"role": "user", "content": "hello"}]
    assert chat_ids(tmp_path / "out.gguf", messages) == encode_prompt(messages, tokenizer)
    assert any("text without a conversation" in remark for remark in chat_remarks(tokenizer))
