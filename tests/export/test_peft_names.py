"""Which modules a file means: held against PEFT's own matching, over every module of small models."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from lorafit.errors import AdapterError
from lorafit.export.peft_names import Targets, exact_pattern, exact_targets, own_patterns, pattern_value, resolve
from lorafit.lora.targets import matches


def block() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(2, 2), "lin": nn.Linear(2, 2), "mlp": nn.ModuleDict({"q": nn.Linear(2, 2)})})


def tree() -> nn.Module:
    """Names that are ends of other names, nested numbered lists, and two stacks."""
    return nn.ModuleDict(
        {
            "lin": nn.Linear(2, 2),
            "q": nn.Linear(2, 2),
            "layers": nn.ModuleList([block(), block(), nn.ModuleDict({"experts": nn.ModuleList([block(), block()])})]),
            "encoder": nn.ModuleDict({"h": nn.ModuleList([block(), block()])}),
        }
    )


MODEL = tree()
NAMES = [name for name, _ in MODEL.named_modules() if name]
SUFFIXES = sorted({name.split(".", i)[-1] for name in NAMES for i in range(name.count(".") + 1)})
REGEXES = ["q", r".*\.q", r".*(lin|mlp\.q)", r"layers\.[01]\..*", r"encoder.*", "nothing", r".*\.0\.(q|lin)"]
PATTERN_KEYS = st.sampled_from([*SUFFIXES, *REGEXES, *map(exact_pattern, NAMES)])


@given(
    include=st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=4) | st.sampled_from(REGEXES),
    exclude=st.lists(st.sampled_from(SUFFIXES), max_size=2) | st.sampled_from(["", *REGEXES]),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "h"]) | st.lists(st.sampled_from(["layers", "h", "x"]), max_size=2),
)
def test_the_same_modules_as_peft_are_meant(include, exclude, layers, pattern):
    if isinstance(include, str) or layers is None:
        layers, pattern = (None if isinstance(include, str) else layers), None
    config = LoraConfig(
        target_modules=include, exclude_modules=exclude or None, layers_to_transform=layers, layers_pattern=pattern
    )
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    targets = Targets(
        include=include,
        exclude=exclude,
        layers=[layers] if isinstance(layers, int) else layers or None,
        layers_pattern=[pattern] if isinstance(pattern, str) else pattern or [],
        classifies=False,
    )
    if expected:
        assert resolve(MODEL, targets) == expected
    else:
        with pytest.raises(AdapterError, match="match nothing in this model"):
            resolve(MODEL, targets)


@given(st.dictionaries(PATTERN_KEYS, st.integers(1, 9), max_size=4))
def test_the_same_pattern_as_in_peft_is_found(patterns):
    for name in NAMES:
        expected = patterns.get(get_pattern_key(patterns.keys(), name), 99)
        assert pattern_value(patterns, name, 99) == expected


@given(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_written_targets_mean_exactly_these_modules_to_peft(names):
    config = LoraConfig(target_modules=exact_targets(MODEL, names))
    assert {name for name in NAMES if check_target_module_exists(config, name)} == set(names)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_pattern_means_exactly_one_module_to_peft_and_to_us(name):
    assert [n for n in NAMES if get_pattern_key([exact_pattern(name)], n) == exact_pattern(name)] == [name]
    assert [n for n in NAMES if matches(own_patterns(MODEL, [name])[name], n)] == [name]


def test_names_stay_a_plain_list_where_that_is_exact():
    assert exact_targets(MODEL, ["layers.0.q", "layers.1.lin"]) == ["layers.0.q", "layers.1.lin"]
    assert exact_targets(MODEL, ["q"]) == "q"


def test_a_regular_expression_that_is_none_is_named():
    with pytest.raises(AdapterError, match=re.escape("holds '*q', which is no regular expression")):
        resolve(MODEL, Targets("*q", [], None, [], False))


class WithHead(nn.Module):
    """What `all-linear` leaves out: an output head if the model tells it, else a classifier if that is the task."""

    def __init__(self, output: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.head = nn.Linear(2, 5)
        self.score = nn.Linear(2, 3)
        self.output = output

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if self.output else None


@pytest.mark.parametrize(
    ("output", "classifies", "expected"),
    [
        (True, True, ["body.0", "score"]),
        (False, True, ["body.0", "head"]),
        (False, False, ["body.0", "head", "score"]),
    ],
)
def test_all_linear_leaves_out_the_head(output, classifies, expected):
    assert resolve(WithHead(output), Targets("all-linear", [], None, [], classifies)) == expected


def test_all_linear_means_all_where_the_model_names_no_head():
    assert resolve(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)), Targets("All-Linear", [], None, [], False)) == [
        "0"
    ]
