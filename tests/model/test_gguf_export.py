"""GGUF files that are written, read back by the package gguf and by our own loader."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorafit.config import ExportConfig, LoRAConfig
from lorafit.data.template import read_template
from lorafit.errors import AdapterError, ConfigError, ModelError
from lorafit.export import gguf as export_gguf
from lorafit.export import peft
from lorafit.export.merge import merge_into_base
from lorafit.lora.inject import detach, lora_layers
from lorafit.lora.tokens import attach_rows
from lorafit.methods import lora
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.model.gguf_names import gguf_name, hf_name
from lorafit.model.gguf_tokenizer import SPACE
from lorafit.ship import export
from tests import tiny

SETTINGS: dict[str, Any] = {"r": 3, "alpha": 7.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5.0}}


def adapted(path: Path, **more: Any) -> tuple[nn.Module, model_spec.ModelSpec]:
    spec = model_spec.read(str(path))
    model = model_load.load(spec, torch.float32).model
    lora.attach(model, LoRAConfig(**{**SETTINGS, **more}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.METHOD.trainable(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, spec


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_names_come_back(name: str, gguf_of: Callable[..., Path]) -> None:
    read = gguf.GGUFReader(gguf_of(name, "F32"))
    for tensor in read.tensors:
        theirs = hf_name(name, tensor.name)
        assert theirs is not None and gguf_name(name, theirs) == tensor.name
    assert gguf_name(name, "model.layers.0.other.weight") is gguf_name(name, "other.weight") is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_an_adapter_holds_the_updates_in_the_order_of_the_file(
    name: str, gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The base in F32 with alpha / r B A added, tensor by tensor as llama.cpp does, is the merged model."""
    base = gguf_of(name, "F32")
    model, spec = adapted(base)
    count = export_gguf.write_adapter(model, spec, tmp_path / "adapter.gguf")
    written = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert written.fields["general.type"].contents() == "adapter"
    assert written.fields["adapter.type"].contents() == "lora"
    alpha = written.fields["adapter.lora.alpha"].contents()
    factors = {tensor.name: tensor.data for tensor in written.tensors}
    assert len(factors) == 2 * count == 2 * len(lora_layers(model))
    merge_into_base(model, None)
    merged = tmp_path / "merged.gguf"
    export_gguf.write_like(model.state_dict(), spec, merged, "f32")
    after = {tensor.name: tensor.data for tensor in gguf.GGUFReader(merged).tensors}
    for tensor in gguf.GGUFReader(base).tensors:
        expected = tensor.data.astype(np.float64)
        if f"{tensor.name}.lora_a" in factors:
            A, B = factors[f"{tensor.name}.lora_a"], factors[f"{tensor.name}.lora_b"]
            expected = expected + alpha / len(A) * (B.astype(np.float64) @ A)
        np.testing.assert_allclose(after[tensor.name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", export_gguf.TYPES)
def test_a_merged_model_is_read_back_within_its_type(kind: str, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    model, spec = adapted(gguf_of("llama", "F32"))
    merge_into_base(model, None)
    counts = export_gguf.write_like(model.state_dict(), spec, tmp_path / "merged.gguf", kind)
    assert set(counts) <= {"F32", kind.upper(), "Q8_0"} and sum(counts.values()) == len(
        gguf.GGUFReader(spec.path).tensors
    )
    loaded = model_load.load(model_spec.read(str(tmp_path / "merged.gguf")), torch.float32)
    worst = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}.get(kind)
    for name, value in loaded.model.state_dict().items():
        exact = model.state_dict()[name]
        if worst is not None:
            assert ((value - exact).abs() <= worst * exact.abs() + 2**-24).all(), name
        else:  # a block of 32 in q bits: half a step of its range, and the scale's own rounding
            bits = int(kind[1])
            blocks = (exact.numel() and exact.abs().max()) / (2 ** (bits - 1) - 1)
            assert float((value - exact).abs().max()) <= 1.1 * float(blocks) + 1e-6, name
    before = model_load.load(spec, torch.float32).tokenizer
    assert loaded.tokenizer("What is it?").input_ids == before("What is it?").input_ids
    assert loaded.tokenizer.chat_template == before.chat_template


FROM_HF = ["llama", "llama_untied_biased", "llama_wide_heads", "llama_rope3", "llama_linear", "qwen2", "qwen2_yarn",
           "qwen3", "gemma3"]  # fmt: skip


@pytest.mark.parametrize("name", FROM_HF)
def test_a_hugging_face_model_is_read_back_the_same(name: str, hf_of: Callable[[str], Path], tmp_path: Path) -> None:
    path = hf_of(name)
    tiny.tokenizer().save_pretrained(path)
    spec = model_spec.read(str(path))
    theirs = model_load.load(spec, torch.float32)
    export_gguf.write_model(theirs.model, theirs.tokenizer, spec, tmp_path / "out.gguf", "f32")
    ours = model_load.load(model_spec.read(str(tmp_path / "out.gguf")), torch.float32)
    ids = torch.arange(2, 42).view(2, 20)
    torch.testing.assert_close(ours.model(ids).logits, theirs.model(ids).logits, rtol=1e-5, atol=1e-5)
    for text in ("What is 3 + 4?", "<|im_start|>user\nhé 図書館<|im_end|>"):
        assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.eos_token == theirs.tokenizer.eos_token


def test_a_tokenizer_with_byte_fallback_comes_back(hf_of: Callable[[str], Path], tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "h", "e", "l", "o"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (SPACE, "hello"), (SPACE, "h")]
    pieces += [left + right for left, right in merges]
    backend = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    path = hf_of("llama")
    theirs.save_pretrained(path)
    spec = model_spec.read(str(path))
    model = model_load.load(spec, torch.float32).model
    model.resize_token_embeddings(len(pieces) + 3, mean_resizing=False)
    export_gguf.write_model(model, theirs, spec, tmp_path / "out.gguf", "f32")
    ours = model_load.load(model_spec.read(str(tmp_path / "out.gguf")), torch.float32).tokenizer
    for text in ("hello hello", "hell, ho ", "  héllo\n", "</s>hello"):
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ours("hello héllo", add_special_tokens=False).input_ids) == "hello héllo"


def test_what_such_a_file_cannot_hold_is_refused(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    model, spec = adapted(gguf_of("llama", "F32"), variant="dora")
    with pytest.raises(AdapterError, match="is of variant dora"):
        export_gguf.write_adapter(model, spec, tmp_path / "adapter.gguf")
    with_rows, spec = adapted(gguf_of("llama", "F32"))
    attach_rows(with_rows, [3, 4])
    with pytest.raises(AdapterError, match="trained rows of single tokens"):
        export_gguf.write_adapter(with_rows, spec, tmp_path / "adapter.gguf")
    plain, _ = adapted(tiny.write_model(tmp_path / "model"))
    peft.save(plain, tmp_path / "adapter", LoRAConfig(**SETTINGS), base=str(tmp_path / "model"), tokenizer=None)
    settings = {"run": str(tmp_path / "adapter"), "output": str(tmp_path / "out.gguf"), "format": "gguf-lora"}
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="--scale is given with --format gguf-lora"):
        export(ExportConfig(**settings, scale=0.5), console)
    with pytest.raises(ConfigError, match="exists already"):
        export(ExportConfig(**settings | {"output": str(tmp_path)}), console)
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"a way to cut texts \(Whitespace\) that is not written"):
        detach(plain)
        hf = model_spec.read(str(tmp_path / "model"))
        export_gguf.write_model(plain, tokenizer, hf, tmp_path / "merged.gguf", "f32")
    found = export(ExportConfig(**settings), console)
    assert found["layers"] == 14 and (tmp_path / "out.gguf").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("template", ["alpaca", None])
def test_an_adapter_for_another_chat_template_than_its_bases_is_said_to_be(
    template: str | None, gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = gguf_of("llama", "F32")
    model, spec = adapted(base)
    tokenizer = model_load.load_tokenizer(spec)
    if template:
        tokenizer.chat_template = read_template(template)
    peft.save(model, tmp_path / "adapter", LoRAConfig(**SETTINGS), base=str(base), tokenizer=tokenizer)
    heard = io.StringIO()
    settings = {"run": str(tmp_path / "adapter"), "output": str(tmp_path / "out.gguf"), "format": "gguf-lora"}
    export(ExportConfig(**settings), Console(file=heard, width=2000))
    assert ("--chat-template-file" in heard.getvalue()) == (template is not None)
