"""Methods that PEFT has too give its logits from the same numbers."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorafit.config import MethodConfig
from lorafit.export.merge import tolerance
from lorafit.methods import table
from lorafit.methods.ia3 import Rescaled
from lorafit.methods.prefix import PrefixPart
from lorafit.methods.virtual import VirtualEmbedding, lead_of
from tests import tiny

TOKENS = 5
IDS = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def ours(method: str) -> nn.Module:
    model = tiny.llama()
    table.attach(model, MethodConfig(method=method, virtual_tokens=TOKENS))
    generator = torch.Generator().manual_seed(7)
    for parameter in table.of(model).trainable(model).values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def our_logits(model: nn.Module) -> Tensor:
    lead = torch.tensor(lead_of(model), dtype=torch.int64).expand(len(IDS), -1)
    return model(input_ids=torch.cat([lead, IDS], dim=1), use_cache=False).logits[:, lead.shape[1] :]  # type: ignore[no-any-return]


def theirs(config: peft.PeftConfig) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny.llama(), config).eval()


@torch.no_grad()
def same(model: nn.Module, other: peft.PeftModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = other(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    mine = our_logits(model)
    assert float((found - mine).norm() / mine.norm()) <= tolerance(model)
    assert float((our_logits(tiny.llama()) - mine).norm() / mine.norm()) > 0.01


def test_ia3() -> None:
    model = ours("ia3")
    names = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    other = theirs(peft.IA3Config(task_type="CAUSAL_LM", **names))
    own = {name: module for name, module in model.named_modules() if isinstance(module, Rescaled)}
    assert len(own) == 6
    with torch.no_grad():
        for name, module in own.items():
            factor = other.base_model.model.get_submodule(name).ia3_l["default"]
            factor.copy_(module.factor.view_as(factor))
    same(model, other)


def test_prompt() -> None:
    model = ours("prompt")
    other = theirs(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    (embedding,) = [module for module in model.modules() if isinstance(module, VirtualEmbedding)]
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(embedding.rows)  # type: ignore[arg-type]
    same(model, other)


@pytest.mark.parametrize("variant", ["p-tuning-v2", "reparametrised"])
def test_prefix_once_its_keys_are_rotated(variant: str) -> None:
    model = tiny.llama()
    config = MethodConfig(method="prefix", virtual_tokens=TOKENS, variant=variant)
    table.attach(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in table.of(model).trainable(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    table.of(model).finish(model, config)
    parts = {name: module for name, module in model.named_modules() if isinstance(module, PrefixPart)}
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    with torch.no_grad():
        cosine, sine = model.model.rotary_emb(torch.zeros(1), torch.arange(TOKENS)[None])
        columns = []
        for layer in range(model.config.num_hidden_layers):
            keys, values = (parts[f"model.layers.{layer}.self_attn.{which}_proj"].values() for which in "kv")
            k = keys.view(1, TOKENS, heads, dim).transpose(1, 2)
            rotated = apply_rotary_pos_emb(k, k, cosine, sine)[1].transpose(1, 2).reshape(TOKENS, -1)
            columns += [rotated, values]
        other = theirs(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
        other.prompt_encoder["default"].embedding.weight.copy_(torch.cat(columns, dim=1))
    same(model, other)
