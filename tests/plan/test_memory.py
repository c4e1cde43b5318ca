from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lorafit.config import MethodConfig, TrainConfig
from lorafit.methods import spectral
from lorafit.methods.table import METHODS
from lorafit.model import spec as model_spec
from lorafit.plan import counts, machine, memory, trained
from lorafit.train.setup import precision_that_fits
from tests import tiny

MIB = 1 << 20


def _config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", "r": 3, "alpha": 7.0, **settings})  # type: ignore[arg-type]  # of several types


def test_the_predicted_trainable_count_is_the_actual_one(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    model = tiny.llama()
    attached = METHODS["lora"].attach(model, _config())
    assert attached.trainable_params == counts.lora_params(spec, 3)
    assert attached.total_params == spec.parameters


def test_the_peak_is_the_sum_of_its_parts_and_grows_with_tokens(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    small = memory.estimate(
        spec, trained.of(spec, MethodConfig(r=3)), "fp32", tokens=100, supervised=10, recompute=False
    )
    large = memory.estimate(
        spec, trained.of(spec, MethodConfig(r=3)), "fp32", tokens=200, supervised=20, recompute=False
    )
    assert small.peak_bytes == sum(small.parts.values())
    assert large.parts["activations"] == 2 * small.parts["activations"]
    assert large.parts["logits"] == 2 * small.parts["logits"]
    assert large.parts["weights"] == small.parts["weights"]


def test_logits_are_never_all_in_memory(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    many = memory.estimate(
        spec, trained.of(spec, MethodConfig(r=3)), "bf16", tokens=10_000, supervised=10_000, recompute=False
    )
    assert many.parts["logits"] == 256 * spec.vocab * 2


def test_bf16_and_int8_take_a_quarter_of_fp32_with_its_packed_copies(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    embeddings = spec.vocab * spec.hidden + 5 * spec.hidden  # tied head; five norms
    blocks = spec.parameters - embeddings
    parts = {
        p: memory.estimate(spec, trained.of(spec, MethodConfig(r=3)), p, 999, 1, False).parts["weights"]
        for p in ("fp32", "bf16", "int8")
    }
    assert parts == {
        "fp32": 8 * blocks + 4 * embeddings,
        "bf16": 2 * blocks + 2 * embeddings,
        "int8": 2 * blocks + 2 * embeddings,  # activations take more than calibration did
    }


def test_what_int8_is_made_from_counts_where_it_is_the_peak(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    spec = model_spec.read(str(tmp_path / "model"))
    large = dataclasses.replace(spec, tensors={k: tuple(64 * n for n in v) for k, v in spec.tensors.items()})
    one, many = (
        memory.estimate(large, trained.of(large, MethodConfig(r=3)), "int8", n, 1, recompute=False)
        for n in (memory.CALIBRATION_TOKENS, 999_999)
    )
    assert one.parts["weights"] > many.parts["weights"]


def test_bf16_is_taken_where_what_is_faster_does_not_fit_and_bf16_does(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    spec = model_spec.read(str(tmp_path / "model"))
    large = dataclasses.replace(spec, tensors={k: tuple(64 * n for n in v) for k, v in spec.tensors.items()})
    config, adds = TrainConfig(model="m", data="d", output="o", r=3), trained.of(large, MethodConfig(r=3))
    few = memory.LEAST_MICRO_TOKENS
    peaks = {
        name: memory.estimate(large, adds, name, few, few, recompute=True).peak_bytes
        for name in ("fp32", "bf16", "int8")
    }
    for fastest in ("int8", "fp32"):
        between = (peaks["bf16"] + peaks[fastest]) / 2
        limits = {"bf16": between, fastest: peaks[fastest] + 1}
        for expected, peak in limits.items():
            assert precision_that_fits(large, config, fastest, round(peak / memory.MARGIN), adds) == expected
        # Where neither fits, what is said is of the fastest.
        assert precision_that_fits(large, config, fastest, peaks["bf16"], adds) == fastest


def test_recomputing_layers_keeps_less(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    kept, again = (
        memory.activation_bytes(spec, 21, "bf16", 100, recompute, depth=spec.layers) for recompute in (False, True)
    )
    assert again < kept


def test_a_part_of_the_layers_keeps_and_trains_that_part_alone(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    whole, part = (MethodConfig(method="full", layers=layers) for layers in (None, "last:1"))
    model = tiny.llama()
    attached = METHODS["full"].attach(model, part)
    assert counts.method_params(spec, part) == attached.trainable_params < spec.parameters
    all_of_it, some = (trained.of(spec, config) for config in (whole, part))
    assert (all_of_it.depth, some.depth, all_of_it.frozen) == (2, 1, 0)
    blocks = sum(a * b for a, b in counts.block_weights(spec).values())
    assert some.frozen == some.unreached == blocks // 2
    # The layer below is packed once: no gradient goes through it.
    parts = memory.estimate(spec, some, "fp32", 999, 1, False).parts
    assert parts["weights"] == 4 * spec.parameters
    # The values before the first step are fewer than the activations that are gone by then.
    assert parts["adapter"] == 3 * 4 * attached.trainable_params


def test_starts_that_take_a_product_out_of_the_weights_keep_its_factors(tmp_path: Path) -> None:
    assert trained.MOVING == spectral.MOVING
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    plain, moved = (trained.of(spec, MethodConfig(r=3, init=init)) for init in ("gaussian", "pissa"))
    before, after = (memory.estimate(spec, one, "bf16", 9, 1, False).parts["adapter"] for one in (plain, moved))
    assert after - before == 4 * plain.params


def test_an_evaluation_keeps_the_best_and_has_a_whole_chunk_of_logits(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    adds = dataclasses.replace(trained.of(spec, MethodConfig(r=3)), evaluated=True)
    few, many = (memory.estimate(spec, adds, "bf16", 999, n, False).parts for n in (100, 999))
    assert many["evaluation"] == 4 * adds.params
    assert few["evaluation"] + few["logits"] == many["evaluation"] + many["logits"]


def test_the_process_knows_its_memory_and_the_machine_its_own() -> None:
    before = machine.peak_rss_bytes()
    block = bytearray(64 * MIB)
    assert machine.peak_rss_bytes() >= before
    assert machine.peak_rss_bytes() >= machine.rss_bytes() - MIB
    assert len(block) <= machine.rss_bytes()
    assert machine.available_bytes() > 0
    assert machine.physical_cores() >= 1


@pytest.mark.parametrize(
    ("given", "threads"),
    [("3", 3), ("2,4", 2), ("9", 4), ("", 4), ("0", 4), ("-1", 4), ("many", 4), ("\N{SUPERSCRIPT TWO}", 4)],
)
def test_threads_are_one_a_core_or_as_few_as_openmp_is_told(
    given: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert machine.usual_threads() == threads


@pytest.mark.parametrize("part", ["runtime", "weights", "adapter", "activations", "logits", "workspace"])
def test_the_description_names_every_part(part: str, tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    assert part in memory.estimate(spec, trained.of(spec, MethodConfig(r=3)), "fp32", 1, 1, False).describe()
