"""Merging tensor by tensor: the same bytes as in memory, whatever the model, the adapter and the files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorafit import ship
from lorafit.config import LoRAConfig, MergeConfig
from lorafit.errors import ConfigError, MergeError, ModelError, RunDirError
from lorafit.export import peft, shards, stream
from lorafit.lora.inject import adapter_parameters
from lorafit.lora.tokens import attach_rows, make_room
from lorafit.lora.whole import attach_whole
from lorafit.methods import lora
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def base(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
        return GPT2LMHeadModel(GPT2Config(vocab_size=258, bos_token_id=0, eos_token_id=1, **small)).eval()
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, model = kinds[name.split()[0]]
    return model(config(**SIZES, tie_word_embeddings="tied" in name)).eval()


def trained(model: nn.Module) -> None:
    """Every trained tensor is moved, so that nothing is left out unseen."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def made(
    directory: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "50KB", **settings: Any
) -> tuple[Path, Path]:
    """(a model in several files, an adapter of it). tokens, whole: what the adapter has besides."""
    tokens, whole = settings.pop("tokens", None), settings.pop("whole", None)
    model = base(name).to(dtype)
    model.save_pretrained(directory / "model", max_shard_size=shard)
    tiny.tokenizer().save_pretrained(directory / "model")
    config = LoRAConfig(**{"r": 3, "alpha": 7.0, "targets": "all-linear", **settings})
    if tokens:
        make_room(model, tokens)
    lora.attach(model, config)
    if tokens:
        attach_rows(model, tokens)
    if whole:
        attach_whole(model, whole)
    trained(model)
    peft.save(model, directory / "adapter", config, base=str(directory / "model"), tokenizer=None)
    return directory / "model", directory / "adapter"


def merged(run: Path, output: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=1000)
    result = ship.merge(MergeConfig(run=str(run), output=str(output), **settings), console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5.0}, "scaling_rule": "alpha/sqrt(r)"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama tied", PATTERNS),
    "llama, dora": ("llama", {"variant": "dora"}),
    "qwen2, biases": ("qwen2 tied", {"targets": ["q_proj", "down_proj"]}),
    "gpt2, Conv1D": ("gpt2", {}),
    "gpt2, dora": ("gpt2", {"variant": "dora", "targets": ["c_attn", "c_fc"]}),
    "a tied embedding": ("llama tied", {"targets": ["embed_tokens", "q_proj"]}),
    "a tied head": ("llama tied", {"targets": ["lm_head", "q_proj"]}),
    "both ends": ("llama", {"targets": ["embed_tokens", "lm_head"]}),
    "some layers": ("llama", {"layers": "last:1"}),
    "added tokens, tied": ("llama tied", {"tokens": [258, 260, 7]}),
    "added tokens": ("llama", {"tokens": [258, 260, 7]}),
    "a head of its own": ("llama", {"whole": [["lm_head"]], "targets": ["q_proj"]}),
    "a head that was tied": ("llama tied", {"whole": [["lm_head"]], "targets": ["q_proj"]}),
    "both ends, still tied": ("llama tied", {"whole": [["model.embed_tokens", "lm_head"]], "targets": ["q_proj"]}),
    "a norm and a linear layer": (
        "qwen2", {"whole": [["model.norm"], ["model.layers.0.self_attn.k_proj"]], "targets": ["q_proj"]},
    ),
}  # fmt: skip


# Each with one of the two: what they do to a tensor does not depend on which it is.
HOWS = ("fp32 to bf16", "bf16 to fp32, scale 0.5")
PAIRS = [(case, HOWS[number % 2]) for number, case in enumerate(CASES)] + [
    ("llama", HOWS[1]),
    ("added tokens", HOWS[1]),
]


