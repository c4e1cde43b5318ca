"""The engine against plain autograd over one row at a time, for the architectures that transformers holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch import Tensor, nn

from lorafit.config import LoRAConfig
from lorafit.data.batching import read_tokens
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine import engine as engine_module
from lorafit.engine import groups as groups_module
from lorafit.engine.engine import Engine, plain, prepare
from lorafit.engine.kernels.products import has_low_rank
from lorafit.engine.layers import decoder_layers, untouched_layers
from lorafit.engine.product import Dense, Int8, PackedInt8
from lorafit.engine.tally import TALLY
from lorafit.errors import ModelError
from lorafit.export import peft as peft_format
from lorafit.lora.inject import set_scale
from lorafit.lora.tokens import attach_rows
from lorafit.lora.truncate import truncate
from lorafit.methods.table import METHODS
from tests import tiny

LORA = METHODS["lora"]
LLAMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
# name, settings, whether rows can be packed
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA, True),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA, True),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}, True),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 5}, True),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**LLAMA, "head_dim": 8}, True),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8, "sliding_window": 5}, False),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**LLAMA, "head_dim": 8, "sliding_window": 5}, True),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", LLAMA, True),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, True),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", NEOX, True),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", LLAMA, True),
    "granite": ("GraniteConfig", "GraniteForCausalLM", LLAMA, True),
    "cohere": ("CohereConfig", "CohereForCausalLM", LLAMA, True),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM, False),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 3}, True),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config, model, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**settings, initializer_range=0.2))
    return made.to(dtype).eval()  # type: ignore[no-any-return]


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    """With an adapter that does something: B is not zero."""
    LORA.attach(model, LoRAConfig(**{"r": 3, "alpha": 7.0, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in LORA.trainable(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(lengths: Sequence[int] = (3, 9, 150, 6, 9, 12), prefix: int = 40) -> list[Encoded]:
    """Rows that begin alike; the fourth has a loss inside that prefix too, and one is longer than a chunk."""
    random = np.random.default_rng(0)
    common = random.integers(2, 97, prefix)
    made = []
    for number, length in enumerate(lengths):
        ids = np.concatenate([common, random.integers(2, 97, length)]).astype(np.int32)
        first = prefix // 2 if number == 3 else len(ids) - 3
        made.append(Encoded(ids, np.arange(len(ids)) >= max(first, 1), 0, "f:1"))
    return made


def gradients(engine: Engine, data: list[Encoded], groups: Sequence[Sequence[int]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients summed over groups of rows, each group as one step's batch."""
    parameters = LORA.trainable(engine.model)
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for group in groups:
        for batch in micro_batches(data, group, 1 << 20, engine.packing):
            LORA.before_forward(engine.model, 5, 2, batch.token_rows, batch.position_ids)
            loss = engine.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def alone(model: nn.Module, data: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    return gradients(plain(model), data, [[row] for row in range(len(data))])


def together(engine: Engine, data: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    return gradients(engine, data, [range(len(data))])


def assert_same(
    expected: tuple[float, dict[str, Tensor]], got: tuple[float, dict[str, Tensor]], tolerance: float = 1e-5
) -> None:
    """Losses, and the gradient of every tensor, as a whole and relative to its own size."""
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    assert expected[1].keys() == got[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_with_a_shared_prefix_give_the_gradients_of_rows_alone(name: str) -> None:
    model, data = adapted(build(name)), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    assert ARCHITECTURES[name][3] is not engine.packing.padded, engine.notes
    assert bool(engine.notes) is engine.packing.padded
    assert_same(expected, together(engine, data))
    engine.close()
    assert_same(expected, alone(model, data), tolerance=1e-7)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gpt2"])  # untied; tied, scaled; after the head; tied
def test_trained_rows_of_tokens_have_the_gradients_of_rows_alone(name: str) -> None:
    model, data = adapted(build(name)), rows()
    attach_rows(model, [3, 50, 96])
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    got = together(engine, data)
    assert_same(expected, got)
    assert all(got[1][key].norm() > 0 for key in got[1] if key.endswith(".rows"))
    assert untouched_layers(model) == 0
    set_scale(model, 0)
    assert whole_loss_of(engine, data) == pytest.approx(alone(adapted_off(build(name)), data)[0], rel=1e-5)


@torch.no_grad()
def whole_loss_of(engine: Engine, data: list[Encoded]) -> float:
    return sum(float(engine.loss(batch)) for batch in micro_batches(data, range(len(data)), 1 << 20, engine.packing))


def adapted_off(model: nn.Module) -> nn.Module:
    """With an adapter that does nothing."""
    LORA.attach(model, LoRAConfig(r=3, alpha=7.0))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will drop
def test_gradients_are_those_of_peft(name: str, variant: str, tmp_path: Path) -> None:
    model, data = adapted(build(name), variant=variant), rows()
    peft_format.save(model, tmp_path, LoRAConfig(r=3, alpha=7.0, variant=variant), base="base", tokenizer=None)
    theirs = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    total = torch.zeros(())
    for row in data:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        learned = torch.from_numpy(row.supervised)[1:]
        logits = theirs(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum")
    total.backward()  # type: ignore[no-untyped-call]
    ends = {".lora_A.default.weight": ".lora_A", ".lora_B.default.weight": ".lora_B"}
    ends[".lora_magnitude_vector.default.weight"] = ".magnitude"
    expected = {
        name.removeprefix("base_model.model.").removesuffix(end) + ours: parameter.grad
        for name, parameter in theirs.named_parameters()
        for end, ours in ends.items()
        if name.endswith(end) and parameter.grad is not None
    }
    assert_same((float(total.detach()), expected), together(prepare(model, share_prefix=True), data))


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "dora"},
        {"dropout": 0.3},
        {"variant": "dora", "dropout": 0.3},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["q_proj", "embed_tokens", "lm_head"]},
        {"targets": ["down_proj"], "layers": "last:1"},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 2.0}, "scaling_rule": "alpha/sqrt(r)"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_setting_of_the_adapter_gives_the_same_gradients(settings: dict[str, Any], tied: bool) -> None:
    if tied and settings.get("targets") and "lm_head" in settings["targets"]:
        settings = {**settings, "targets": ["q_proj", "embed_tokens"]}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied, initializer_range=0.2)
    model, data = adapted(transformers.LlamaForCausalLM(config).eval(), **settings), rows()
    expected = alone(model, data)
    assert_same(expected, together(prepare(model, share_prefix=not settings.get("dropout")), data))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_update_that_is_brought_to_a_lower_rank_is_followed(name: str) -> None:
    model, data = adapted(build(name), r=5), rows()
    engine = prepare(model, share_prefix=True)
    for r in (5, 4, 1):  # one after the other, as what is kept of one must not serve the next
        truncate(model, r, "alpha/r")
        assert_same(alone(model, data), together(engine, data))


