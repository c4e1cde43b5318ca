"""What all of `lorafit rank` takes, as it is typed: a share of its rows held out, as by default, on all threads.

    python benchmarks/rank_advice/costs.py --data DIR [--sets chat77] [--rows 400,1000] [--precision fp32] [--times 1]

Nothing else may run meanwhile. results/SET.json gets what each took, and what it said beforehand that its run of all
ranks would take; what is there already (of as many rows, in this precision) is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rank_advice.run import EPOCHS, MODEL, PRECISION, RESULTS, lines_of, revision

from lorafit.plan import machine

# Of rank.json's account of its run.
KEPT = ("wall_s", "train_s", "halving_s", "race", "steps", "expected_s", "precision")


def drawn(data: Path, name: str, count: int, file: Path) -> Path:
    """So many rows of a set in one file, those of all of rank_advice the first of them. Raises SystemExit for fewer."""
    rows = lines_of(data, name)
    if len(rows) < count:
        raise SystemExit(f"{name} has {len(rows)} rows, and {count} are asked for")
    random.Random(0).shuffle(rows)
    file.write_text("\n".join(rows[:count]) + "\n")
    return file


def asked(rows: Path, precision: str, out: Path) -> dict[str, Any]:
    """The command itself: its answer, and the seconds from its start to its end."""
    words = ["rank", MODEL, rows, "-o", out, "--epochs", EPOCHS, "--precision", precision, "--json"]
    words += ["--threads", machine.physical_cores()]
    command = [sys.executable, "-m", "lorafit", *map(str, words)]
    started = time.perf_counter()
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wall_s = time.perf_counter() - started
    found = json.loads(told)
    run = {key: found["run"][key] for key in KEPT}
    own = {key: found[key] for key in ("rows", "recommended_r", "notes", "seconds", "training_s")}
    return own | {"wall_s": wall_s, "run": run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sets", default="chat77")
    parser.add_argument("--rows", type=lambda text: [int(count) for count in text.split(",")], default=[400, 1000])
    parser.add_argument("--precision", default=PRECISION)
    parser.add_argument("--times", type=int, default=1)
    given = parser.parse_args()
    for name in given.sets.split(","):
        file = given.out / f"{name}.json"
        found = json.loads(file.read_text())
        known = found.setdefault("costs", [])
        for count in given.rows:
            alike = [one for one in known if (one["of"], one["run"]["precision"]) == (count, given.precision)]
            for _ in range(given.times - len(alike)):
                with tempfile.TemporaryDirectory(prefix="costs.") as directory:
                    rows = drawn(given.data, name, count, Path(directory) / "rows.jsonl")
                    told = {"of": count} | asked(rows, given.precision, Path(directory) / "ranked") | revision()
                known.append(told)
                file.write_text(json.dumps(found) + "\n")
                print(name, count, told["recommended_r"], told["seconds"], told["wall_s"], flush=True)


if __name__ == "__main__":
    main()