@pytest.mark.parametrize(("case", "how"), PAIRS)
def test_the_tensors_are_bitwise_those_of_a_merge_in_memory(case: str, how: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    scaled = "scale" in how
    _, run = made(tmp_path, name, torch.bfloat16 if scaled else torch.float32, **settings)
    wanted = {"dtype": "fp32", "scale": 0.5} if scaled else {"dtype": "bf16"}
    merged(run, tmp_path / "memory", **wanted)
    result, _ = merged(run, tmp_path / "stream", stream=True, **wanted)
    a, b = tensors(tmp_path / "memory"), tensors(tmp_path / "stream")
    assert same(a, b)
    assert not same(a, {name: tensor.to(a[name].dtype) for name, tensor in tensors(tmp_path / "model").items()})
    assert result["way"] == "stream" and result["merged"] > 0
    assert 0 <= result["difference"] <= result["tolerance"]
    configs = [json.loads((tmp_path / way / "config.json").read_text()) for way in ("memory", "stream")]
    assert configs[0] == configs[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stream")
    ids = torch.arange(2, 22).view(2, 10)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")(input_ids=ids).logits
    assert torch.equal(plain(input_ids=ids).logits, expected)


def test_the_files_are_those_of_the_base_and_the_index_names_what_they_hold(tmp_path: Path) -> None:
    model, run = made(tmp_path, "llama")
    result, printed = merged(run, tmp_path / "out", stream=True)
    names = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(names) > 3 and result["files"] == len(names)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert places == json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert "tensor by tensor, as --stream says" in printed
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_experts_that_the_files_name_otherwise_are_cast_and_all_else_is_merged(tmp_path: Path) -> None:
    _, run = made(tmp_path, "mixtral")
    for dtype in ("bf16", "fp32"):
        merged(run, tmp_path / f"memory {dtype}", dtype=dtype)
        result, _ = merged(run, tmp_path / f"stream {dtype}", stream=True, dtype=dtype)
        assert any(".experts.1." in name for name in result["unused"])
        assert same(tensors(tmp_path / f"memory {dtype}"), tensors(tmp_path / f"stream {dtype}"))


def test_one_file_stays_one_file(tmp_path: Path) -> None:
    _, run = made(tmp_path, "llama tied", shard="1GB")
    merged(run, tmp_path / "memory")
    merged(run, tmp_path / "stream", stream=True)
    assert same(tensors(tmp_path / "memory"), tensors(tmp_path / "stream"))
    assert not list((tmp_path / "stream").glob("*.index.json"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_base_that_training_rounded_is_rounded_tensor_by_tensor(storage: str, tmp_path: Path) -> None:
    _, run = made(tmp_path, "llama tied", layers="last:1")
    rundir = tmp_path / "run"
    rundir.mkdir()
    run.rename(rundir / "adapter")
    (rundir / "run.toml").write_text("")
    (rundir / "run.json").write_text(json.dumps({"model": str(tmp_path / "model"), "base_storage": storage}))
    for into in ("trained", "full"):
        merged(rundir, tmp_path / into, into=into)
        merged(rundir, tmp_path / f"{into}, streamed", into=into, stream=True)
        assert same(tensors(tmp_path / into), tensors(tmp_path / f"{into}, streamed"))
    assert not same(tensors(tmp_path / "full"), tensors(tmp_path / "trained"))


def test_old_names_without_the_models_prefix_are_kept_and_unused_tensors_copied(tmp_path: Path) -> None:
    model, run = made(tmp_path, "gpt2", shard="1GB")
    file = model / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"].clone()  # tied, and in the file nevertheless
    save_file(old, file, metadata={"format": "pt"})
    result, printed = merged(run, tmp_path / "out", stream=True)
    merged(run, tmp_path / "memory")
    got, expected = tensors(tmp_path / "out"), tensors(tmp_path / "memory")
    assert result["unused"] == ["h.0.attn.masked_bias"] and len(result["left_out"]) == 1
    assert (
        "1 tensors that the model has not under their names are copied" in printed and "1 tensors left out" in printed
    )
    assert torch.equal(got.pop("h.0.attn.masked_bias"), old["h.0.attn.masked_bias"])
    kept = {name if name == "lm_head.weight" else f"transformer.{name}": tensor for name, tensor in got.items()}
    if "lm_head.weight" in kept:
        kept["transformer.wte.weight"] = kept.pop("lm_head.weight")
    assert same(kept, expected)


# --- interrupted ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a kill: nothing catches it."""


def stopping(after: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let writing stop before the file with this number. Returns how many were written since."""
    written = 0
    original = shards.write_file

    def counted(*arguments: Any) -> Any:
        nonlocal written
        if written == after:
            raise Stop
        written += 1
        return original(*arguments)

    monkeypatch.setattr(stream, "write_file", counted)
    return lambda: written


def test_an_interrupted_merge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made(tmp_path, "llama")
    whole, _ = merged(run, tmp_path / "whole", stream=True, dtype="bf16")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(3, patch)
        merged(run, tmp_path / "out", stream=True, dtype="bf16")
    work = tmp_path / ".out.merging"
    assert not (tmp_path / "out").exists() and len(list(work.glob("*.safetensors"))) == 3
    damaged = sorted(work.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (work / f"{damaged.name}.part").write_bytes(b"half")
    with monkeypatch.context() as patch:
        written = stopping(-1, patch)
        result, printed = merged(run, tmp_path / "out", stream=True, dtype="bf16")
    assert (result["resumed_files"], written()) == (2, whole["files"] - 2)
    assert f"2 of {whole['files']} files were finished earlier" in printed
    same_figures = ("difference", "worst", "weights_cast_difference", "merged", "tensors", "bytes")
    assert all(result[key] == pytest.approx(whole[key]) for key in same_figures)
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert not work.exists()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in (tmp_path / "whole").iterdir()
    )


def test_what_was_begun_with_other_settings_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made(tmp_path, "llama")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(3, patch)
        merged(run, tmp_path / "out", stream=True)
    result, _ = merged(run, tmp_path / "out", stream=True, scale=0.5)
    assert result["resumed_files"] == 0
    merged(run, tmp_path / "memory", scale=0.5)
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    _, run = made(tmp_path, "llama")
    with shards.in_progress(tmp_path / "out"), pytest.raises(RunDirError, match="is being written by another process"):
        merged(run, tmp_path / "out", stream=True)


# --- refused --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    model, run = made(tmp_path, "llama", shard="1GB")
    stored = load_file(model / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0] = 1e6
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite in float16 once merged"):
        merged(run, tmp_path / "out", stream=True, dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_layer_that_merging_changes_is_refused_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made(tmp_path, "llama")
    original = lora.inject.LoRALayer.merged_matrix
    monkeypatch.setattr(lora.inject.LoRALayer, "merged_matrix", lambda layer, W: 1.001 * original(layer, W))
    with pytest.raises(MergeError, match=r"the output of model\.layers\.0\.\S+ merged differs from that unmerged by"):
        merged(run, tmp_path / "out", stream=True)
    result, printed = merged(run, tmp_path / "out", stream=True, force=True)
    assert result["difference"] > result["tolerance"]
    assert "more than rounding explains, and was written since --force says so" in printed


def test_what_cannot_be_streamed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = made(tmp_path, "llama", shard="1GB")
    rows = tiny.write_chat(tmp_path / "rows.jsonl", 2)
    with monkeypatch.context() as small:
        small.setattr("lorafit.shipping.machine.available_bytes", lambda: 10_000)
        with pytest.raises(ConfigError, match=r"--data is given, and measuring a loss would take .* free"):
            merged(run, tmp_path / "out", stream=True, data=str(rows))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RunDirError, match=r"still to be written to .* where .* are free. Free some space"):
        merged(run, tmp_path / "out", stream=True)
    stored = load_file(model / "model.safetensors")
    stored["model.layers.0.mlp.up.weight"] = stored.pop("model.layers.0.mlp.up_proj.weight")
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"the adapter changes model\.layers\.0\.mlp\.up_proj\.weight, which the model's"
    ):
        merged(run, tmp_path / "out", stream=True)
    del stored["model.layers.0.mlp.up.weight"]
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"files lack 1 of its parameters: model\.layers\.0\.mlp\.up_proj"):
        merged(run, tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()


def test_the_loss_is_measured_before_and_after_where_the_model_fits(tmp_path: Path) -> None:
    _, run = made(tmp_path, "llama")
    rows = str(tiny.write_chat(tmp_path / "rows.jsonl", 6))
    whole, _ = merged(run, tmp_path / "memory", data=rows)
    result, printed = merged(run, tmp_path / "stream", stream=True, data=rows)
    assert result["losses"]["trained"] == whole["losses"]["trained"]
    # What is written is bitwise the same, so only how it was loaded differs: not at all.
    assert result["losses"]["merged"] == pytest.approx(whole["losses"]["merged"], rel=1e-6)
    assert f"loss on {rows}: {result['losses']['trained']:.4f} as trained" in printed


def test_too_little_memory_is_a_reason_to_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made(tmp_path, "llama")
    monkeypatch.setattr("lorafit.shipping.machine.available_bytes", lambda: 10_000)
    result, printed = merged(run, tmp_path / "out")
    assert result["way"] == "stream"
    assert "since merging it in memory would take" in printed