@pytest.mark.skipif(not has_low_rank(), reason="the products of factors in place need AVX-512 BF16")
def test_factors_that_are_kept_in_place_do_not_serve_those_that_replace_them() -> None:
    model, data = adapted(build("llama", torch.bfloat16), r=5), rows()
    engine = prepare(model, share_prefix=True)
    whole = together(engine, data)[0]
    truncate(model, 2, "alpha/r")
    cut = together(engine, data)[0]
    assert whole != cut == together(prepare(model, share_prefix=True), data)[0]


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_scale_is_followed(scale: float) -> None:
    model, data = adapted(tiny.llama()), rows()
    engine = prepare(model, share_prefix=True)
    set_scale(model, scale)
    got = whole_loss_of(engine, data)
    engine.close()
    assert got == pytest.approx(whole_loss_of(plain(model), data), rel=1e-6)


def test_a_model_merged_after_it_was_prepared_gives_the_merged_loss() -> None:
    from lorafit.lora.inject import merge

    for variant in ("lora", "dora"):
        model, data = adapted(tiny.llama(), variant=variant), rows()
        engine = prepare(model, share_prefix=True)
        (batch,) = micro_batches(data, range(len(data)), 1 << 20, engine.packing)
        with torch.no_grad():
            before = float(engine.loss(batch))
            merge(model)
            assert float(engine.loss(batch)) == pytest.approx(before, rel=1e-5)


