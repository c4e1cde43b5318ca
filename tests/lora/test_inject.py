"""Attaching, merging and saving on whole models of transformers, tiny and random, in float64 to see formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorafit.errors import AdapterError, ConfigError, LorafitError, MergeError, RankError, TargetError
from lorafit.lora.inject import (
    AdaptedLayer,
    adapter_parameters,
    adapter_state,
    attach,
    detach,
    dropout_key,
    load_adapter_state,
    lora_layers,
    merge,
    set_scale,
    trainable_parameters,
    unmerge,
)
from lorafit.lora.layer import LoRALayer
from lorafit.lora.variants import VARIANTS

IDS = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))
BERT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def llama(tied: bool = True) -> nn.Module:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return ready(LlamaForCausalLM(config))


def gemma() -> nn.Module:
    config = Gemma3TextConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return ready(Gemma3ForCausalLM(config))


def gpt2() -> nn.Module:
    return ready(GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)))


def bert() -> nn.Module:
    return ready(BertForMaskedLM(BertConfig(**BERT)))


def albert() -> nn.Module:
    return ready(AlbertForMaskedLM(AlbertConfig(embedding_size=6, **BERT)))


def t5() -> nn.Module:
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, tie_word_embeddings=True)
    return ready(T5ForConditionalGeneration(config))


def ready(model: nn.Module) -> nn.Module:
    """In float64, in eval mode, with weights large enough to see."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return model.double().eval()


def logits(model: nn.Module) -> Tensor:
    if isinstance(model, T5ForConditionalGeneration):
        return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits
    return model(input_ids=IDS).logits


def attach_with(model: nn.Module, **changes):
    settings = {
        "r": 2,
        "alpha": 3.0,
        "targets": "all-linear",
        "variant": "lora",
        "rule": "alpha/r",
        "init": "gaussian",
        "dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers": None,
        "seed": 0,
    }
    return attach(model, **{**settings, **changes})


def train(model: nn.Module) -> None:
    """Give the adapters values as if trained."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("magnitude"):
            parameter.data.mul_(1.3)
        else:
            parameter.data.normal_(std=0.4, generator=generator)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which a float64 forward of these few layers amplifies at most by 10^5."""
    assert float((got - expected).detach().abs().max()) <= 1e5 * 2**-53 * float(expected.detach().abs().max())


MODELS = {"llama": llama, "gemma": gemma, "gpt2": gpt2, "bert": bert, "albert": albert, "t5": t5}
CASES = [
    pytest.param(make, "all-linear", variant, id=f"{name}-all-linear-{variant}")
    for name, make in MODELS.items()
    for variant in VARIANTS
] + [
    pytest.param(llama, ["q_proj", "embed_tokens"], "lora", id="llama-embeddings-tied-to-the-head"),
    pytest.param(llama, ["lm_head"], "lora", id="llama-head-tied-to-embeddings"),
    pytest.param(gemma, ["embed_tokens", "v_proj"], "lora", id="gemma-scaled-embeddings-tied-to-the-head"),
    pytest.param(gemma, ["lm_head"], "lora", id="gemma-head-tied-to-scaled-embeddings"),
    pytest.param(gpt2, ["wte", "wpe", "c_attn"], "lora", id="gpt2-embeddings"),
    pytest.param(bert, ["word_embeddings", "query"], "lora", id="bert-embeddings-tied-to-the-decoder"),
    pytest.param(albert, ["word_embeddings", "ffn"], "lora", id="albert-shared-layers-and-embeddings"),
    pytest.param(t5, ["shared", "q"], "lora", id="t5-shared-embeddings"),
    pytest.param(t5, ["lm_head", "wo"], "lora", id="t5-head"),
]


