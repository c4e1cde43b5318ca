from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lorafit.errors import TargetError
from lorafit.lora.targets import check_patterns, matches, pattern_value, select, select_layers

LLAMA = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LINEAR_LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **LLAMA))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("layers.0", "model.layers.0.self_attn.q_proj", False),
        ("*.self_attn.*", "model.layers.0.self_attn.q_proj", True),
        ("*.[qv]_proj", "model.layers.0.self_attn.v_proj", True),
        ("*.[qv]_proj", "model.layers.0.self_attn.k_proj", False),
        ("?_proj", "model.layers.0.self_attn.q_proj", False),
        (r"re:.*layers\.[0-3]\..*_proj", "model.layers.2.self_attn.q_proj", True),
        (r"re:q_proj", "model.layers.2.self_attn.q_proj", False),
        ("Q_proj", "layers.q_proj", False),
    ],
)
def test_a_pattern_means_names_ends_globs_and_whole_regular_expressions(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_all_linear_is_every_linear_layer_but_the_output_head(llama):
    found = select(llama, "all-linear")
    expected = {f"model.layers.{i}.{part}" for i in range(4) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert set(found.names) == expected
    assert found.notes == ["lm_head is left out: it is the output head"]
    assert found.skipped == {"output head": 1}


def test_all_linear_leaves_out_a_classification_head():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9)
    found = select(BertForSequenceClassification(config), "all-linear")
    assert "classifier" not in found.names
    assert "bert.encoder.layer.0.output.dense" in found.names
    assert found.notes == ["classifier is left out: it is the output head"]


def test_all_linear_takes_every_linear_layer_of_a_plain_module_even_one_called_classifier():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "classifier": nn.Linear(3, 2)})
    assert select(model, "all-linear").names == ["body", "classifier"]


def test_all_linear_leaves_out_a_head_tied_to_an_embedding_in_a_plain_module():
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["tokens"].weight
    assert select(model, "all-linear").names == ["body"]


def test_all_linear_leaves_out_the_projection_of_multihead_attention_and_says_so():
    found = select(nn.TransformerEncoderLayer(4, 2, 6), "all-linear")
    assert found.names == ["linear1", "linear2"]
    assert found.notes == [
        "self_attn.out_proj is left out: it belongs to nn.MultiheadAttention, which reads its weight and never calls "
        "it",
        "1 weight matrices in MultiheadAttention are bare parameters, not layers, and are not adapted",
    ]


def test_all_linear_says_which_experts_it_does_not_reach():
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=2, **LLAMA))
    found = select(model, "all-linear")
    assert any(note.startswith("4 weight matrices in MixtralExperts are bare parameters") for note in found.notes)


def test_all_linear_can_stand_beside_other_patterns(llama):
    found = select(llama, ["all-linear", "lm_head"])
    assert len(found.names) == 4 * 7 + 1
    assert found.names[-1] == "lm_head"


def test_names_come_in_the_order_of_the_model_and_once(llama):
    found = select(llama, ["v_proj", "q_proj", "*.self_attn.q_proj"])
    expected = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qv"]
    assert found.names == expected


def test_what_a_glob_matches_besides_is_counted(llama):
    found = select(llama, "*.mlp*")
    assert len(found.names) == 4 * 3
    assert found.skipped == {"LlamaMLP": 4, "SiLUActivation": 4}
    assert found.notes == []


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            "q_porj",
            "targets ['q_porj'] match nothing. Adaptable layers here: embed_tokens, q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj, lm_head. Did you mean 'q_proj'?",
        ),
        (
            ["q_proj", "zzz", "re:nothing"],
            "targets ['zzz', 're:nothing'] match nothing. Adaptable layers here: embed_tokens, q_proj, k_proj, "
            "v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head.",
        ),
        (
            "mlp",
            "target 'mlp' means model.layers.0.mlp; it is a LlamaMLP, which has no low-rank update here. "
            "Adaptable layers in it: gate_proj, up_proj, down_proj.",
        ),
        (
            ["q_proj", "input_layernorm"],
            "target 'input_layernorm' means model.layers.0.input_layernorm; it is a LlamaRMSNorm, which has no "
            "low-rank update here. Leave it out of targets.",
        ),
        (
            "re:(",
            "pattern 're:(' is not a regular expression: missing ), unterminated subpattern at position 0. "
            "Close it, or escape the sign with a backslash.",
        ),
    ],
)
def test_a_pattern_that_means_no_layer_is_an_error_that_says_what_there_is(llama, targets, expected):
    with pytest.raises(TargetError) as error:
        select(llama, targets)
    assert str(error.value) == expected


