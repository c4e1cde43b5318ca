"""How fast rows are read and tokenised, and how much memory a large file needs.

    python benchmarks/reading/run.py speed --data DIR --out benchmarks/reading/results/speed.json
    python benchmarks/reading/run.py large --gigabytes 5 --scratch DIR --out benchmarks/reading/results/large.json

`speed` holds lorafit's reading against the `encode_batch` of the library `tokenizers` on the same texts, which are then
read and rendered already. `large` writes a file of chat rows, one of them of 100 MB, and trains some steps on it twice:
the second time the tokens are in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set -> its file below --data. `text` is one running text, cut into rows of 4,000 characters.
SETS = {
    "chat12": "banking77/chat12_train.jsonl",
    "free": "bitext/free_train.jsonl",
    "text": "tinyshakespeare/train.txt",
}
ROWS, REPEATS, TEXT_CHARS = 20_000, 5, 4_000
LOT = 256  # texts that are given to `encode_batch` at a time: as many as lorafit gives it
BIG_ROW_BYTES = 100_000_000
MODEL = "smollm2-135m"


# --- speed ----------------------------------------------------------------------------------------------------------


def speed(given: argparse.Namespace) -> dict[str, Any]:
    return {name: measured(given.scratch / f"{name}.jsonl", rows(given.data / path)) for name, path in SETS.items()}


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """ROWS rows, as many times around as that takes, each a little different, so that no cache helps."""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        found = [{"text": text[at : at + TEXT_CHARS]} for at in range(0, len(text), TEXT_CHARS)]
    else:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number in range(ROWS if "messages" in found[0] else ROWS // 5):
        row = json.loads(json.dumps(found[number % len(found)]))
        if "messages" in row:
            row["messages"][-2]["content"] += f" {number}"
        else:
            row["text"] += f" {number}"
        yield row


def measured(path: Path, made: Iterator[dict[str, Any]]) -> dict[str, Any]:
    from lorafit.data import encode
    from lorafit.data.load import locate
    from lorafit.model import load, spec

    encode.LARGE_BYTES = 1 << 60  # read it each time
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    tokenizer = load.load_tokenizer(spec.read(MODEL))
    source = locate(str(path)).train()
    reading = encode.Reading()
    ready = texts(path, tokenizer)
    stage = Stage(source, tokenizer, reading)
    library: Any = tokenizer.backend_tokenizer

    def by_library() -> int:
        lots = (ready[first : first + LOT] for first in range(0, len(ready), LOT))
        return sum(len(one.ids) for lot in lots for one in library.encode_batch(lot, add_special_tokens=False))

    def whole() -> int:
        return encode.encode_source(source, tokenizer, reading, lambda count: None).set.tokens

    works: dict[str, Callable[[], int]] = {"library_s": by_library, "tokenising_s": stage.run, "whole_s": whole}
    tokens = {name: work() for name, work in works.items()}  # once, to warm up
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begun)
    path.unlink()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "tokenising": median["library_s"] / median["tokenising_s"],
        "whole": median["library_s"] / median["whole_s"],
    }
    return {"rows": len(ready), "chars": sum(map(len, ready)), "tokens": tokens, "seconds": seconds, "ratio": ratios}


def texts(path: Path, tokenizer: Any) -> list[str]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    render = tokenizer.apply_chat_template
    return [render(row["messages"], tokenize=False) if "messages" in row else row["text"] for row in found]


class Stage:
    """Tokenising alone: texts that are read and rendered become ids and masks, each reply verified."""

    def __init__(self, source: Any, tokenizer: Any, reading: Any) -> None:
        from lorafit.data.formats import FormatReader
        from lorafit.data.mask import Marks
        from lorafit.data.tokenise import Tokeniser
        from lorafit.data.turns import drafts

        reader = FormatReader()
        self.drafts = [draft for row in source.rows() for draft in drafts(reader.read(row), tokenizer)]
        self.tokeniser, self.marks = Tokeniser(tokenizer), Marks.of(tokenizer)

    def run(self) -> int:
        from lorafit.data.mask import encode_drafts

        lots = (self.drafts[first : first + LOT] for first in range(0, len(self.drafts), LOT))
        return sum(len(row.input_ids) for lot in lots for row in encode_drafts(lot, self.tokeniser, self.marks))


# --- a large file ---------------------------------------------------------------------------------------------------


def large(given: argparse.Namespace) -> dict[str, Any]:
    scratch = given.scratch / "large_file"
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "rows.jsonl"
    try:
        written = write_large(file, round(given.gigabytes * 1e9))
        runs = [trained(file, scratch, name) for name in ("first", "cached")]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"file": written, "steps": STEPS, "runs": runs}


STEPS = 20


def write_large(path: Path, size: int) -> dict[str, int]:
    """Chat rows of some hundred to some thousand characters of seeded words; in the middle one of 100 MB."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(20_000)]
    written = count = 0
    has_big = False
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            big = not has_big and written > size // 2
            has_big |= big
            reply = (" ".join(source.choices(words, k=1000)) + "\n") * (BIG_ROW_BYTES // 6500 if big else 0)
            reply += " ".join(source.choices(words, k=source.randint(20, 400)))
            question = f"{count}: " + " ".join(source.choices(words, k=source.randint(5, 60)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            line = json.dumps({"messages": messages}) + "\n"
            file.write(line)
            written, count = written + len(line), count + 1
    return {"bytes": written, "rows": count}


def trained(file: Path, scratch: Path, name: str) -> dict[str, Any]:
    """`lorafit train` in a process of its own, with a cache of its own that both runs share."""
    out = scratch / name
    command = [sys.executable, "-m", "lorafit", "train", MODEL, str(file), "-o", str(out), "--max-steps", str(STEPS)]
    command += ["--precision", "bf16"]
    begun = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"LORAFIT_CACHE": str(scratch / "cache")}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    told = json.loads((out / "run.json").read_text())
    cache = sum(path.stat().st_size for path in (scratch / "cache").rglob("*") if path.is_file())
    kept = {key: told[key] for key in ("peak_rss_bytes", "predicted_peak_bytes", "load_s", "train_s")}
    lines = [line for line in done.stderr.splitlines() if line.startswith("train (")]
    return {"name": name, "wall_s": time.perf_counter() - begun, **kept, "cache_bytes": cache, "said": lines}


# --- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("speed", "large"):
        action = actions.add_parser(name)
        action.add_argument("--out", type=Path, required=True, help="the results file")
        action.add_argument(
            "--scratch", type=Path, default=Path("."), help="where files are written, and removed again"
        )
        if name == "speed":
            action.add_argument("--data", type=Path, required=True, help=f"holds {', '.join(SETS.values())}")
        else:
            action.add_argument("--gigabytes", type=float, default=5.0)
    given = parser.parse_args()
    result = (speed if given.action == "speed" else large)(given)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    head = {"commit": commit, "cpus": os.cpu_count(), "machine": platform.machine()}
    given.out.write_text(json.dumps(head | {"result": result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