@pytest.mark.parametrize(("make", "targets", "variant"), CASES)
def test_attach_train_merge_unmerge_save_load_and_detach_obey_the_laws(make, targets, variant):
    model, untouched = make(), make()
    trainable_base = logits(untouched)
    base = logits(untouched.requires_grad_(False))  # torch itself takes another product where nothing is to be trained

    report = attach_with(model, targets=targets, variant=variant)
    assert torch.equal(logits(model), base), "a fresh adapter is the base"
    assert report.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total_params == sum(p.numel() for p in untouched.parameters())

    train(model)
    tuned = logits(model)
    assert not torch.allclose(tuned, base)
    tuned.square().sum().backward()
    adapter = {id(p) for p in trainable_parameters(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in adapter), name

    set_scale(model, 0.0)
    assert torch.equal(logits(model), base), "scale 0 is the base"
    set_scale(model, 1.0)
    merge(model)
    assert_close(logits(model), tuned)
    unmerge(model)
    assert torch.equal(logits(model), tuned), "unmerge is bitwise"

    other = make()
    attach_with(other, targets=targets, variant=variant, seed=5)
    load_adapter_state(other, adapter_state(model))
    assert torch.equal(logits(other), tuned), "save and load give the same"
    assert torch.equal(logits(copy.deepcopy(model)), tuned), "a deep copy gives the same"

    merge(model)
    detach(model)
    assert torch.equal(logits(model), trainable_base), "detach gives the base back"
    before, after = untouched.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("make", "targets", "variant"), CASES)
def test_the_update_of_a_model_is_that_of_its_dense_weights(make, targets, variant):
    """Merging into another copy by hand, from each owner's merged_weight, keeps ties and gives the same logits."""
    model, dense = make(), make()
    attach_with(model, targets=targets, variant=variant)
    train(model)
    set_scale(model, 0.7)
    expected = logits(model)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            if layer.tied_to is None:
                dense.get_submodule(name).weight.copy_(layer.merged_weight())
    assert_close(logits(dense), expected)


def test_the_report_counts_parameters_and_names_layers():
    report = attach_with(llama(), targets=["q_proj", "k_proj"], layers="last:1")
    expected = {
        "model.layers.2.self_attn.q_proj": AdaptedLayer(r=2, alpha=3.0, in_features=8, out_features=8),
        "model.layers.2.self_attn.k_proj": AdaptedLayer(r=2, alpha=3.0, in_features=8, out_features=4),
    }
    assert report.adapted == expected
    assert report.trainable_params == 2 * (8 + 8) + 2 * (8 + 4)
    assert report.total_params == 30 * 8 + 3 * (2 * 64 + 2 * 32 + 3 * 96 + 16) + 8
    assert report.notes == ["4 targets lie outside of layers 'last:1' and are left out"]


def test_rank_and_alpha_patterns_set_single_layers():
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"*.0.self_attn.*": 5.0}}
    report = attach_with(llama(), targets=["q_proj", "v_proj"], layers="first:2", **patterns)
    got = {name: (layer.r, layer.alpha) for name, layer in report.adapted.items()}
    assert got == {
        "model.layers.0.self_attn.q_proj": (4, 5.0),
        "model.layers.0.self_attn.v_proj": (2, 5.0),
        "model.layers.1.self_attn.q_proj": (4, 3.0),
        "model.layers.1.self_attn.v_proj": (2, 3.0),
    }


def test_an_embedding_named_alone_carries_its_tied_head_along_and_the_report_says_so():
    model = llama()
    report = attach_with(model, targets="embed_tokens")
    assert list(report.adapted) == ["model.embed_tokens"]
    assert report.notes == ["model.embed_tokens shares its weight with lm_head: one adapter serves all of them"]
    layers = lora_layers(model)
    assert layers["lm_head"].lora_A is layers["model.embed_tokens"].lora_A
    assert layers["lm_head"].transposed
    assert list(adapter_state(model)) == ["model.embed_tokens.lora_A", "model.embed_tokens.lora_B"]


