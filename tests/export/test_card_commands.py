"""What stands in a model card to be copied works: the commands of a real run's card are run where it lies."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.config import TrainConfig
from lorafit.export import peft as own_peft
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.run import Start, train
from tests import tiny

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
SETTINGS: dict[str, Any] = {"r": 3, "alpha": 7.0, "max_steps": 2, "precision": "fp32", "threads": 1, "lr": 0.05}


def a_run(directory: Path, **more: Any) -> Path:
    model = tiny.write_model(directory / "model")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    data, held_out = tiny.write_chat(directory / "rows.jsonl", 8), tiny.write_chat(directory / "held out.jsonl", 3)
    given = {"model": str(model), "data": str(data), "eval": str(held_out), "output": str(directory / "run")}
    train(TrainConfig(**given, **SETTINGS, **more), {}, Start(False, False, time.time()), Console(quiet=True))
    return directory / "run"


def blocks(card: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"bash": [], "python": []}
    for kind, text in BLOCK.findall(card.read_text()):
        found[kind] += text.splitlines() if kind == "bash" else [text]
    return found


def run_all(lines: list[str]) -> list[str]:
    """Run what is lorafit's; of other programs the files that are named must be there. Returns the others."""
    others = []
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if program == "lorafit":
            done = CliRunner().invoke(app, words, input="/quit\n")
            assert done.exit_code == 0, (line, done.output, done.exception)
        else:
            files = [
                word.partition(":")[0] for word in words if word.partition(":")[0].endswith((".gguf", "Modelfile"))
            ]
            assert all(Path(file).is_file() for file in files), line
            others.append(line)
    return others


@torch.no_grad()
def same_logits(model: Any, run: Path) -> bool:
    theirs = model_load.load(model_spec.read(str(run.parent / "model")), torch.float32).model
    own_peft.load(theirs, run / "adapter")
    ids = torch.arange(2, 42).view(2, 20)
    return torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_every_command_of_a_card_works_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    card = (run / "README.md").read_text()
    assert 'license: "mit"' in card and "held out.jsonl" in card
    monkeypatch.chdir(run)
    found = blocks(run / "README.md")
    others = run_all(found["bash"])
    assert [line.split()[0] for line in others] == ["llama-cli", "llama-cli", "ollama", "ollama"]
    (code,) = found["python"]
    names: dict[str, Any] = {}
    exec(code, names)
    assert same_logits(names["model"].eval(), run)


def test_the_card_of_an_exported_adapter_works_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA, and tokens of its own: no adapter file for llama.cpp, and none is offered."""
    run = a_run(tmp_path, variant="dora", add_tokens=["<call>"])
    out = tmp_path / "shared"
    done = CliRunner().invoke(app, ["export", str(run), "--format", "peft", "-o", str(out)])
    assert done.exit_code == 0, done.output
    card = (out / "README.md").read_text()
    assert "Merged only: the adapter is of variant dora" in card and "gguf-lora" not in card
    monkeypatch.chdir(out)
    found = blocks(out / "README.md")
    run_all(found["bash"])
    names: dict[str, Any] = {}
    exec(found["python"][0], names)
    assert same_logits(names["model"].eval(), run)
