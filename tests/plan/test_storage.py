"""Sizes in every type of storage, against files that were really written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.model import spec as model_spec
from lorafit.plan.storage import BLOCK_TYPES, GGUF_FILES, gguf_type, model_bytes, sizes
from lorafit.quant.codecs import CODECS
from tests import tiny


def test_the_real_q4_1_file_has_just_the_predicted_size() -> None:
    spec = model_spec.read("smollm2-135m")
    assert model_bytes(spec, "GGUF Q4_1") == spec.weight_bytes
    assert spec.storage == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}


def test_a_saved_model_has_the_predicted_size(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    assert model_bytes(spec, "fp32") == spec.weight_bytes
    assert 2 * model_bytes(spec, "bf16") == 2 * model_bytes(spec, "fp16") == spec.weight_bytes


def test_bits_are_those_that_the_types_are_known_for() -> None:
    bits = {size.name: size.bits for size in sizes(model_spec.read("smollm2-135m"))}
    assert bits["fp32"] == 32 and bits["bf16"] == 16
    linear, embeddings, norms = 106_168_320, 28_311_552, 35_136
    total = linear + embeddings + norms
    assert bits["GGUF Q8_0"] == pytest.approx((8.5 * (linear + embeddings) + 32 * norms) / total)
    assert bits["GGUF Q4_0"] == pytest.approx((4.5 * linear + 8.5 * embeddings + 32 * norms) / total)
    # QLoRA, section 3: 0.127 bits a weight for the scales, 8 / 64 + 32 / (64 * 256).
    # The last scales of each of the 210 matrices may stand in a group that is not full.
    expected = ((4 + 0.125 + 32 / 2**14) * linear + 16 * (embeddings + norms)) / total
    assert bits["nf4"] == pytest.approx(expected, abs=210 * 32 / total)


def test_the_types_that_can_stay_in_blocks_are_those_with_a_codec() -> None:
    assert tuple(CODECS) == BLOCK_TYPES


def test_k_types_give_way_where_rows_are_no_multiple_of_256_and_some_layers_get_more_bits() -> None:
    spec = model_spec.read("smollm2-135m")  # 576 wide, 1,536 in the middle of its MLPs
    types = {name: gguf_type(spec, "Q4_K_M", name, shape) for name, shape in spec.tensors.items()}
    assert types["model.embed_tokens.weight"] == "Q8_0"
    assert types["model.norm.weight"] == "F32"
    assert types["model.layers.10.self_attn.q_proj.weight"] == "Q5_0"
    assert {types["model.layers.0.mlp.down_proj.weight"], types["model.layers.29.mlp.down_proj.weight"]} == {"Q6_K"}
    assert types["model.layers.4.mlp.down_proj.weight"] == "Q4_K"


def test_every_plain_type_is_smaller_than_the_one_before_it() -> None:
    spec = model_spec.read("smollm2-135m")
    plain = [name for name in GGUF_FILES if "K" not in name]
    found = [model_bytes(spec, f"GGUF {name}") for name in plain]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(plain) == 6
