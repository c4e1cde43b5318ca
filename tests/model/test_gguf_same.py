"""Merging into a GGUF file's own types: what is not changed is the file's bytes, what is keeps its type."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

from lorafit import ship
from lorafit.config import LoRAConfig, MergeConfig
from lorafit.errors import ConfigError, MergeError
from lorafit.export import gguf_same, peft
from lorafit.export.merge import logits_moved, merge_into_base, probe_logits
from lorafit.lora.inject import adapter_parameters
from lorafit.lora.tokens import attach_rows, make_room
from lorafit.lora.whole import attach_whole
from lorafit.methods import lora
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.quant.codecs import CODECS
from lorafit.quant.recode import GRIDS
from tests import tiny
from tests.quant.random_blocks import random_blocks

TOUCHED = ("attn_q.weight", "ffn_down.weight")


def adapter_of(base: Path, directory: Path, size: float = 0.1, template: str | None = None, **more: Any) -> Path:
    """An adapter of a GGUF file. tokens: texts that are added. whole: modules that are replaced."""
    loaded = model_load.load(model_spec.read(str(base)), torch.float32)
    model: Any = loaded.model
    tokens, whole = more.pop("tokens", ()), more.pop("whole", None)
    config = LoRAConfig(r=3, alpha=7.0, targets=["q_proj", "down_proj"], **more)
    loaded.tokenizer.add_tokens(list(tokens))
    ids = loaded.tokenizer.convert_tokens_to_ids(list(tokens))
    if tokens:
        make_room(model, ids)
    lora.attach(model, config)
    if tokens:
        attach_rows(model, ids)
    if whole:
        attach_whole(model, whole)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    if template:
        loaded.tokenizer.chat_template = template
    peft.save(model, directory, config, base=str(base), tokenizer=loaded.tokenizer)
    return directory


def merged(run: Path, output: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=1000)
    result = ship.merge(MergeConfig(run=str(run), output=str(output), into="same", **settings), console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, Any]:
    own = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in own.items() if not name.startswith("GGUF.")}


def in_memory(base: Path, run: Path) -> nn.Module:
    model = model_load.load(model_spec.read(str(base)), torch.float32).model
    peft.load(model, run)
    merge_into_base(model, None)
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "Q4_1"), ("llama", "Q5_0"), ("qwen2", "Q8_0"), ("gemma3", "Q4_0"), ("qwen3", "BF16"), ("llama", "F32")],
)
def test_unchanged_tensors_are_the_files_own_bytes_and_changed_ones_keep_their_type(
    name: str, kind: str, gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = gguf_of(name, kind)
    run = adapter_of(base, tmp_path / "adapter")
    result, printed = merged(run, tmp_path / "out.gguf")
    before, after = tensors(base), tensors(tmp_path / "out.gguf")
    assert list(before) == list(after)
    changed = [n for n in before if not np.array_equal(before[n].data, after[n].data)]
    assert changed == [n for n in before if n.endswith(TOUCHED)]
    assert {n: t.tensor_type for n, t in before.items()} == {n: t.tensor_type for n, t in after.items()}
    assert fields(base) == fields(tmp_path / "out.gguf")
    assert (result["requantized"], result["copied"]) == (len(changed), len(before) - len(changed))
    assert f"{result['copied']} tensors are the file's own bytes" in printed
    model = in_memory(base, run)
    written = model_load.load(model_spec.read(str(tmp_path / "out.gguf")), torch.float32)
    moved = logits_moved(probe_logits(model, written.tokenizer), written.model, written.tokenizer)
    assert result["requantization_difference"] == pytest.approx(moved, rel=1e-3, abs=1e-6)
    assert moved < result["update_difference"]
    assert (moved > 1e-4) == (kind != "F32")


def test_the_loss_is_measured_after_rounding_too(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of(gguf_of("llama", "Q4_1"), tmp_path / "adapter")
    rows = tiny.write_chat(tmp_path / "rows.jsonl", 4)
    result, printed = merged(run, tmp_path / "out.gguf", data=str(rows))
    losses = result["losses"]
    assert losses["merged"] == pytest.approx(losses["trained"], rel=1e-4)
    assert abs(losses["written"] - losses["merged"]) > 1e-4
    assert f"{losses['written']:.4f} rounded again ({losses['written'] - losses['merged']:+.1e})" in printed


def test_rounding_that_outweighs_training_is_refused_unless_told(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of(gguf_of("llama", "Q4_0"), tmp_path / "adapter", size=1e-4)
    with pytest.raises(
        MergeError, match=r"rounding the merged weights again moves the logits by .* Nothing was written"
    ):
        merged(run, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    result, _ = merged(run, tmp_path / "out.gguf", force=True)
    assert result["requantization_difference"] > result["update_difference"]


def test_the_chat_template_of_training_is_written(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    base = gguf_of("llama", "Q8_0")
    merged(adapter_of(base, tmp_path / "adapter", template=tiny.CHATML), tmp_path / "out.gguf")
    said = {"tokenizer.chat_template": tiny.CHATML, "tokenizer.ggml.add_bos_token": False}  # the template writes none
    assert fields(tmp_path / "out.gguf") == {**fields(base), **said} != fields(base)


def test_added_tokens_come_along(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    base = gguf_of("llama", "Q8_0")
    run = adapter_of(base, tmp_path / "adapter", tokens=["<call>", "</call>"])
    merged(run, tmp_path / "out.gguf")
    before, after = tensors(base), tensors(tmp_path / "out.gguf")
    assert int(after["token_embd.weight"].shape[1]) == int(before["token_embd.weight"].shape[1]) + 2
    assert {n: t.tensor_type for n, t in before.items()} == {n: t.tensor_type for n, t in after.items()}
    kept = [n for n in before if not n.endswith((*TOUCHED, "token_embd.weight"))]
    assert all(np.array_equal(before[n].data, after[n].data) for n in kept)
    written = model_load.load(model_spec.read(str(tmp_path / "out.gguf")), torch.float32)
    ids = written.tokenizer("<call>the</call>").input_ids
    assert ids == AutoTokenizer.from_pretrained(run)("<call>the</call>").input_ids
    assert {ids[0], ids[-1]} == {int(before["token_embd.weight"].shape[1]) + more for more in (0, 1)}
    with torch.no_grad():
        expected = in_memory(base, run)(input_ids=torch.tensor([ids])).logits
        got = written.model(input_ids=torch.tensor([ids])).logits
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_a_head_that_was_tied_is_written_as_one_of_its_own(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    base = gguf_of("llama", "Q8_0")
    run = adapter_of(base, tmp_path / "adapter", whole=[["lm_head"]])
    merged(run, tmp_path / "out.gguf")
    before, after = tensors(base), tensors(tmp_path / "out.gguf")
    assert set(after) - set(before) == {"output.weight"}
    assert after["output.weight"].tensor_type == before["token_embd.weight"].tensor_type
    assert np.array_equal(before["token_embd.weight"].data, after["token_embd.weight"].data)
    written = model_load.load(model_spec.read(str(tmp_path / "out.gguf")), torch.float32)
    moved = logits_moved(probe_logits(in_memory(base, run), None), written.model, None)
    assert moved < 0.05


# --- types without a quantizer --------------------------------------------------------------------------------------


def file_of(kind: str, path: Path) -> tuple[model_spec.ModelSpec, Tensor]:
    """(a file with one matrix of a type, its numbers)."""
    blocks = random_blocks(kind, 16, 512, size=2e-4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_v.weight", blocks.data.numpy(), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = tiny.write_model(path.parent / f"model {kind}")
    return replace(model_spec.read(str(found)), path=path), blocks.decode(torch.float32)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_a_k_type_is_written_on_its_own_grid_as_far_as_that_reaches(kind: str, tmp_path: Path) -> None:
    spec, values = file_of(kind, tmp_path / "one.gguf")
    name, changed = "blk.0.attn_v.weight", {"model.layers.0.self_attn.v_proj.weight"}
    wanted = values + 1e-3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    tensors = gguf_same.AsInFile(spec, changed)
    data, own = tensors.form(name, wanted.numpy)
    assert (own, tensors.larger, tensors.requantized) == (kind, [], 1)
    codec = CODECS[kind]
    blocks = torch.from_numpy(data).view(-1, codec.nbytes)
    steps = GRIDS[kind].steps(blocks).abs().expand(-1, codec.numbers).reshape(values.shape)
    off = (codec.decode(blocks).view(values.shape) - wanted).abs()
    assert float((off > 1.01 * steps + 1e-6).float().mean()) < 0.1  # those at an end of their grid
    far, own = tensors.form(name, (values + 30.0).numpy)
    larger = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind]
    assert (own, tensors.larger) == (larger, [(name, kind, larger)])
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[larger]][1] * 16 * 16 == far.nbytes


def test_a_type_that_nothing_here_writes_becomes_the_next_larger_one() -> None:
    bits = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "Q4_0", "IQ4_NL": "Q4_1", "Q6_K": "Q8_0"}
    assert {kind: gguf_same.next_larger(kind, 512) for kind in bits} == bits
    assert gguf_same.next_larger("Q4_K", 33) == "F16"
    assert not any(gguf_same.has_quantizer(kind) for kind in bits)
    assert all(gguf_same.has_quantizer(kind) for kind in ("F32", "BF16", "Q8_0", "Q4_1"))


# --- refused --------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_sentences(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of(gguf_of("llama", "F32"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"--dtype bf16 is given with --into same"):
        merged(run, tmp_path / "out.gguf", dtype="bf16")
    with pytest.raises(ConfigError, match=r"Give a name that ends in \.gguf"):
        merged(run, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is a GGUF file\. It is for Hugging Face models"):
        merged(run, tmp_path / "out.gguf", stream=True)
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        merged(run, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
