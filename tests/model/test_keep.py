"""A GGUF base that stays in its blocks, against the same model decoded."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lorafit.config import LoRAConfig, MergeConfig, TrainConfig
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine, plain, prepare
from lorafit.engine.kernels.products import has_low_rank
from lorafit.errors import ConfigError, ModelError, TargetError
from lorafit.methods import lora
from lorafit.model import gguf_tensors
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.model.keep import ENCODERS
from lorafit.opening import open_target
from lorafit.quant.modules import QuantizedEmbedding, QuantizedLinear
from lorafit.run import Start, train
from lorafit.ship import merge
from tests import tiny

TIED, APART = "qwen3", "llama"


def loaded(path: Path, dtype: torch.dtype, keep: bool) -> Any:
    return model_load.load(model_spec.read(str(path)), dtype, storage="keep" if keep else "auto")


def rows(vocab: int) -> list[Encoded]:
    random = np.random.default_rng(0)
    lengths = (9, 20, 5)
    return [Encoded(random.integers(0, vocab, n).astype(np.int32), np.arange(n) > 2, 0, f"f:{n}") for n in lengths]


def adapted(model: nn.Module) -> nn.Module:
    """With an update as if after some training."""
    lora.attach(model, LoRAConfig(r=3, alpha=7.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.METHOD.trainable(model).items():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_and_gradients(engine: Engine) -> dict[str, Tensor]:
    own = rows(100)
    (batch,) = micro_batches(own, range(len(own)), 1 << 20, engine.packing)
    loss = engine.loss(batch)
    loss.backward()
    parameters = lora.METHOD.trainable(engine.model)
    return {"loss": loss.detach()} | {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("name", [TIED, APART])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_every_matrix_stays_in_blocks_and_the_logits_are_bitwise_those_of_the_decoded_model(
    name: str, kind: str, gguf_of: Callable[..., Path]
) -> None:
    path = gguf_of(name, kind)
    whole, kept = loaded(path, torch.bfloat16, False), loaded(path, torch.bfloat16, True)
    assert not [m for m in kept.model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert kept.kept.ways[kind] == len(
        {m.stored.data.data_ptr() for m in kept.model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    )
    assert kept.kept.left == [] and f"matrices in {kind}" in kept.kept.describe()
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(whole.model(ids).logits, kept.model(ids).logits)


@pytest.mark.parametrize("name", [TIED, APART])
def test_the_engine_gives_the_bits_of_the_decoded_model_in_bf16(name: str, gguf_of: Callable[..., Path]) -> None:
    path = gguf_of(name, "Q4_1")
    engines = [prepare(adapted(loaded(path, torch.bfloat16, keep).model), share_prefix=True) for keep in (False, True)]
    assert [engine.dtype for engine in engines] == [torch.bfloat16] * 2
    assert [engine.ends_early for engine in engines] == [name == APART and has_low_rank()] * 2
    expected, got = map(loss_and_gradients, engines)
    assert expected.keys() == got.keys() and len(got) > 14
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_the_engine_agrees_with_plain_autograd_in_fp32(gguf_of: Callable[..., Path]) -> None:
    path = gguf_of(APART, "Q8_0")
    expected = loss_and_gradients(plain(adapted(loaded(path, torch.float32, False).model)))
    engine = prepare(adapted(loaded(path, torch.float32, True).model), share_prefix=True)
    got = loss_and_gradients(engine)
    for key, value in expected.items():
        assert float((got[key] - value).norm() / value.norm()) < 1e-5, key
    assert not engine.released
    engine.close()


def test_a_head_of_more_rows_than_are_decoded_together_gives_the_same_loss(
    gguf_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_of(TIED, "Q8_0")
    got = []
    for rows_at_once in (1 << 20, 33):
        monkeypatch.setattr("lorafit.engine.loss.DECODED", rows_at_once)
        got.append(loss_and_gradients(prepare(adapted(loaded(path, torch.float32, True).model), share_prefix=True)))
    for key, value in got[0].items():
        torch.testing.assert_close(got[1][key], value)


def test_an_embedding_that_scales_its_output_is_decoded_and_named(gguf_of: Callable[..., Path]) -> None:
    kept = loaded(gguf_of("gemma3", "Q8_0"), torch.float32, True)
    assert kept.kept.left == ["model.embed_tokens.weight"]
    assert "1 do not: model.embed_tokens.weight" in kept.kept.describe()
    whole = loaded(gguf_of("gemma3", "Q8_0"), torch.float32, False)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(whole.model(ids).logits, kept.model(ids).logits)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_hugging_face_model_is_quantized_while_it_is_read(storage: str, hf_of: Callable[..., Path]) -> None:
    path = hf_of(APART)
    tiny.tokenizer().save_pretrained(path)
    spec = model_spec.read(str(path))
    whole = model_load.load(spec, torch.float32).model
    kept = model_load.load(spec, torch.float32, storage=storage)
    linears = {n: m for n, m in whole.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    if storage == "nf4":  # whose blocks of 64 do not divide a width of 96
        narrow = [name for name in linears if name.endswith("down_proj")]
        assert kept.kept is not None and kept.kept.left == [f"{name}.weight" for name in narrow]
        assert f"{len(narrow)} do not: {narrow[0]}.weight" in kept.kept.describe()
        linears = {name: module for name, module in linears.items() if name not in narrow}
    assert kept.kept is not None and kept.kept.ways == {storage: len(linears)}
    assert type(kept.model.lm_head) is nn.Linear and type(kept.model.get_input_embeddings()) is nn.Embedding
    assert f"changes them by {np.mean(list(kept.kept.errors.values())):.1%} of their norm" in kept.kept.describe()
    for name, module in linears.items():
        expected = ENCODERS[storage](module.weight.detach())
        change = (expected.decode(torch.float32) - module.weight.detach()).norm() / module.weight.detach().norm()
        assert kept.kept.errors[f"{name}.weight"] == pytest.approx(float(change))
        module.weight.data = expected.decode(torch.float32)
        assert torch.equal(kept.model.get_submodule(name).weight, module.weight)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(whole(ids).logits, kept.model(ids).logits)


def test_a_quantized_model_trains_and_its_weights_are_fewer_bytes(hf_of: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny.write_chat(tmp_path / "rows.jsonl", 12)
    path = hf_of(APART)
    tiny.tokenizer().save_pretrained(path)
    settings = {"model": str(path), "data": str(data), "r": 3, "alpha": 7.0, "batch_size": 4, "threads": 1}
    found, said = trained({**settings, "output": str(tmp_path / "run"), "base_storage": "nf4"})
    assert "the base stays in fewer bits" in said and "matrices in nf4" in said
    first, *_, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert found["total_params"] == model_spec.read(str(path)).parameters
    assert last["loss"] < first["loss"]


def test_a_matrix_of_a_file_that_does_not_stay_in_blocks_is_named(
    gguf_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = gguf_of(APART, "Q8_0"), gguf_tensors.kept_blocks
    name = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(gguf_tensors, "kept_blocks", lambda header: {k: b for k, b in own(header).items() if k != name})
    kept = loaded(path, torch.bfloat16, True)
    assert kept.kept.left == [name] and f"1 do not: {name}" in kept.kept.describe()
    assert type(kept.model.get_submodule(name.removesuffix(".weight"))) is nn.Linear


def trained(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    config = TrainConfig(**settings)
    return train(config, {}, Start(resume, False, time.time()), Console(file=heard, width=2000)), heard.getvalue()


def test_a_run_on_blocks_says_so_and_learns_what_a_run_on_decoded_weights_learns(
    gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny.write_chat(tmp_path / "rows.jsonl", 12)
    path = gguf_of(APART, "Q4_0")
    settings = {"model": str(path), "data": str(data), "template": "chatml", "r": 3, "alpha": 7.0, "batch_size": 4}
    settings |= {"precision": "bf16", "threads": 1, "epochs": 2}
    whole, _ = trained({**settings, "output": str(tmp_path / "whole")})
    kept, said = trained({**settings, "output": str(tmp_path / "kept"), "base_storage": "keep"})
    assert "the base stays in fewer bits" in said
    assert kept["total_params"] == whole["total_params"]
    assert kept["train_loss"] == whole["train_loss"]
    adapters = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "kept")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_what_cannot_be_kept_is_refused(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no GGUF file, so it has no blocks to keep"):
        loaded(tiny.write_model(tmp_path / "model"), torch.float32, True)
    with pytest.raises(ModelError, match="holds no matrix in Q4_0"):
        loaded(gguf_of(APART, "F16"), torch.float32, True)
    with pytest.raises(ModelError, match="is read by transformers' own loader"):
        loaded(gguf_of("gpt2", "Q8_0"), torch.float32, True)
    with pytest.raises(ModelError, match="is a GGUF file, quantized already"):
        model_load.load(model_spec.read(str(gguf_of(APART, "Q8_0"))), torch.float32, storage="nf4")
    data = tiny.write_chat(tmp_path / "rows.jsonl", 4)
    settings = {"model": str(gguf_of(APART, "Q8_0")), "data": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(TargetError, match="cannot be trained in an embedding that stays in Q8_0"):
        trained({**settings, "template": "chatml", "base_storage": "keep", "add_tokens": ["<call>"]})
    with pytest.raises(ConfigError, match="--precision int8 copies every weight"):
        trained({**settings, "precision": "int8", "base_storage": "keep"})


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_run_on_a_quantized_base_is_opened_on_that_base(
    storage: str, hf_of: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny.write_chat(tmp_path / "rows.jsonl", 12)
    path = hf_of(APART)
    tiny.tokenizer().save_pretrained(path)
    settings = {"model": str(path), "data": str(data), "r": 3, "alpha": 7.0, "threads": 1, "precision": "fp32"}
    trained({**settings, "output": str(tmp_path / "run"), "base_storage": storage})
    heard = io.StringIO()
    console = Console(file=heard, width=2000)
    opened = open_target(str(tmp_path / "run"), None, 0.0, "auto", False, console)
    assert f"rounded to {storage} as in training" in heard.getvalue()
    expected = model_load.load(model_spec.read(str(path)), torch.float32, storage=storage).model
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(expected(ids).logits, opened.model(ids).logits)
    kept = open_target(str(tmp_path / "run"), None, 0.0, "auto", False, console, storage)
    assert f"weights kept as {storage}" in heard.getvalue()
    assert any(isinstance(module, QuantizedLinear) for module in kept.model.modules())
    assert torch.equal(expected(ids).logits, kept.model(ids).logits)
    other = "int8" if storage == "nf4" else "nf4"
    with pytest.raises(ConfigError, match=f"was trained on a base stored as {storage}"):
        open_target(str(tmp_path / "run"), None, 0.0, "auto", False, console, other)
    rounded = [merge(MergeConfig(run=str(tmp_path / "run"), output=str(tmp_path / into), into=into), console)
               for into in ("trained", "full")]  # fmt: skip
    assert rounded[0]["rounding_difference"] is None and rounded[1]["rounding_difference"] > 1e-4
    full = model_load.load(model_spec.read(str(path)), torch.float32).model
    merged = {
        into: model_load.load(model_spec.read(str(tmp_path / into)), torch.float32).model
        for into in ("trained", "full")
    }
    for name, module in full.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            update = merged["full"].get_submodule(name).weight - module.weight
            kept = expected.get_submodule(name).weight
            torch.testing.assert_close(
                merged["trained"].get_submodule(name).weight - kept, update, rtol=1e-3, atol=1e-6
            )