def test_tied_weights_stay_one_tensor_while_merged():
    model = llama()
    attach_with(model, targets=["embed_tokens", "lm_head"])
    train(model)
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_share_memory_but_not_the_parameter_are_tied_too():
    model = llama(tied=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    report = attach_with(model, targets="lm_head")
    assert report.notes == ["lm_head shares its weight with model.embed_tokens: one adapter serves all of them"]
    train(model)
    expected = logits(model)
    merge(model)
    assert_close(logits(model), expected)


def test_an_untied_head_is_adapted_alone():
    report = attach_with(llama(tied=False), targets=["lm_head"])
    assert list(report.adapted) == ["lm_head"]
    assert report.notes == []


def test_a_layer_used_several_times_is_adapted_once():
    model = albert()
    report = attach_with(model, targets="ffn")
    assert list(report.adapted) == ["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"]


def test_a_module_under_two_names_is_replaced_at_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"left": shared, "right": shared})
    attach_with(model, targets="right")
    assert isinstance(model["left"], LoRALayer)
    assert model["left"] is model["right"]
    detach(model)
    assert model["left"] is shared
    assert model["right"] is shared


def test_dora_on_a_head_tied_to_an_embedding_is_refused():
    model = llama()
    with pytest.raises(TargetError) as error:
        attach_with(model, targets="lm_head", variant="dora")
    expected = (
        "variant 'dora' can't adapt lm_head: its weight is also that of model.embed_tokens, transposed, and a length "
        "per row of one is not a length per row of the other. Use variant 'lora', or leave lm_head out of targets."
    )
    assert str(error.value) == expected
    assert not lora_layers(model)


def test_dora_on_embeddings_that_share_one_weight_the_same_way_round_is_shared():
    model = nn.ModuleDict({"encoder": nn.Embedding(6, 4), "decoder": nn.Embedding(6, 4)})
    model["decoder"].weight = model["encoder"].weight
    report = attach_with(model, targets=["encoder", "decoder"], variant="dora")
    assert report.trainable_params == 2 * (6 + 4) + 4
    train(model)
    ids = torch.arange(6)
    assert torch.equal(model["encoder"](ids), model["decoder"](ids))


