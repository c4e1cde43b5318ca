"""`lorafit demo`: the main job on the data set that ships here, base against tuned, in a few minutes."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafit import use
from lorafit.config import EvalConfig, TrainConfig, build
from lorafit.files import write_json
from lorafit.run import Start, train
from lorafit.units import format_bytes, format_count, format_seconds, format_share

MODEL = "smollm2-135m"
# 140 short steps. With half as many, one message in four had a wrong urgency (docs/log.md).
SETTINGS = {"epochs": 2, "batch_size": 8}
METRICS = ("exact_match", "valid_json", "loss")


def demonstrate(output: Path, started_at: float, log: Console, console: Console) -> dict[str, Any]:
    """Train, evaluate base and tuned on unseen rows, print both, write demo.json into the run. Returns its content.

    log gets the progress, console the result. A finished run at `output` is evaluated again, not trained again. Raises
    LorafitError for what the user can mend.
    """
    with as_file(files("lorafit.demo")) as directory:
        settings = {"model": MODEL, "data": str(directory / "train.jsonl"), "output": str(output), **SETTINGS}
        config, source = build(TrainConfig, settings, {})
        # A demo that was interrupted goes on, and one that is there already is shown again.
        run = train(config, source, Start(resume=output.exists(), force=False, started_at=started_at), log)
        scored = {
            name: use.evaluate(
                EvalConfig(target=str(output), data=str(directory / "test.jsonl"), scale=scale, samples=1), log
            )
            for name, scale in (("base", 0.0), ("tuned", 1.0))
        }
    result = {
        **{name: {metric: score[metric] for metric in METRICS} for name, score in scored.items()},
        **{key: run[key] for key in ("train_s", "peak_rss_bytes", "trainable_params", "total_params", "steps")},
        "test_rows": scored["tuned"]["rows"],
    }
    write_json(output / "demo.json", result)
    _print(output, result, scored, console)
    return result


def _print(output: Path, result: dict[str, Any], scored: dict[str, Any], console: Console) -> None:
    console.print(f"\nOn {result['test_rows']} customer messages of wordings and products that training never shows:")
    table = Table()
    for column in ("", "exact match", "valid JSON", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("base", "tuned"):
        row = result[name]
        table.add_row(name, f"{row['exact_match']:.1%}", f"{row['valid_json']:.1%}", f"{row['loss']:.3f}")
    console.print(table)
    share = format_share(result["trainable_params"], result["total_params"])
    console.print(f"trainable parameters  {format_count(result['trainable_params'])} ({share} of the model)")
    console.print(f"peak memory           {format_bytes(result['peak_rss_bytes'])}")
    console.print(f"training took         {format_seconds(result['train_s'])}\n", highlight=False)
    sample = {name: scored[name]["samples"][0] for name in scored}
    console.print(f"message   {sample['base']['prompt']}", markup=False, highlight=False)
    console.print(f"base      {sample['base']['got']}", markup=False, highlight=False)
    console.print(f"tuned     {sample['tuned']['got']}\n", markup=False, highlight=False)
    console.print("Next:")
    for command in (
        f"lorafit chat {output}  # /scale 0.5 turns it down, /base answers with both",
        f"lorafit merge {output} -o {output}-merged  # a plain model, with no overhead",
        f"lorafit train {MODEL} YOUR.jsonl -o runs/first",
    ):
        console.print(f"  .venv/bin/{command}", markup=False, highlight=False)
