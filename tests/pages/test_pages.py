"""Every page as a browser draws it: on a wide screen and a phone's, light and dark."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.compare.conclude import conclude
from lorafit.config import DataConfig, PlanConfig, ReportConfig, TrainConfig
from lorafit.look import look
from lorafit.model.spec import read
from lorafit.planning import plan
from lorafit.run import Start, train
from lorafit.showing import report
from tests import tiny
from tests.compare import written
from tests.pages.browser import CHROMIUM, SCHEMES, WIDTHS, found_in
from tests.rank import written as written_ranks

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
NAMES = ("data", "plan", "run", "comparison", "rank", "scale")
LONG = "a/path/that/is/much/longer/than/any/phone/is/wide/and/has/no/place/at/which/a/line/could/be/broken"
# Everything that must not be: it shows that what is looked for would be found.
BAD = """<!doctype html><html><head><style>body{color:#aaa;background:#bbb}</style></head>
<body><p style="width:3000px">faint</p><svg></svg><img src="http://127.0.0.1:9/none.png">
<script>console.error("told"); none()</script></body></html>"""


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run_page(directory: Path) -> str:
    """Of a run with evaluations, a system message too long for a line, and answers."""
    rows = [tiny.chat_row(f"What is {n}?", f"{n} is {n * 7}") for n in range(12)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": LONG})
    tiny.write_rows(directory / "rows.jsonl", rows)
    config = TrainConfig(
        model=str(directory / "model"), data=str(directory / "rows.jsonl"), output=str(directory / "run"), r=3,
        alpha=7.0, batch_size=4, max_steps=6, eval="25%", eval_every=2, precision="fp32", threads=1,
    )  # fmt: skip
    train(config, {"r": "flag"}, Start(False, False, time.time()), quiet())
    report(ReportConfig(directory=str(directory / "run"), samples=2, threads=1), quiet(), None)
    return (directory / "run" / "report.html").read_text()


def comparison_page(directory: Path) -> str:
    study = written.run(written.study(directory, {"lora": 0.3, "prefix": 0.5, "ia3": 0.52}))
    (directory / "compare.json").write_text(json.dumps(conclude(study)))
    report(ReportConfig(directory=str(directory)), quiet(), None)
    return (directory / "report.html").read_text()


def rank_page(directory: Path, model: str) -> str:
    found = written_ranks.found(read(model), {1: 0.5, 2: 0.31, 4: 0.3, 8: 0.299}, LONG)
    own = {"run": "r-4/lr-0.004", "lr": 0.004, "loss": 0.3, "tried": [{"lr": lr, "loss": 0.3} for lr in (0.002, 0.004)]}
    trials = {str(found["recommended_r"]): own, "ranks by layer": own}
    found["verified"] = {
        "trials": trials,
        "regret": 0.01,
        "best_r": 8,
        "gap": 0.1,
        "gap_standard_error": 0.1,
    }
    directory.mkdir()
    (directory / "rank.json").write_text(json.dumps(found))
    report(ReportConfig(directory=str(directory)), quiet(), None)
    return (directory / "report.html").read_text()


def scale_page(directory: Path) -> str:
    points = [{"scale": n / 4, "task": 1 / (1 + n), "keep": 2 + n / 10} for n in range(5)]
    found = {"run": LONG, "task": "t.jsonl", "keep": "k.txt", "forgetting": 1.0, "points": points, "best": 0.5}
    directory.mkdir()
    (directory / "scale.json").write_text(json.dumps(found))
    report(ReportConfig(directory=str(directory)), quiet(), None)
    return (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("pages")
    model = str(tiny.write_model(directory / "model"))
    run = run_page(directory)
    data, planned = directory / "data.html", directory / "plan.html"
    look(DataConfig(data=str(directory / "rows.jsonl"), model=model, html=str(data)), quiet(), None)
    plan(PlanConfig(model=model, html=str(planned), gpu="l4"), quiet(), None)
    return {
        "data": data.read_text(),
        "plan": planned.read_text(),
        "run": run,
        "comparison": comparison_page(directory / "compared"),
        "rank": rank_page(directory / "ranked", model),
        "scale": scale_page(directory / "scaled"),
    }


@pytest.fixture(scope="module")
def found(pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    return found_in(pages | {"bad": BAD}, tmp_path_factory.mktemp("browser"))


CASES = [(name, size, scheme) for name in NAMES for size in WIDTHS for scheme in SCHEMES]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_page_is_as_wide_as_its_screen_readable_whole_and_needs_nothing_else(
    case: tuple[str, str, str], found: dict[tuple[str, str, str], Any], pages: dict[str, str]
) -> None:
    own = found[case]
    assert own.get("failed") is None and own["width"] > 0.9 * WIDTHS[case[1]]
    assert own["overflow"] == 0
    assert own["texts"] > 20 and own["faint"] == []
    assert (own["requests"], own["errors"]) == ([], [])
    pictures = {"data": 0, "plan": 0, "run": 5, "comparison": 3, "rank": 3, "scale": 1}
    assert own["empty"] == 0 and own["pictures"] == pictures[case[0]]
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script", pages[case[0]])


@pytest.mark.parametrize("name", NAMES)
def test_every_colour_that_a_page_names_is_there(name: str, pages: dict[str, str]) -> None:
    named, given = (set(re.findall(pattern, pages[name])) for pattern in (r"var\((--\w+)", r"(--\w+):"))
    assert named and named <= given


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_light_or_dark_as_the_reader_has_it(name: str, found: dict[tuple[str, str, str], Any]) -> None:
    for size in WIDTHS:
        assert found[name, size, "light"]["paper"] == "rgb(252, 252, 250)"
        assert found[name, size, "dark"]["paper"] == "rgb(22, 22, 22)"


def test_a_bad_page_would_be_seen(found: dict[tuple[str, str, str], Any]) -> None:
    bad = found["bad", "phone", "light"]
    assert bad["overflow"] > 2000 and len(bad["faint"]) == 1 and bad["empty"] == 2 and len(bad["requests"]) == 1
    assert any("told" in error for error in bad["errors"]) and any("none" in error for error in bad["errors"])
