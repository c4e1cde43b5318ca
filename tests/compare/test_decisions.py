"""What is dropped, who is tied, what is recommended: from records of which the truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.compare.candidate import candidates
from lorafit.compare.conclude import conclude, front
from lorafit.compare.show import page, remark
from lorafit.errors import ConfigError
from tests.compare.written import run, study


def test_methods_that_are_alike_are_tied_and_the_cheapest_is_recommended(tmp_path: Path) -> None:
    losses = {"lora": 0.5, "ia3": 0.501, "prompt": 0.9}
    found = conclude(run(study(tmp_path, losses, train_s={"lora": 9.0, "ia3": 5.0, "prompt": 1.0})))
    assert found["tied"] == ["lora", "ia3"] and found["recommended"] == "ia3"
    assert "lora and ia3 cannot be told apart" in found["reason"] and "trains fastest" in found["reason"]
    by_name = {method["name"]: method for method in found["methods"]}
    gap = by_name["prompt"]["versus_best"]["loss"]
    assert 0.3 < gap["interval"][0] < gap["value"] < gap["interval"][1] < 0.5
    assert remark(by_name["prompt"], found) == "worse"


def test_the_better_one_is_recommended_where_the_difference_is_real(tmp_path: Path) -> None:
    found = conclude(run(study(tmp_path, {"lora": 0.5, "ia3": 0.7}, train_s={"lora": 90.0, "ia3": 1.0})))
    assert found["tied"] == ["lora"] and found["recommended"] == "lora"
    assert found["reason"].count(". ") == 1 and "worse beyond doubt" in found["reason"]


def test_what_one_seed_cannot_tell_is_said(tmp_path: Path) -> None:
    found = conclude(run(study(tmp_path, {"lora": 0.5, "ia3": 0.7}, seeds=1)))
    assert "as far as one run of each can tell" in found["reason"] and "beyond doubt" not in found["reason"]
    assert any("nothing of other seeds" in note for note in found["notes"])


def test_accuracy_decides_and_the_loss_where_accuracy_cannot(tmp_path: Path) -> None:
    right = {"lora": 0.9, "ia3": 0.3}
    found = conclude(run(study(tmp_path / "a", {"lora": 0.9, "ia3": 0.5}, right=right)))
    assert (found["metric"], found["best"], found["tied"]) == ("accuracy", "lora", ["lora"])
    alike = {"lora": 0.9, "ia3": 0.9}
    found = conclude(run(study(tmp_path / "b", {"lora": 0.9, "ia3": 0.5}, right=alike)))
    assert (found["best"], found["tied"]) == ("ia3", ["ia3"])
    none = {"lora": 0.0, "ia3": 0.0}
    found = conclude(run(study(tmp_path / "c", {"lora": 0.9, "ia3": 0.5}, right=none)))
    assert found["metric"] == "loss" and "no method answered" in found["metric_reason"]


def test_a_base_that_does_as_well_is_recommended(tmp_path: Path) -> None:
    found = conclude(run(study(tmp_path, {"lora": 0.5, "ia3": 0.7}, base=(0.5, 0.0))))
    assert found["recommended"] == "untuned" and "nothing to gain" in found["reason"]


def test_without_a_budget_nothing_is_dropped(tmp_path: Path) -> None:
    one = run(study(tmp_path, {"lora": 0.5, "ia3": 0.7, "prompt": 5.0}))
    assert [len(candidate.runs) for candidate in one.candidates] == [3, 3, 3]


def test_where_time_is_short_the_clearly_worse_go_first_and_are_marked(tmp_path: Path) -> None:
    """Floors 20 s, search 9 x 10, a run 20: three seeds of all would take 180 more, of two 120."""
    losses = {"lora": 0.5, "ia3": 0.502, "prompt": 0.9}
    one = run(study(tmp_path, losses, budget_s=250.0))
    found = conclude(one)
    by_name = {method["name"]: method for method in found["methods"]}
    assert [len(candidate.runs) for candidate in one.candidates] == [3, 3, 0]
    assert by_name["prompt"]["status"] == "dropped" and "above that of lora" in by_name["prompt"]["dropped"]
    assert by_name["prompt"]["quality"] is None and by_name["prompt"]["rates"]
    assert one.budget.spent_s <= 250
    assert "prompt: dropped" in page(found, [])


def test_where_none_is_clearly_worse_all_get_fewer_seeds(tmp_path: Path) -> None:
    one = run(study(tmp_path, {"lora": 0.5, "ia3": 0.501, "prompt": 0.502}, budget_s=250.0))
    assert [len(candidate.runs) for candidate in one.candidates] == [2, 2, 2]
    assert "the time budget left room for 2 of 3 seeds" in one.notes
    assert one.budget.spent_s <= 250


def test_with_hardly_any_time_fewer_rates_are_tried_and_it_is_said(tmp_path: Path) -> None:
    one = run(study(tmp_path, {"lora": 0.5, "ia3": 0.7}, budget_s=100.0, seeds=1))
    assert one.budget.spent_s <= 100
    assert any("fewer learning rates" in note for note in one.notes)
    assert [len(candidate.rates) for candidate in one.candidates] != [3, 3]


def test_with_no_time_at_all_nothing_is_recommended(tmp_path: Path) -> None:
    one = run(study(tmp_path, {"lora": 0.5, "ia3": 0.7}, budget_s=5.0))
    found = conclude(one)
    assert found["recommended"] is None and "--budget" in found["reason"]
    assert [method["status"] for method in found["methods"]] == ["not tried", "not tried"]
    assert json.dumps(found, allow_nan=False) and page(found, [])


def test_a_method_that_fails_is_marked_and_the_others_go_on(tmp_path: Path) -> None:
    one = study(tmp_path, {"lora": 0.5, "ia3": 0.7})
    for path in (tmp_path / "trials" / "ia3").glob("lr-*.json"):
        if not path.name.endswith(".valid.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({**record, "result": None, "refused": "the loss was not finite"}))
    found = conclude(run(one))
    by_name = {method["name"]: method for method in found["methods"]}
    assert (by_name["ia3"]["status"], by_name["ia3"]["dropped"]) == ("failed", "the loss was not finite")
    assert found["recommended"] == "lora"


def test_a_loss_that_is_not_finite_never_wins(tmp_path: Path) -> None:
    one = study(tmp_path, {"lora": 0.5, "ia3": 0.4}, seeds=2)
    path = tmp_path / "trials" / "ia3" / "seed-1.measured.json"
    record = json.loads(path.read_text())
    record["sides"]["test"]["nats"][3] = float("inf")
    path.write_text(json.dumps(record))
    found = conclude(run(one))
    assert found["best"] == "lora" and found["tied"] == ["lora"]
    assert json.dumps(found, allow_nan=False) and page(found, [])


def test_the_front_holds_what_no_other_beats(tmp_path: Path) -> None:
    found = conclude(run(study(tmp_path, {"lora": 0.5, "ia3": 0.9, "prompt": 0.4})))
    # Parameters rise in this order, so ia3 costs more than lora and is worse.
    assert [method["name"] for method in front(found["methods"], "trainable_params")] == ["lora", "prompt"]
    assert "trainable_params" not in next(m for m in found["methods"] if m["name"] == "ia3")["pareto"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lor"], "Did you mean 'lora'"),
        (["lora:dara"], "Did you mean 'dora'"),
        (["lora", "lora:lora"], "twice"),
        (["lora:"], None),
    ],
)
def test_names_are_checked_before_anything_runs(names: list[str], said: str | None) -> None:
    if said is None:
        assert candidates(names)[0].variant == "lora"
        return
    with pytest.raises(ConfigError, match=said):
        candidates(names)