def test_a_model_without_layers_to_adapt_is_an_error():
    with pytest.raises(TargetError) as error:
        select(nn.Sequential(nn.ReLU()), "all-linear")
    assert str(error.value) == "targets ['all-linear'] match nothing: the model has no layer that can be adapted."


def test_the_first_pattern_that_means_a_layer_gives_its_value():
    assert pattern_value({"q_proj": 2, "*.q_proj": 3}, "layers.0.q_proj") == 2
    assert pattern_value({"v_proj": 2, "*.q_proj": 3}, "layers.0.q_proj") == 3
    assert pattern_value({"v_proj": 2}, "layers.0.q_proj") is None


def test_a_rank_pattern_that_means_no_target_is_an_error():
    with pytest.raises(TargetError) as error:
        check_patterns("rank_pattern", {"q_proj": 4, "v_porj": 2}, ["layers.0.q_proj", "layers.0.v_proj"])
    expected = "rank_pattern ['v_porj'] match nothing. Adapted layers here: q_proj, v_proj. Did you mean 'v_proj'?"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("last:1", [3]),
        ("last:4", [0, 1, 2, 3]),
        ("first:2", [0, 1]),
        ("0-1,3", [0, 1, 3]),
        ("2", [2]),
        ([1, 2], [1, 2]),
    ],
)
def test_layers_choose_blocks(llama, layers, expected):
    names = select(llama, "q_proj").names
    assert select_layers(llama, names, layers) == [f"model.layers.{i}.self_attn.q_proj" for i in expected]


def test_layers_leave_out_what_is_in_no_block(llama):
    names = select(llama, ["lm_head", "q_proj"]).names
    assert select_layers(llama, names, "last:1") == ["model.layers.3.self_attn.q_proj"]


def test_layers_count_the_entries_of_a_sequential_where_there_is_no_module_list():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert select_layers(model, ["0", "2"], "last:1") == ["2"]


def test_each_stack_of_a_model_is_counted_by_itself():
    stack = [nn.Linear(2, 2) for _ in range(5)]
    model = nn.ModuleDict({"encoder": nn.ModuleList(stack[:2]), "decoder": nn.ModuleList(stack[2:])})
    names = select(model, "all-linear").names
    assert select_layers(model, names, "last:1") == ["encoder.1", "decoder.2"]
    assert select_layers(model, names, "last:3") == names
    assert select_layers(model, names, [2]) == ["decoder.2"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:5", "layers 'last:5' is out of range: the model has 4 blocks. Choose from 1 to 4."),
        ("first:0", "layers 'first:0' is out of range: the model has 4 blocks. Choose from 1 to 4."),
        ("2-7", "layers '2-7' is out of range: the model has 4 blocks. Choose from 0 to 3."),
        ([-1], "layers [-1] is out of range: the model has 4 blocks. Choose from 0 to 3."),
        ([], "layers [] is out of range: the model has 4 blocks. Choose from 0 to 3."),
        ("3-1", "layers '3-1' can't be read. Write last:K, first:K, or numbers and ranges like 0-3,7."),
        ("top", "layers 'top' can't be read. Write last:K, first:K, or numbers and ranges like 0-3,7."),
    ],
)
def test_layers_out_of_range_or_unreadable_are_errors(llama, layers, expected):
    with pytest.raises(TargetError) as error:
        select_layers(llama, select(llama, "q_proj").names, layers)
    assert str(error.value) == expected


def test_layers_of_a_model_without_blocks_are_an_error(llama):
    with pytest.raises(TargetError) as error:
        select_layers(llama, ["lm_head"], "last:1")
    assert str(error.value) == "layers is 'last:1', but none of the targets lies in a numbered block. Leave layers out."


def test_a_module_used_under_two_names_is_found_by_either_and_once():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"left": shared, "right": shared})
    assert select(model, "right").names == ["left"]
    assert torch.equal(model["left"].weight, model["right"].weight)
