"""What is written as GGUF, in the real llama.cpp: the log-probabilities of each next token are ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from torch import nn

from lorafit.config import LoRAConfig
from lorafit.export import gguf as export_gguf
from lorafit.export import gguf_limits
from lorafit.export.merge import merge_into_base
from lorafit.lora.inject import set_scale
from lorafit.methods import lora
from lorafit.methods.tokens import attach_tokens
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from tests.llama_cpp import LlamaCpp, ServerProcess, differences, log_probabilities, ours_with_bytes

FIRST, LAST = 4, 12
SCALES = (0.0, 0.5, 1.0, 1.5)
# llama.cpp multiplies in attention in float16 (11 bits): a rounding in each layer, of values no larger than what is
# read off at the end.
ROUNDING = 2**-11


def adapted(path: Path, size: float = 0.3, **more: Any) -> tuple[nn.Module, model_spec.ModelSpec]:
    spec = model_spec.read(str(path))
    model = model_load.load(spec, torch.float32).model
    settings = {"r": 3, "alpha": 7.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5.0}} | more
    lora.attach(model, LoRAConfig(**settings))
    randomize(model, size)
    return model, spec


def randomize(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.METHOD.trainable(model).items():
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if "lora_" in name else parameter + noise)


def some_ids() -> list[int]:
    return torch.randint(20, 250, (LAST + 1,), generator=torch.Generator().manual_seed(2)).tolist()


def assert_same(model: nn.Module, found: list[dict[int, float]], ids: list[int], layers: int) -> None:
    ours = log_probabilities(model, ids)
    assert float(differences(ours, found, FIRST).max()) < layers * ROUNDING * float(ours.abs().max())


def with_a_tokenizer(path: Path, gguf_of: Callable[..., Path]) -> Path:
    model_load.load_tokenizer(model_spec.read(str(gguf_of("llama", "F32")))).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["llama", "llama_rope3", "qwen2", "qwen3", "gemma3"])
def test_a_hugging_face_model_gives_our_numbers_there(
    name: str, hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    spec = model_spec.read(str(with_a_tokenizer(hf_of(name), gguf_of)))
    loaded = model_load.load(spec, torch.float32)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", "f32")
    ids = some_ids()
    assert_same(loaded.model, LlamaCpp(tmp_path / "out.gguf").next_tokens(ids, FIRST), ids, spec.layers)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_gives_our_numbers(name: str, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    base = gguf_of(name, "F32")
    model, spec = adapted(base)
    ids = some_ids()
    export_gguf.write_adapter(model, spec, tmp_path / "adapter.gguf")
    server = LlamaCpp(base, tmp_path / "adapter.gguf")
    seen = []
    for scale in SCALES:
        set_scale(model, scale)
        seen.append(log_probabilities(model, ids))
        assert_same(model, server.next_tokens(ids, FIRST, scale), ids, spec.layers)
    assert float((seen[0] - seen[2]).abs().max()) > 0.5  # the adapter does something
    set_scale(model, 1.0)
    merge_into_base(model, None)
    export_gguf.write_like(model.state_dict(), spec, tmp_path / "merged.gguf", "f32")
    assert_same(model, LlamaCpp(tmp_path / "merged.gguf").next_tokens(ids, FIRST), ids, spec.layers)


@pytest.mark.parametrize(
    "more",
    [
        {"variant": "dora"},
        {"targets": ["embed_tokens", "q_proj"]},
        {"targets": ["lm_head", "embed_tokens"]},
        {"scaling_rule": "alpha/sqrt(r)"},
    ],
    ids=["dora", "embedding", "both ends", "rslora"],
)
@pytest.mark.parametrize("name", ["llama", "llama_wide_heads"])  # tied, and not
def test_what_no_adapter_file_holds_is_right_when_merged(
    name: str, more: dict[str, Any], hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = with_a_tokenizer(hf_of(name), gguf_of)
    model, spec = adapted(path, 0.1, rank_pattern={}, alpha_pattern={}, **more)
    ids = some_ids()
    before = log_probabilities(model, ids)
    merge_into_base(model, None)
    tokenizer = model_load.load_tokenizer(spec)
    export_gguf.write_model(model, tokenizer, spec, tmp_path / "merged.gguf", "f32")
    found = LlamaCpp(tmp_path / "merged.gguf").next_tokens(ids, FIRST)
    assert float(differences(before, found, FIRST).max()) < spec.layers * ROUNDING * float(before.abs().max())


def test_tokens_of_ones_own_are_there(
    hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    spec = model_spec.read(str(with_a_tokenizer(hf_of("llama"), gguf_of)))
    loaded = model_load.load(spec, torch.float32)
    known = len(loaded.tokenizer)
    loaded.tokenizer.add_tokens(["<call>", "</call>"])
    loaded.model.resize_token_embeddings(known + 2, mean_resizing=False)
    attached = lora.attach(loaded.model, LoRAConfig(r=2, alpha=6.0))
    attach_tokens(loaded.model, [known, known + 1], [(70, 71), (80,)], attached)
    randomize(loaded.model, 0.2)
    ids = [known, *some_ids()[:6], known + 1, 40, known, 50]
    ours = log_probabilities(loaded.model, ids)
    merge_into_base(loaded.model, None)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", "f32")
    server = LlamaCpp(tmp_path / "out.gguf")
    found = server.next_tokens(ids, FIRST)
    assert float(differences(ours, found, FIRST).max()) < spec.layers * ROUNDING * float(ours.abs().max())
    with ServerProcess(tmp_path / "out.gguf") as process:
        cut = process.post("/tokenize", {"content": "a<call>b</call>", "parse_special": True})["tokens"]
    assert cut == loaded.tokenizer("a<call>b</call>").input_ids and {known, known + 1} < set(cut)


def test_the_head_alone_can_be_laid_over_where_it_is_no_embedding(
    hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = with_a_tokenizer(hf_of("llama_wide_heads"), gguf_of)
    plain = model_load.load(model_spec.read(str(path)), torch.float32)
    export_gguf.write_model(plain.model, plain.tokenizer, model_spec.read(str(path)), tmp_path / "base.gguf", "f32")
    model, spec = adapted(path, 0.2, targets=["lm_head", "v_proj"], rank_pattern={}, alpha_pattern={})
    ids = some_ids()
    assert export_gguf.write_adapter(model, spec, tmp_path / "adapter.gguf") == 3
    server = LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert_same(model, server.next_tokens(ids, FIRST, 1.0), ids, spec.layers)


def test_a_window_that_llama_cpp_has_not_becomes_the_context(
    hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Mistral with a window of 16: up to 16 tokens the numbers are ours, and llama.cpp takes no more."""
    path = with_a_tokenizer(hf_of("mistral_window"), gguf_of)
    spec = model_spec.read(str(path))
    loaded = model_load.load(spec, torch.float32)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", "f32")
    assert model_spec.read(str(tmp_path / "out.gguf")).max_positions == 16
    remark = gguf_limits.context_remark(loaded.model.config, "llama")
    assert remark is not None and "context of 16 instead of 256" in remark
    ids = torch.randint(20, 250, (41,), generator=torch.Generator().manual_seed(2)).tolist()
    server = LlamaCpp(tmp_path / "out.gguf")
    assert_same(loaded.model, server.next_tokens(ids[:16], FIRST), ids[:16], spec.layers)
    with ServerProcess(tmp_path / "out.gguf") as process, pytest.raises(HTTPError, match="400"):  # more it won't take
        process.post("/completion", {"prompt": ids, "n_predict": 1})