def test_nothing_below_the_lowest_adapted_layer_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = adapted(tiny.llama(layers=4), layers="last:1"), rows()
    engine = prepare(model, share_prefix=True)
    kinds: list[str] = []
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        layer.register_forward_hook(lambda m, a, output, n=number: kinds.append(f"{n}: {output.requires_grad}"))
    (batch,) = micro_batches(data, range(len(data)), 1 << 20, engine.packing)
    engine.loss(batch)
    assert kinds == ["0: False", "1: False", "2: False", "3: True"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_starting_from_kept_features_gives_the_same_gradients(name: str, dropout: float, tmp_path: Path) -> None:
    model, data = adapted(build(name), layers="last:1", dropout=dropout), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=not dropout)
    assert untouched_layers(model) == 1
    batches = micro_batches(data, range(len(data)), 100, engine.packing)
    engine.keep_features(tmp_path / "features", [read_tokens(row) for row in data], batches)
    computed: list[str] = []
    first, last = decoder_layers(model)[1]
    handles = [
        next(
            module for module in layer.modules() if type(module).__name__ in ("Linear", "Conv1D")
        ).register_forward_hook(lambda m, a, o, n=n: computed.append(n))  # type: ignore[misc]
        for n, layer in (("first", first), ("last", last))
    ]
    parameters = LORA.trainable(model)
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for group in ([4, 1, 0], [2, 3, 5]):
        for batch in micro_batches(data, group, 1 << 20, engine.packing):
            LORA.before_forward(model, 5, 2, batch.token_rows, batch.position_ids)
            loss = engine.training_loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    for handle in handles:
        handle.remove()
    assert_same(expected, (total, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
    assert "first" not in computed


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 0), ({"layers": "last:1"}, 1), ({"targets": ["lm_head"]}, 2), ({"targets": ["embed_tokens"]}, 0)],
)
def test_layers_below_all_that_is_trained_are_found(settings: dict[str, Any], expected: int) -> None:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    assert untouched_layers(adapted(transformers.LlamaForCausalLM(config), **settings)) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_gradients_and_count_their_work_once(name: str, dropout: float) -> None:
    model, data = adapted(build(name), dropout=dropout), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=not dropout)
    before = TALLY.flop
    together(engine, data)
    once, before = TALLY.flop - before, TALLY.flop
    engine.recompute_layers()
    assert_same(expected, together(engine, data))
    assert TALLY.flop - before == once


@pytest.mark.parametrize("limit", ["attention_chunk_size", "sliding_window"])
def test_a_mask_that_no_attention_function_is_told_of_means_padding(limit: str) -> None:
    model = adapted(build("llama"))
    setattr(model.config, limit, 64)  # Llama's layers pass neither on
    engine = prepare(model, share_prefix=True)
    assert engine.packing.padded
    assert "by its mask alone" in engine.notes[0]


def test_preparing_twice_is_preparing_once() -> None:
    model, data = adapted(tiny.llama()), rows()
    expected = alone(model, data)
    first = prepare(model, share_prefix=True)
    second = prepare(model, share_prefix=True)
    assert not first.patches.modules and second.patches.modules
    assert_same(expected, together(second, data))


def test_logits_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.loss, "CHUNK", 7)
    model, data = adapted(tiny.llama()), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    assert engine.chunked
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def watch(x: Tensor, W: Tensor, *more: Any) -> Tensor:
        if len(W) == 258:
            sizes.append(len(x.flatten(0, -2)))
        return linear(x, W, *more)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    got = together(engine, data)
    monkeypatch.undo()
    assert sizes and max(sizes) <= 7
    assert_same(expected, got)


