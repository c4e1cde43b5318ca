from __future__ import annotations

import math

import torch

from lorafit.lora.init import INITS, layer_generator


def test_gaussian_has_a_standard_deviation_of_one_over_r():
    A = INITS["gaussian"]((4, 10_000), layer_generator(0, "layer"))
    error_of_the_estimate = 0.25 / math.sqrt(2 * A.numel())
    assert abs(float(A.std()) - 0.25) < 5 * error_of_the_estimate
    assert abs(float(A.mean())) < 5 * 0.25 / math.sqrt(A.numel())


def test_kaiming_is_uniform_within_one_over_the_root_of_the_fan_in():
    A = INITS["kaiming"]((8, 4, 5, 5), layer_generator(0, "layer"))
    limit = 1 / math.sqrt(100)
    assert float(A.abs().max()) <= limit
    assert float(A.abs().max()) > 0.98 * limit  # (0.98)^800 is 1e-7
    assert abs(float(A.std()) - limit / math.sqrt(3)) < 5 * limit / math.sqrt(A.numel())


def test_the_same_seed_and_name_draw_the_same_and_others_do_not():
    drawn = {
        key: INITS["gaussian"]((2, 3), layer_generator(*key)) for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a.b")]
    }
    assert torch.equal(INITS["gaussian"]((2, 3), layer_generator(0, "a")), drawn[0, "a"])
    assert len({tuple(A.flatten().tolist()) for A in drawn.values()}) == 4


def test_drawing_does_not_touch_the_global_generator():
    expected = torch.get_rng_state()
    INITS["gaussian"]((2, 3), layer_generator(0, "a"))
    assert torch.equal(torch.get_rng_state(), expected)
