"""Operations from shapes, against torch's own counter on real models run by plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from lorafit.config import METHOD_VARIANTS, LoRAConfig, MethodConfig
from lorafit.data.pack import micro_batches
from lorafit.engine.engine import prepare
from lorafit.engine.kernels.products import has_low_rank
from lorafit.engine.tally import TALLY
from lorafit.errors import ModelError
from lorafit.methods import lora, table
from lorafit.methods.virtual import lead_of
from lorafit.model import spec as model_spec
from lorafit.model.spec import ModelSpec
from lorafit.plan.flops import block_groups, causal_pairs, head_flop, padded_pairs
from lorafit.plan.steps import Amount, step
from lorafit.train.calibrate import random_rows

ROWS, LENGTH, R = 3, 11, 5
LLAMA: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
WIDE = {**LLAMA, "hidden_size": 64, "head_dim": 16}  # as attention row by row takes them
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager")),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, attn_implementation="eager")),
    "llama of wide heads": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, attn_implementation="eager")),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=10, attn_implementation="eager")),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=24, n_layer=3, n_head=4, n_positions=32, attn_implementation="eager")
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT, attn_implementation="eager")),
}


def built(name: str, directory: Path) -> tuple[Any, ModelSpec]:
    model = MODELS[name]().eval()
    model.save_pretrained(directory)
    return model, model_spec.read(str(directory))


def counted(model: Any) -> int:
    """Of a forward and a backward pass over rows of one length, with all logits."""
    ids = torch.randint(0, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor(lead_of(model), dtype=torch.int64).expand(ROWS, -1), ids], dim=1)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids).logits.float().square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_lora_has_just_the_operations_that_torch_counts(name: str, tmp_path: Path) -> None:
    model, spec = built(name, tmp_path)
    lora.attach(
        model, LoRAConfig(r=R, alpha=7.0, targets=["re:.*(layers?|h)\\.\\d+\\..*"] if name == "bert" else "all-linear")
    )
    tokens, pairs = ROWS * LENGTH, padded_pairs([LENGTH] * ROWS)
    assert step(spec, MethodConfig(r=R), Amount(tokens, tokens, pairs)).total == counted(model)


CASES = [
    (method, variant, layers)
    for method, variants in METHOD_VARIANTS.items()
    for variant in variants
    for layers in (None, "last:1", "1")
    if method != "head" and (layers is None or method not in ("prompt", "full") or (method == "full"))
]


@pytest.mark.parametrize(("method", "variant", "layers"), CASES)
@pytest.mark.parametrize("name", ["tied llama", "gpt2", "bert"])
def test_a_step_of_every_method_has_just_the_operations_that_torch_counts(
    name: str, method: str, variant: str, layers: str | None, tmp_path: Path
) -> None:
    if name == "bert" and (method in ("prefix", "prompt") or variant == "parallel"):
        pytest.skip("not for encoders")
    model, spec = built(name, tmp_path)
    blocks = ["re:.*layer\\.\\d+\\..*"] if name == "bert" and method in ("lora", "bitfit") else "all-linear"
    settings = {"method": method, "variant": variant, "layers": layers, "targets": blocks}
    config = MethodConfig(r=R, alpha=7.0, bottleneck=8, virtual_tokens=4, **settings)
    table.attach(model, config)
    width = LENGTH + config.lead_tokens
    amount = Amount(ROWS * width, ROWS * width, padded_pairs([width] * ROWS))
    assert step(spec, config, amount).total == counted(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_full_fine_tuning_has_six_operations_a_weight_and_token_and_those_of_attention(
    name: str, tmp_path: Path
) -> None:
    model, spec = built(name, tmp_path)
    tokens, pairs = ROWS * LENGTH, padded_pairs([LENGTH] * ROWS)
    expected = step(spec, MethodConfig(method="full"), Amount(tokens, tokens, pairs))
    # The embeddings' output has a gradient too, so nothing is left out, and torch counts just the same.
    assert expected.total == counted(model)
    linear = sum(out * into for group in block_groups(spec) for out, into in group.shapes) * spec.layers
    head = head_flop(spec, predicted=tokens) // (2 * tokens)
    assert expected.total - expected.attention == 6 * tokens * (linear + head)


def test_what_causal_rows_need_is_about_half_of_what_padded_ones_multiply() -> None:
    assert causal_pairs([3, 1]) == 6 + 1
    assert padded_pairs([3, 1]) == 2 * 9


def test_a_block_whose_operations_are_not_known_is_refused(tmp_path: Path) -> None:
    _, spec = built("llama", tmp_path)
    object.__setattr__(spec, "tensors", {**spec.tensors, "model.layers.0.mlp.gate.weight": (4, 24)})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.gate\.weight, whose operations are not known"):
        block_groups(spec)


@pytest.mark.parametrize("name", ["tied llama", "llama of wide heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_counts_just_as_many_over_the_tokens_that_it_computes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, spec = built(name, tmp_path)
    lora.attach(model.to(dtype), LoRAConfig(r=R, alpha=7.0))
    engine = prepare(model, share_prefix=True)
    rows = random_rows(ROWS, LENGTH, 50) + random_rows(1, 2 * LENGTH, 50)  # the last begins as the first
    for row in rows:
        row.supervised[: LENGTH - 4] = False
    (batch,) = micro_batches(rows, range(len(rows)), 1 << 20, engine.packing)
    before = TALLY.flop
    engine.loss(batch).backward()
    ending = len(batch.predicting) if engine.ends_early else None
    assert len(batch.predicting) < batch.computed_tokens
    assert engine.ends_early is (name != "tied llama" and dtype == torch.bfloat16 and has_low_rank())
    amount = Amount(batch.computed_tokens, len(batch.predicts), batch.attended_pairs, ending)
    predicted = step(spec, MethodConfig(r=R), amount)
    assert predicted.total == TALLY.flop - before