def test_without_a_compiler_torchs_own_operations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.engine.kernels import native

    model, data = adapted(build("llama")), rows()
    expected = alone(model, data)
    monkeypatch.setattr(native, "available", lambda: False)
    assert_same(expected, together(prepare(model, share_prefix=True), data))


def _gradient_error(reference: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The relative error of all gradients as one vector."""
    difference = sum(float((got[name] - gradient).norm() ** 2) for name, gradient in reference.items())
    return float((difference / sum(float(gradient.norm() ** 2) for gradient in reference.values())) ** 0.5)


def test_int8_gradients_are_close_and_its_groups_are_measured() -> None:
    exact, data = adapted(build("llama", torch.bfloat16)).float(), rows()
    reference = alone(exact, data)
    model = adapted(build("llama", torch.bfloat16))
    engine = prepare(model, share_prefix=True)
    engine.use_int8(micro_batches(data, range(len(data)), 100, engine.packing)[0])
    assert len(engine.int8_errors) == len(engine.groups) == 4 * 2
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj" in [error.label for error in engine.int8_errors]
    # Below the lowest adapted layer, at the embedding, no gradient is asked for.
    assert all(0 < error.forward < 0.05 and error.backward < 0.1 for error in engine.int8_errors)
    assert sum(error.backward > 0 for error in engine.int8_errors) == 4 * 2 - 1
    assert all(isinstance(group.linears.product, Int8 | PackedInt8) for group in engine.groups)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    # A product is off by about 1%, and a gradient went through some ten of them.
    assert _gradient_error(reference[1], together(engine, data)[1]) < 0.1


def test_while_int8_is_made_layers_keep_their_inputs_alone_and_what_is_made_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for again in (True, False):
        model, data = adapted(build("llama", torch.bfloat16)), rows()
        engine = prepare(model, share_prefix=True)
        if not again:
            monkeypatch.setattr(Engine, "_recomputed", lambda self: [])
        kept = list[int]()

        def keep(saved: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(saved.nbytes)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            engine.use_int8(micro_batches(data, range(len(data)), 100, engine.packing)[0])
        results.append((sum(kept), engine.int8_errors, together(engine, data)))
    (few, errors, numbers), (many, others, expected) = results
    assert few < many / 2
    assert [error.label for error in errors] == [error.label for error in others]
    assert all(a.forward == pytest.approx(b.forward) for a, b in zip(errors, others, strict=True))
    assert numbers[0] == expected[0]
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in numbers[1].items())


def test_a_group_whose_int8_error_is_too_large_stays_in_bf16_and_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = adapted(build("llama", torch.bfloat16)), rows()
    engine = prepare(model, share_prefix=True)
    monkeypatch.setattr(groups_module, "INT8_LIMITS", (0.01, 0.1))
    engine.use_int8(micro_batches(data, range(len(data)), 100, engine.packing)[0])
    kept = [error for error in engine.int8_errors if error.too_large]
    assert 0 < len(kept) == len(engine.notes) < len(engine.groups)
    for error, group in zip(engine.int8_errors, engine.groups, strict=True):
        assert isinstance(group.linears.product, Dense if error.too_large else Int8 | PackedInt8)
        assert not error.too_large or any(error.label in note for note in engine.notes)


def test_layers_without_an_adapter_are_released_too() -> None:
    model, data = adapted(build("llama"), targets=["q_proj"]), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    engine.release_weights()
    assert_same(expected, together(engine, data))
    assert model.model.layers[0].mlp.up_proj.weight.untyped_storage().nbytes() <= 4  # type: ignore[union-attr, index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_weights_take_no_memory_and_change_no_gradient(dtype: torch.dtype) -> None:
    results = []
    for release in (False, True):
        model, data = adapted(build("llama", dtype)), rows()
        engine = prepare(model, share_prefix=True)
        if dtype is torch.bfloat16:
            engine.use_int8(micro_batches(data, range(len(data)), 100, engine.packing)[0])
        if release:
            engine.release_weights()
        results.append(together(engine, data))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())
    weight = model.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr, index]
    assert weight.shape == (32, 48) and weight.untyped_storage().nbytes() <= 4
    with pytest.raises(ModelError, match="released"):
        engine.close()


FUSED = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # heads that the row kernel takes


@pytest.mark.skipif(not has_low_rank(), reason="attention row by row needs AVX-512 BF16")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize(
    ("name", "more", "fused"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("mistral", {"sliding_window": 5}, True),
        ("gemma", {}, True),
        ("qwen3", {}, False),  # norms of queries and keys
        ("granite", {"residual_multiplier": 0.5}, False),
        ("phi3", {}, False),
    ],
)
def test_a_layer_as_one_function_gives_the_same_bits(
    name: str, more: dict[str, Any], fused: bool, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, _, packed = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, (config, model, {**FUSED, **more}, packed))
    if name == "phi3":
        targets = "all-linear"  # its linear layers have other names
    monkeypatch.setattr(engine_module, "ends_by_token", lambda *about: False)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(engine_module, "_fuse_layers", lambda engine, probe: None)
        engine = prepare(adapted(build(name, torch.bfloat16), targets=targets), share_prefix=True)
        layers = decoder_layers(engine.model)[1]
        assert (fused and not apart) == all("forward" in layer.__dict__ for layer in layers)
        before = TALLY.flop
        found.append((*gradients(engine, rows(), [range(6)]), TALLY.flop - before))
    (loss, own, flop), (expected_loss, expected, expected_flop) = found
    assert (loss, flop, own.keys()) == (expected_loss, expected_flop, expected.keys())
    assert all(torch.equal(own[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "more"), [("llama", {}), ("llama", FUSED), ("mistral", FUSED), ("gemma", FUSED)])
def test_bf16_gradients_stay_within_the_rounding_of_its_storage(
    name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the gradients of the same weights in fp32: as close as plain bf16 is, within half as much again."""
    config, kind, settings, packed = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, (config, kind, {**settings, **more}, packed))
    exact, data = adapted(build(name, torch.bfloat16)).float(), rows()
    reference = alone(exact, data)
    model = adapted(build(name, torch.bfloat16))
    by_torch = alone(model, data)
    engine = prepare(model, share_prefix=True)
    by_engine = together(engine, data)

    assert engine.ends_early is (has_low_rank() and bool(more))
    assert _gradient_error(reference[1], by_engine[1]) <= 1.5 * _gradient_error(reference[1], by_torch[1])
    assert _gradient_error(reference[1], by_torch[1]) < 0.1
    engine.recompute_layers()
    again = together(engine, data)
    assert again[0] == by_engine[0] and all(torch.equal(again[1][key], g) for key, g in by_engine[1].items())


@pytest.mark.skipif(not has_low_rank(), reason="attention row by row needs AVX-512 BF16")
def test_where_tokens_are_mixed_after_the_last_layer_it_is_computed_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, kind, _, packed = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", (config, kind, FUSED, packed))

    class Mixing(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            return y + y.roll(1, dims=1)

    model = adapted(build("llama", torch.bfloat16))
    model.model.norm = Mixing(model.model.norm)  # type: ignore[union-attr, assignment]
    # The packed rows of the probe would be seen to differ first.
    monkeypatch.setattr(engine_module.Probe, "why_not_packed", _packed_anyway(engine_module.Probe.why_not_packed))
    engine = prepare(model, share_prefix=True)
    assert all("forward" in layer.__dict__ for layer in decoder_layers(model)[1]) and not engine.ends_early


def _packed_anyway(looked: Callable[[Any], str | None]) -> Callable[[Any], None]:
    def look(probe: Any) -> None:
        assert looked(probe) is not None

    return look