def test_a_weight_shared_with_what_cannot_be_adapted_is_refused():
    class Bare(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.matrix = weight

    body = nn.Linear(4, 4)
    with pytest.raises(TargetError) as error:
        attach_with(nn.ModuleDict({"body": body, "bare": Bare(body.weight)}), targets="body")
    expected = (
        "body shares its weight with bare.matrix of a Bare, which can't follow its update. Leave body out of targets."
    )
    assert str(error.value) == expected


def test_different_ranks_on_one_shared_weight_are_an_error():
    with pytest.raises(TargetError) as error:
        attach_with(llama(), targets=["embed_tokens", "lm_head"], rank_pattern={"lm_head": 3})
    expected = (
        "model.embed_tokens and lm_head share one weight, but their (r, alpha) are (2, 3.0) and (3, 3.0). "
        "Give them the same in rank_pattern and alpha_pattern."
    )
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"r": 5, "targets": "k_proj"},
            RankError,
            "model.layers.0.self_attn.k_proj (Linear, 8 -> 4) holds a rank of at most 4, got r = 5. "
            "Lower r, or give this layer its own in rank_pattern.",
        ),
        ({"r": 0}, RankError, "r must be a whole number of at least 1, got 0. 8 or 16 is a usual start."),
        (
            {"rank_pattern": {"q_proj": 0}},
            RankError,
            "r must be a whole number of at least 1, got 0. 8 or 16 is a usual start.",
        ),
        (
            {"alpha": math.nan},
            ConfigError,
            "alpha must be a finite number above 0, got nan. Twice the rank is a usual choice.",
        ),
        (
            {"alpha_pattern": {"q_proj": -1.0}},
            ConfigError,
            "alpha must be a finite number above 0, got -1.0. Twice the rank is a usual choice.",
        ),
        (
            {"variant": "dorra"},
            ConfigError,
            "variant 'dorra' is not known; there are lora, dora, lora-fa, vera. Did you mean 'dora'?",
        ),
        (
            {"init": "zeros"},
            ConfigError,
            "init 'zeros' is not known; there are gaussian, kaiming. Choose one of them.",
        ),
        (
            {"dropout": 1.0},
            ConfigError,
            "dropout must be at least 0 and below 1, got 1.0. 0.05 is a usual choice.",
        ),
        (
            {"alpha_pattern": {"lm_head": 4.0}},
            TargetError,
            "alpha_pattern ['lm_head'] match nothing. Adapted layers here: q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj, down_proj.",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_and_changes_nothing(changes, error, message):
    model = llama()
    with pytest.raises(error) as raised:
        attach_with(model, **changes)
    assert str(raised.value) == message
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attaching_twice_is_an_error():
    model = llama()
    attach_with(model)
    with pytest.raises(TargetError, match=r"^the model has an adapter already\. Call detach\(model\) first\.$"):
        attach_with(model)


@pytest.mark.parametrize("function", [detach, dropout_key])
def test_a_model_without_an_adapter_is_an_error(function):
    with pytest.raises(TargetError, match=r"^the model has no adapter\. Call attach\(model, \.\.\.\) first\.$"):
        function(llama())


def test_detach_puts_every_requires_grad_flag_back():
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    attach_with(model)
    assert {p.requires_grad for p in model.parameters()} == {True, False}
    detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
    attach_with(model)  # and it can be attached again


def test_adding_a_target_does_not_change_how_the_others_start():
    one, two = llama(), llama()
    attach_with(one, targets="q_proj")
    attach_with(two, targets="all-linear")
    expected, got = adapter_state(one), adapter_state(two)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_model_still_finds_what_it_reads_of_its_layers():
    model = llama()
    weight = model.get_input_embeddings().weight
    attach_with(model, targets=["embed_tokens", "q_proj"])
    assert model.get_input_embeddings().weight is weight
    assert model.lm_head.weight is weight
    assert model.get_input_embeddings().num_embeddings == 30
    assert model.model.layers[0].self_attn.q_proj.bias is None
    with pytest.raises(AttributeError):
        model.lm_head.nonsense  # noqa: B018  # reading is the test


def test_all_layers_share_one_dropout_key():
    model = llama()
    attach_with(model, dropout=0.3, seed=9)
    key = dropout_key(model)
    assert key.seed == 9
    assert all(layer.dropout.key is key for layer in lora_layers(model).values())
    twin = copy.deepcopy(model)
    assert dropout_key(twin) is not key
    assert all(layer.dropout.key is dropout_key(twin) for layer in lora_layers(twin).values())


def test_training_logits_with_dropout_depend_on_the_step_and_on_nothing_else():
    model = llama()
    attach_with(model, dropout=0.3)
    train(model)
    for layer in lora_layers(model).values():
        layer.train()
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    dropout_key(model).step = 1
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float32), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_keeps_ties_and_merging(cast):
    model = llama()
    attach_with(model, targets=["embed_tokens", "q_proj"])
    train(model)
    cast(model)
    expected = logits(model)
    assert model.lm_head.lora_A is model.model.embed_tokens.lora_A
    merge(model)
    unmerge(model)
    assert torch.equal(logits(model), expected)


def test_attaching_on_the_meta_device_counts_the_same():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**llama().config.to_dict()))
    expected = attach_with(llama(), targets=["all-linear", "embed_tokens"])
    assert attach_with(model, targets=["all-linear", "embed_tokens"]) == expected


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_an_error(scale):
    model = llama()
    attach_with(model)
    with pytest.raises(ConfigError, match=r"^scale must be a finite number, got .*\. 0 is the base model, 1 the tuned"):
        set_scale(model, scale)


def test_merging_beyond_the_range_of_the_dtype_is_an_error_and_merges_nothing():
    model = llama().half()
    attach_with(model, targets=["q_proj", "v_proj"])
    train(model)
    expected = logits(model)
    last = list(lora_layers(model).values())[-1]
    last.lora_B.data.fill_(1e6)
    with pytest.raises(MergeError) as error:
        merge(model)
    message = (
        "merging model.layers.2.self_attn.v_proj at scale 1 gives weights that are not finite in float16. "
        "Lower the scale, or load the model in float32 first."
    )
    assert str(error.value) == message
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert expected.isfinite().all()


