"""What is written as GGUF, in the real llama.cpp: the log-probabilities of each next token are ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import xllamacpp
from torch import Tensor, nn

from lorafit.config import LoRAConfig
from lorafit.export import gguf as export_gguf
from lorafit.export.merge import merge_into_base
from lorafit.lora.inject import set_scale
from lorafit.methods import lora
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec

FIRST, LAST, BEST = 4, 12, 40
SCALES = (0.0, 0.5, 1.0, 1.5)
# llama.cpp multiplies in attention in float16 (11 bits): a rounding in each layer, of values no larger than what is
# read off at the end.
ROUNDING = 2**-11


def adapted(path: Path) -> tuple[nn.Module, model_spec.ModelSpec]:
    spec = model_spec.read(str(path))
    model = model_load.load(spec, torch.float32).model
    lora.attach(model, LoRAConfig(r=3, alpha=7.0, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 5.0}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.METHOD.trainable(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, spec


def by_llama_cpp(
    model: Path, adapter: Path | None, scales: Sequence[float], ids: list[int]
) -> list[list[dict[int, float]]]:
    """For each scale and each beginning of `ids`: the likeliest next tokens with their log-probabilities."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(model), 256, 1
    settings.warmup, settings.verbosity = False, -1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        laid = xllamacpp.CommonAdapterLoraInfo()
        laid.path, laid.scale = str(adapter), 1.0
        settings.lora_adapters = [laid]
    server = xllamacpp.Server(settings)
    # A token that is a character of its own is drawn, or nothing is told; the probabilities are those before that.
    letter = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].contents().index("a")
    asked: dict[str, Any] = {"n_predict": 1, "n_probs": BEST, "temperature": 0.0, "cache_prompt": False}
    asked["logit_bias"] = [[letter, 1000.0]]
    found = []
    for scale in scales:
        chosen = {"lora": [{"id": 0, "scale": scale}]} if adapter is not None else {}
        answers = [server.handle_completions({**asked, **chosen, "prompt": ids[:n]}) for n in range(FIRST, LAST)]
        plain = [answer if isinstance(answer, dict) else json.loads(answer) for answer in answers]
        tops = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in plain]
        found.append([{token["id"]: token["logprob"] for token in top} for top in tops])
    return found


@torch.no_grad()
def by_us(model: nn.Module, ids: list[int]) -> Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)


def differences(ours: Tensor, theirs: list[dict[int, float]]) -> Tensor:
    by_length = zip(range(FIRST, LAST), theirs, strict=True)
    return torch.stack([(ours[n - 1, token] - value).abs() for n, top in by_length for token, value in top.items()])


@pytest.mark.parametrize("name", ["llama", "llama_rope3", "qwen2", "qwen3", "gemma3"])
def test_a_hugging_face_model_gives_our_numbers_there(
    name: str, hf_of: Callable[[str], Path], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = hf_of(name)
    model_load.load_tokenizer(model_spec.read(str(gguf_of("llama", "F32")))).save_pretrained(path)
    spec = model_spec.read(str(path))
    loaded = model_load.load(spec, torch.float32)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", export_gguf.InOneType("f32"))
    ids = torch.randint(20, 250, (LAST,), generator=torch.Generator().manual_seed(2)).tolist()
    ours = by_us(loaded.model, ids)
    (found,) = by_llama_cpp(tmp_path / "out.gguf", None, [1.0], ids)
    assert float(differences(ours, found).max()) < spec.layers * ROUNDING * float(ours.abs().max())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_gives_our_numbers(name: str, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    base = gguf_of(name, "F32")
    model, spec = adapted(base)
    ids = torch.randint(20, 250, (LAST,), generator=torch.Generator().manual_seed(2)).tolist()
    export_gguf.write_adapter(model, spec, tmp_path / "adapter.gguf")
    theirs = by_llama_cpp(base, tmp_path / "adapter.gguf", SCALES, ids)
    seen = []
    for scale, found in zip(SCALES, theirs, strict=True):
        set_scale(model, scale)
        ours = by_us(model, ids)
        seen.append(ours)
        assert float(differences(ours, found).max()) < spec.layers * ROUNDING * float(ours.abs().max())
    assert float((seen[0] - seen[2]).abs().max()) > 0.5  # the adapter does something
    set_scale(model, 1.0)
    merge_into_base(model, None)
    export_gguf.write_like(model.state_dict(), spec, tmp_path / "merged.gguf", export_gguf.InOneType("f32"))
    (found,) = by_llama_cpp(tmp_path / "merged.gguf", None, [1.0], ids)
    assert float(differences(seen[2], found).max()) < spec.layers * ROUNDING * float(seen[2].abs().max())
