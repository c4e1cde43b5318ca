"""What PEFT loads of ours, and what we load of PEFT's, gives the same logits: one formula, summed in another order.

Held to `merge.tolerance`: both sides compute W x + scaling B A x in float32 and differ by rounding alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lorafit.config import LoRAConfig
from lorafit.export import peft
from lorafit.export.merge import tolerance
from lorafit.lora.inject import lora_layers, trainable_parameters
from lorafit.methods import lora

VOCABULARY = 50
IDS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))

# What PEFT says of its own accord. Anything else, missing adapter keys above all, fails the test.
EXPECTED_WARNINGS = [
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
    "fan_in_fan_out is set to",
    "`is_gradient_checkpointing` is deprecated",
]


@contextmanager
def peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(tied=True),
    "llama-untied": lambda: llama(tied=False),
    "gpt2": gpt2,
    "bert": bert,
}


def base(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def train(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """A few steps, large enough that a wrong scaling would show."""
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    for _ in range(4):
        logits = model(input_ids=IDS).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.double()


def check_same(expected: Tensor, got: Tensor, untuned: Tensor, limit: float) -> None:
    moved = (expected - untuned).norm() / untuned.norm()
    assert moved > 1e4 * limit, "the adapter does too little for the comparison to mean anything"
    assert (got - expected).norm() / expected.norm() <= limit


# --- ours, loaded by PEFT -------------------------------------------------------------------------------------------

OURS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "dora": {"variant": "dora"},
    "rslora": {"scaling_rule": "alpha/sqrt(r)"},
    "gaussian, last block": {"layers": "last:1", "init": "gaussian"},
    "one whole name": {"targets": ["re:.*1.*"]},
}
OURS_BY_MODEL: list[tuple[str, str, dict[str, Any]]] = [
    *[(model, case, settings) for model in ("llama", "gpt2", "bert") for case, settings in OURS.items()],
    (
        "llama",
        "patterns",
        {"rank_pattern": {"q_proj": 3, "*.1.mlp.*": 7}, "alpha_pattern": {"layers.0.mlp.up_proj": 9.5}},
    ),
    ("gpt2", "patterns", {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"h.0.mlp.c_fc": 9.5, "c_proj": 1}}),
    ("bert", "patterns", {"rank_pattern": {"query": 3}, "alpha_pattern": {"*.1.attention.self.key": 9.5}}),
    ("llama", "tied embeddings", {"targets": ["embed_tokens", "q_proj"]}),
    ("llama", "tied head", {"targets": ["lm_head", "q_proj"], "rank_pattern": {"lm_head": 5}}),
    ("gpt2", "tied embeddings", {"targets": ["wte", "c_attn"]}),
    ("bert", "tied embeddings", {"targets": ["word_embeddings", "query"]}),
    ("llama-untied", "embeddings", {"targets": ["embed_tokens", "q_proj"]}),
    ("llama-untied", "dora on embeddings", {"targets": ["embed_tokens", "lm_head"], "variant": "dora"}),
    ("gpt2", "position embeddings", {"targets": ["wpe", "c_attn"]}),
    ("bert", "embeddings", {"targets": ["token_type_embeddings", "position_embeddings"], "r": 2}),
]


@pytest.mark.parametrize(("name", "case", "settings"), OURS_BY_MODEL, ids=[f"{m}: {c}" for m, c, _ in OURS_BY_MODEL])
def test_peft_loads_what_we_save(name, case, settings, tmp_path):
    model = base(name)
    untuned = logits(model)
    config = LoRAConfig(**{"r": 4, "alpha": 10, "init": "kaiming", **settings})
    lora.attach(model, config)
    train(model, trainable_parameters(model))
    expected = logits(model)
    peft.save(model, tmp_path / "adapter", config, base="base", tokenizer=None)

    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["fan_in_fan_out"] == any(isinstance(layer.base, Conv1D) for layer in lora_layers(model).values())
    assert fields["task_type"] == (None if name == "bert" else "CAUSAL_LM")

    with peft_may_warn():
        theirs = PeftModel.from_pretrained(base(name), tmp_path / "adapter")

    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(lora_layers(model))
    check_same(expected, logits(theirs), untuned, tolerance(model))

    again = base(name)
    found = peft.load(again, tmp_path / "adapter")
    if case == "tied head":  # loaded, the embedding owns the factors: the same numbers, laid out the other way round
        check_same(expected, logits(again), untuned, tolerance(model))
    else:
        assert torch.equal(logits(again), expected)
    assert (found.r, found.alpha, found.variant) == (config.r, config.alpha, config.variant)
    assert found.scaling_rule == config.scaling_rule
    peft.save(again, tmp_path / "again", found, base="base", tokenizer=None)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


# --- PEFT's, loaded by us -------------------------------------------------------------------------------------------

THEIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "suffixes", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    ("llama", "all-linear", {"target_modules": "all-linear"}),
    ("llama", "regex", {"target_modules": r".*layers\.[02]\.(self_attn\.k_proj|mlp\.up_proj)"}),
    ("llama", "some blocks", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    (
        "llama",
        "one block by its list's name",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    ("llama", "excluded", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "v_proj"]}),
    ("llama", "excluded by regex", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    (
        "llama",
        "patterns",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5, r".*k_pr.*": 2},
            "alpha_pattern": {r"(.*\.0\.mlp\.)?up_proj": 1, "q_proj": 20},
            "use_rslora": True,
        },
    ),
    ("llama", "dora", {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1}),
    ("llama", "untouched ties", {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}),
    ("llama", "tied embeddings", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("llama-untied", "embeddings", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama-untied", "dora on embeddings", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    ("gpt2", "all-linear", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    ("gpt2", "dora", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    ("gpt2", "embeddings", {"target_modules": ["wpe", "c_attn"], "rank_pattern": {"wpe": 2}}),
    ("bert", "suffixes", {"target_modules": ["query", "value", "attention.output.dense"], "use_rslora": True}),
    ("bert", "dora", {"target_modules": ["query", "dense"], "use_dora": True}),
    ("bert", "patterns", {"target_modules": ["value", "key"], "rank_pattern": {"0.attention.self.value": 7}}),
    ("bert", "embeddings", {"target_modules": ["position_embeddings", "query"]}),
]


@pytest.mark.parametrize(("name", "case", "settings"), THEIRS, ids=[f"{m}: {c}" for m, c, _ in THEIRS])
def test_we_load_what_peft_saves(name, case, settings, tmp_path):
    untuned = logits(base(name))
    torch.manual_seed(3)
    with peft_may_warn():
        theirs = get_peft_model(base(name), LoraConfig(**{"r": 4, "lora_alpha": 10, **settings}))
        train(theirs, [p for p in theirs.parameters() if p.requires_grad])
        expected = logits(theirs)
        theirs.save_pretrained(tmp_path)

    ours = base(name)
    peft.load(ours, tmp_path)

    check_same(expected, logits(ours), untuned, tolerance(ours))


# --- convolutions ---------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Three convolutions that PEFT adapts as we do: stride, padding and a bias among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, (1, 2), bias=False)
        self.third = nn.Conv1d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu().flatten(2))


def convolutional(cls: type[Convolutional]) -> Convolutional:
    torch.manual_seed(0)
    return cls().eval()


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def draw_B(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.normal_(parameter, mean=float("magnitude" in name), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convolutions_agree_both_ways(variant, tmp_path):
    ours = convolutional(Convolutional)
    config = LoRAConfig(r=3, alpha=10, targets=["first", "second", "third"], variant=variant)
    lora.attach(ours, config)
    draw_B(ours)
    peft.save(ours, tmp_path / "ours", config, base="", tokenizer=None)
    theirs = PeftModel.from_pretrained(convolutional(Convolutional), tmp_path / "ours")
    with torch.no_grad():
        expected, untuned, got = ours(IMAGES), convolutional(Convolutional)(IMAGES), theirs(IMAGES)
    check_same(expected, got, untuned, tolerance(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    again = convolutional(Convolutional)
    peft.load(again, tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), expected)


UNLIKE_PEFT = {
    "dilation": ("first", lambda: nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2)),
    "padding mode": ("first", lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")),
    "groups": ("second", lambda: nn.Conv2d(8, 6, (1, 2), groups=2)),
}


@pytest.mark.parametrize("case", UNLIKE_PEFT)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_peft_refuses_a_convolution_that_it_would_compute_otherwise_and_we_load_it(case, variant, tmp_path):
    name, make = UNLIKE_PEFT[case]

    def model() -> Convolutional:
        whole = convolutional(Convolutional)
        setattr(whole, name, make())
        torch.manual_seed(5)
        for parameter in whole.parameters():
            nn.init.normal_(parameter)
        return whole.eval()

    ours = model()
    config = LoRAConfig(r=2, alpha=5, targets=["first", "second"], variant=variant)
    lora.attach(ours, config)
    draw_B(ours)
    peft.save(ours, tmp_path, config, base="", tokenizer=None)
    with pytest.raises(KeyError, match="LORAFIT_LORA"):
        PeftModel.from_pretrained(model(), tmp_path)
    again = model()
    peft.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), ours(IMAGES))
        assert not torch.allclose(again(IMAGES), model()(IMAGES))