def change(name: str, value: Tensor | None):
    def apply(state: dict[str, Tensor]) -> None:
        if value is None:
            del state[name]
        else:
            state[name] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change("model.layers.0.self_attn.q_proj.lora_A", None),
            "the adapter does not fit: 1 tensors are missing: model.layers.0.self_attn.q_proj.lora_A. "
            "Attach with the same targets.",
        ),
        (
            change("model.layers.0.mlp.up_proj.lora_A", torch.zeros(2, 8)),
            "the adapter does not fit: 1 have no place in the model: model.layers.0.mlp.up_proj.lora_A. "
            "Attach with the same targets.",
        ),
        (
            change("model.layers.1.self_attn.q_proj.lora_B", torch.zeros(8, 3)),
            "model.layers.1.self_attn.q_proj.lora_B has shape (8, 3), the model wants (8, 2). "
            "Attach with the same r and targets.",
        ),
        (
            change("model.layers.1.self_attn.q_proj.lora_B", torch.full((8, 2), math.nan)),
            "model.layers.1.self_attn.q_proj.lora_B holds values that are not finite. "
            "Save the adapter again, or train it again.",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_loads_nothing(spoil, message):
    model = llama()
    attach_with(model, targets="q_proj")
    expected = adapter_state(model)
    state = {name: tensor + 1 for name, tensor in expected.items()}
    spoil(state)
    with pytest.raises(AdapterError) as error:
        load_adapter_state(model, state)
    assert str(error.value) == message
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state(model).items())


def test_loading_into_a_merged_model_is_an_error():
    model = llama()
    attach_with(model, targets="q_proj")
    state = adapter_state(model)
    merge(model)
    with pytest.raises(
        AdapterError, match=r"^the adapter is merged into the model\. Call unmerge\(model\) before load"
    ):
        load_adapter_state(model, state)


def test_an_encoder_of_torch_does_not_skip_adapters_in_eval_mode():
    """Its fused inference path reads linear1.weight and calls no module."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), 2)
    encoder = encoder.double().eval()
    x, padding = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fused = encoder(x)
    report = attach_with(encoder, targets="all-linear")
    assert "3 fused inference paths of nn.TransformerEncoder are off: they skip adapters" in report.notes
    train(encoder)
    with torch.no_grad():
        expected = encoder.train()(x, src_key_padding_mask=padding)
        got = encoder.eval()(x, src_key_padding_mask=padding)
        assert torch.equal(got, expected)
        merge(encoder)
        assert_close(encoder(x, src_key_padding_mask=padding), expected)
    detach(encoder)
    assert encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == 1
    assert_close(encoder(x), fused)


def test_every_message_is_one_for_users():
    assert all(
        issubclass(error, LorafitError) for error in (AdapterError, ConfigError, MergeError, RankError, TargetError)
    )


def test_the_padding_row_of_an_embedding_has_no_update():
    model = llama(tied=False)
    attach_with(model, targets="embed_tokens")
    layer = lora_layers(model)["model.embed_tokens"]
    layer.lora_B.data.normal_()
    assert torch.equal(layer.lora_A[:, 0], torch.zeros(2, dtype=torch.float64))
    ids = torch.tensor([[0, 0, 4]])
    layer(ids).sum().backward()
    assert torch.equal(layer.lora_A.grad[:, 0], torch.zeros(2, dtype=torch.float64))
    assert float(layer.lora_A.grad[:, 4].abs().max()) > 0
    assert torch.equal(layer.merged_weight()[0], layer.base.weight[0])


def test_a_layer_compiles_in_one_graph():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    attach_with(model, targets="all-linear")
    train(model)
    x = torch.randn(2, 5, 4)
    expected = model(x)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it, not we
def test_a_compiled_layer_takes_the_dropout_of_each_step_without_compiling_again():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    attach_with(model, targets="all-linear", dropout=0.2)
    train(model)
    x = torch.randn(2, 5, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 4):
            dropout_key(model).step = step
            assert torch.equal(compiled(x), model(x))


def test_a_model_in_eval_mode_drops_nothing_after_attach() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    attach_with(model, dropout=0.5)
    assert [layer.training for layer in lora_layers(model).values()] == [False]
