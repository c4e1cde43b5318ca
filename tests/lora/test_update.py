from __future__ import annotations

import math

import pytest
import torch

from lorafit.errors import ConfigError, RankError
from lorafit.lora.update import delta_weight, scaling


def test_scaling_is_alpha_over_r():
    assert scaling(4, 10.0, "alpha/r") == 2.5


def test_rslora_scaling_is_alpha_over_the_root_of_r():
    assert scaling(4, 10.0, "alpha/sqrt(r)") == 5.0


def test_delta_weight_of_bfloat16_factors_is_computed_in_float32():
    A = torch.full((3, 2), 1.0, dtype=torch.bfloat16)
    B = torch.tensor([[256.0, 1.0, 1.0]], dtype=torch.bfloat16)  # 258 has no bfloat16
    expected = torch.tensor([[258.0, 258.0]])
    assert torch.equal(delta_weight(A, B, 1.0), expected)


def test_delta_weight_of_convolution_factors_is_a_matrix():
    expected = (5, 4 * 3 * 3)
    assert delta_weight(torch.zeros(2, 4, 3, 3), torch.zeros(5, 2, 1, 1), 0.5).shape == expected


@pytest.mark.parametrize("r", [0, -1, 2.0, True])
def test_a_rank_that_is_no_whole_number_above_zero_is_an_error(r):
    with pytest.raises(
        RankError, match=r"^r must be a whole number of at least 1, got .*\. 8 or 16 is a usual start\.$"
    ):
        scaling(r, 3.0, "alpha/r")


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_is_not_finite_or_not_above_zero_is_an_error(alpha):
    with pytest.raises(ConfigError, match=r"^alpha must be a finite number above 0, got .*\."):
        scaling(4, alpha, "alpha/r")


def test_an_unknown_rule_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError) as error:
        scaling(4, 3.0, "alpha/sqr(r)")
    expected = (
        "scaling rule 'alpha/sqr(r)' is not known; there are alpha/r, alpha/sqrt(r). Did you mean 'alpha/sqrt(r)'?"
    )
    assert str(error.value) == expected
