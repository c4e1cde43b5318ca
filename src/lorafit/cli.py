"""argv -> config -> one library call -> print. Thin: what is heavy is imported inside its command.

Options are made from the fields of the config classes, so that a default and a help text stand in one place.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lorafit import __version__, process
from lorafit.config import (
    ChatConfig,
    CombineConfig,
    CompareConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    RankConfig,
    ReportConfig,
    ScaleConfig,
    ServeConfig,
    ShrinkConfig,
    TrainConfig,
    build,
    read_toml,
)
from lorafit.errors import LorafitError
from lorafit.options import options_of

app = typer.Typer(
    name="lorafit",
    help="Fine-tune models by low-rank adaptation (LoRA) on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; logs go to stderr.")]


@app.command(rich_help_panel="Find, prove, train")
@options_of(TrainConfig, ("model", "data"))
def train(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file of settings, such as a run's run.toml; flags win.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; starts fresh where there is none.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the plan says that it does not fit.")] = False,
    as_json: JSON = False,
) -> None:
    """Fine-tune MODEL on DATA and write a run directory.

    lorafit train smollm2-135m messages.jsonl -o runs/first

    lorafit train ./llama-3.2-1b train.jsonl -o runs/b --r 8 --targets q_proj,v_proj --eval 10% --epochs 3

    lorafit train --config runs/first/run.toml -o runs/again
    """
    resolved, source = build(TrainConfig, read_toml(config) if config else {}, given)

    from lorafit.run import Start, train

    result = train(resolved, source, Start(resume, force, PROCESS_STARTED_AT), _log())
    if as_json:
        _print_json(result)


@app.command("data", rich_help_panel="Find, prove, train")
@options_of(DataConfig, ("data",))
def look_at_data(given: dict[str, Any], as_json: JSON = False) -> None:
    """Show what a model would really be trained on: masks in colour, lengths, duplicates, leaks, every bad row.

    lorafit data messages.jsonl --model smollm2-135m

    lorafit data train.csv --model smollm2-135m --rename question=prompt,answer=completion --against test.csv

    lorafit data big.jsonl.gz --model smollm2-135m --skip-bad --html report.html
    """
    resolved, _ = build(DataConfig, {}, given)

    from lorafit.look import look

    result = look(resolved, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Find, prove, train")
@options_of(PlanConfig, ("model", "data"))
def plan(given: dict[str, Any], as_json: JSON = False) -> None:
    """Size, memory, operations and time of training MODEL on DATA, before anything is loaded.

    lorafit plan smollm2-135m messages.jsonl

    lorafit plan ./llama-3.2-1b --seq-len 1024 --rows 5000 --epochs 2 --memory 8GiB

    lorafit plan ./llama-3-70b --html plan.html        (its config.json alone will do)
    """
    resolved, _ = build(PlanConfig, {}, given)

    from lorafit.planning import plan as predict

    result = predict(resolved, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Find, prove, train")
@options_of(CompareConfig, ("model", "data"))
def compare(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a comparison that was stopped.")] = False,
    as_json: JSON = False,
) -> None:
    """Which method for DATA, and is the difference real: trains each, with a rate of its own and several seeds.

    lorafit compare smollm2-135m messages.jsonl -o compared --budget 20m

    lorafit compare smollm2-135m messages.jsonl -o compared --methods lora,lora:dora,prefix --seeds 2 --eval test.jsonl
    """
    resolved, _ = build(CompareConfig, {}, given)

    from lorafit.compare.line import compare

    result = compare(resolved, resume, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Find, prove, train")
@options_of(RankConfig, ("model", "data"))
def rank(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was stopped.")] = False,
    as_json: JSON = False,
) -> None:
    """Which rank for DATA: how far the rows are from what MODEL knows, and one run that serves at every rank.

    lorafit rank smollm2-135m messages.jsonl -o ranked

    lorafit rank smollm2-135m messages.jsonl -o ranked --max-r 32 --eval valid.jsonl

    lorafit rank smollm2-135m messages.jsonl -o ranked --verify        (trains what is advised, and its neighbours)
    """
    resolved, _ = build(RankConfig, {}, given)

    from lorafit.rank.line import rank

    result = rank(resolved, resume, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Find, prove, train")
@options_of(ReportConfig, ("directory",))
def report(given: dict[str, Any], as_json: JSON = False) -> None:
    """One page on a run: curves, what was trained layer by layer, predicted and measured, answers before and after.

    lorafit report runs/first

    lorafit report runs/first -o first.html --samples 0        (needs no model)

    lorafit report compared        (the page of a comparison, of a search of the rank, of a look at the scale)
    """
    resolved, _ = build(ReportConfig, {}, given)

    from lorafit.showing import report

    result = report(resolved, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command("eval", rich_help_panel="Use")
@options_of(EvalConfig, ("target", "data"))
def evaluate(given: dict[str, Any], as_json: JSON = False) -> None:
    """Loss, perplexity, exact match and accuracy of a run or a model on DATA.

    lorafit eval runs/first test.jsonl

    lorafit eval runs/first test.jsonl --scale 0        (the base model, for comparison)

    lorafit eval smollm2-135m test.jsonl --rows 100 --json
    """
    resolved, _ = build(EvalConfig, {}, given)

    from lorafit import use

    result = use.evaluate(resolved, _log())
    if as_json:
        _print_json(result)
    else:
        use.print_evaluation(result, Console())


@app.command(rich_help_panel="Use")
@options_of(ChatConfig, ("target",))
def chat(given: dict[str, Any]) -> None:
    """Talk to a run or a model. While it runs: /scale 0.5, /base, /reset, /help.

    lorafit chat runs/first

    lorafit chat runs/first --scale 1.3 --temperature 0.7
    """
    resolved, _ = build(ChatConfig, {}, given)

    from lorafit import use

    use.chat(resolved, _log(), sys.stdin, sys.stdout)


@app.command(rich_help_panel="Use")
@options_of(ServeConfig, ("runs",))
def serve(given: dict[str, Any], as_json: JSON = False) -> None:
    """Answer requests over HTTP as OpenAI's API does: runs of one base model, each under its name, and the base.

    lorafit serve runs/first

    lorafit serve runs/law tone=runs/tone/second --port 9000 --parallel 4

    lorafit serve runs/first --host 0.0.0.0 --token-file token.txt
    """
    resolved, _ = build(ServeConfig, {}, given)

    from lorafit.serve import serve as run

    # Flushed: who waits for this line reads it through a pipe.
    run(resolved, _log(), lambda up: print(json.dumps(up.facts), flush=True) if as_json else None)


@app.command(rich_help_panel="Ship")
@options_of(MergeConfig, ("run",))
def merge(given: dict[str, Any], as_json: JSON = False) -> None:
    """Add a run's update to its base model and write a plain Hugging Face model, or the GGUF file again.

    lorafit merge runs/first -o merged

    lorafit merge runs/first -o merged-bf16 --dtype bf16 --scale 0.8 --data test.jsonl

    lorafit merge runs/first -o tuned.gguf --into same
    """
    resolved, _ = build(MergeConfig, {}, given)

    from lorafit import ship

    result = ship.merge(resolved, _log())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Use")
@options_of(ScaleConfig, ("run",))
def scale(given: dict[str, Any], as_json: JSON = False) -> None:
    """Loss on the task, and on what should not be forgotten, from scale 0 (the base) to 2; marks the best trade.

    lorafit scale runs/first --task test.jsonl --keep book.txt -o scales

    lorafit scale runs/first --task test.jsonl -o scales --scales 0,0.5,1,1.5
    """
    resolved, _ = build(ScaleConfig, {}, given)

    from lorafit import adapters

    result = adapters.scale(resolved, _log(), None if as_json else Console())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Ship")
@options_of(CombineConfig, ("adapters",))
def combine(given: dict[str, Any], as_json: JSON = False) -> None:
    """Add up adapters of one base model, each with a weight, and write the sum as one adapter.

    lorafit combine runs/law runs/tone --weights 0.7,0.3 -o both

    lorafit combine runs/law runs/tone --how svd --r 16 -o both

    lorafit combine runs/law --weights -1 -o without-law        (the update taken away)
    """
    resolved, _ = build(CombineConfig, {}, given)

    from lorafit import adapters

    result = adapters.combine(resolved, _log())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Ship")
@options_of(ShrinkConfig, ("run",))
def shrink(given: dict[str, Any], as_json: JSON = False) -> None:
    """Bring an adapter to a lower rank, as near to what it was as that rank can be, and say what is lost.

    lorafit shrink runs/first --r 4 -o small

    lorafit shrink runs/first --r 4 -o small --data test.jsonl        (with the loss before and after)
    """
    resolved, _ = build(ShrinkConfig, {}, given)

    from lorafit import adapters

    result = adapters.shrink(resolved, _log())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Ship")
@options_of(ExportConfig, ("run",))
def export(given: dict[str, Any], as_json: JSON = False) -> None:
    """Write a run for other programs: llama.cpp, Ollama, and what reads PEFT's format.

    lorafit export runs/first -o tuned.gguf --type q8_0

    lorafit export runs/first --format gguf-lora -o adapter.gguf

    lorafit export runs/first --format ollama -o first-ollama --type q4_k_m

    lorafit export runs/first --format peft -o first-peft
    """
    resolved, _ = build(ExportConfig, {}, given)

    from lorafit import ship

    result = ship.export(resolved, _log())
    if as_json:
        _print_json(result)


@app.command(rich_help_panel="Start here")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the run.")] = Path("runs/demo"),
    as_json: JSON = False,
) -> None:
    """Train SmolLM2-135M for a customer service, on data that comes with lorafit, and show base against tuned.

    lorafit demo
    """
    from lorafit.demo.run import demonstrate

    result = demonstrate(output, PROCESS_STARTED_AT, _log(), Console(stderr=as_json, soft_wrap=True))
    if as_json:
        _print_json(result)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _log() -> Console:
    """Logs go to stderr; a long line is left to the terminal, so that it can be copied and searched."""
    return Console(stderr=True, soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


PROCESS_STARTED_AT = process.started_at()


def main() -> None:
    """Run the command line. Exits 0 when all went well, 2 where the user can mend it, 1 for our own faults."""
    process.prepare()
    try:
        app()
    except LorafitError as error:
        print(f"lorafit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("lorafit: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