# --- SmolLM2 --------------------------------------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over the lazy dog. Dear Sir or"
LAYERS = 6
SHOWN = 8  # probabilities are compared after this many tokens, and after each more


@pytest.fixture(scope="module")
def smollm2() -> tuple[model_load.Loaded, model_spec.ModelSpec, list[int]]:
    spec = model_spec.read("smollm2-135m")
    loaded = model_load.load(spec, torch.float32)
    lora.attach(loaded.model, LoRAConfig(r=4, alpha=10.0))
    randomize(loaded.model, 0.02)
    return loaded, spec, loaded.tokenizer(TEXT).input_ids


def test_smollm2_and_an_adapter_over_its_own_file(
    smollm2: tuple[model_load.Loaded, model_spec.ModelSpec, list[int]], tmp_path: Path
) -> None:
    """llama.cpp rounds what it multiplies with blocks of Q4_1 to 8 bits; ours, rounded so, moves by as much."""
    loaded, spec, ids = smollm2
    export_gguf.write_adapter(loaded.model, spec, tmp_path / "adapter.gguf")
    server = LlamaCpp(spec.path, tmp_path / "adapter.gguf")
    seen = []
    for scale in SCALES:
        set_scale(loaded.model, scale)
        ours, rounded = log_probabilities(loaded.model, ids), ours_with_bytes(loaded.model, ids)
        assert_within(ours, rounded, server.next_tokens(ids, SHOWN, scale))
        seen.append(ours)
    set_scale(loaded.model, 1.0)
    assert float((seen[0] - seen[2]).abs().mean()) > 0.2  # the adapter does more than that rounding


@pytest.fixture(scope="module")
def merged_smollm2() -> tuple[Any, Any, model_spec.ModelSpec]:
    """Its first layers alone, with an adapter merged: each type is written in a second or two."""
    spec = model_spec.read("smollm2-135m")
    loaded = model_load.load(spec, torch.float32)
    loaded.model.model.layers = loaded.model.model.layers[:LAYERS]
    loaded.model.config.num_hidden_layers = LAYERS
    lora.attach(loaded.model, LoRAConfig(r=4, alpha=10.0))
    randomize(loaded.model, 0.05)
    merge_into_base(loaded.model, None)
    # As a Hugging Face model: what is written of a GGUF file takes over its header, with all its layers.
    return loaded.model, loaded.tokenizer, replace(spec, kind="hf", layers=LAYERS)


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0", "q4_k_m"])
def test_smollm2_merged(kind: str, merged_smollm2: tuple[Any, Any, model_spec.ModelSpec], tmp_path: Path) -> None:
    """The file as we read it back, which has the type's error, within llama.cpp's own rounding of activations."""
    model, tokenizer, spec = merged_smollm2
    ids = tokenizer(TEXT).input_ids
    export_gguf.write_model(model, tokenizer, spec, tmp_path / "merged.gguf", kind)
    found = LlamaCpp(tmp_path / "merged.gguf").next_tokens(ids, SHOWN)
    if kind == "f32":  # roundings of float16 in each layer, independent of each other
        ours = log_probabilities(model, ids)
        limit = spec.layers**0.5 * ROUNDING * float(ours.abs().max())
        assert float(differences(ours, found, SHOWN).max()) < limit
        return
    read = model_load.load(model_spec.read(str(tmp_path / "merged.gguf")), torch.float32).model
    assert_within(log_probabilities(read, ids), ours_with_bytes(read, ids), found)


def assert_within(ours: torch.Tensor, rounded: torch.Tensor, found: list[dict[int, float]]) -> None:
    """Two roundings of one kind, of which each may move a number either way: at most twice as far apart.

    rounded: ours, with activations in 8 bits.
    """
    told = [{token: float(rounded[SHOWN + n - 1, token]) for token in top} for n, top in enumerate(found)]
    moved = float(differences(ours, told, SHOWN).mean())
    assert float(differences(ours, found, SHOWN).mean()) < 2 * moved < 0.5
