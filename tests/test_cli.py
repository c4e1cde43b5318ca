from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorafit import cli
from lorafit.config import TrainConfig
from tests import tiny

LORAFIT = [sys.executable, "-m", "lorafit"]
FAST = ["--r", "3", "--alpha", "7", "--precision", "fp32", "--threads", "1", "--batch-size", "4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    model, data = tiny.write_model(directory / "model"), tiny.write_chat(directory / "rows.jsonl", 12)
    return str(model), str(data)


@pytest.fixture(scope="module")
def finished(inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the command line, as a user types it."""
    run = tmp_path_factory.mktemp("runs") / "first"
    done = _typed("train", *inputs, "-o", str(run), *FAST, "--eval", "25%", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    return run


def _typed(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LORAFIT, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


def _called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """The exit code and stderr of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["lorafit", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    code = exit_.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


def _answered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What the command line answers with --json, in this process: starting another takes longer than most answers."""
    monkeypatch.setattr(sys, "argv", ["lorafit", *arguments, "--json"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr()
    assert not exit_.value.code, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_help_and_bad_settings_never_import_torch() -> None:
    watch = "import sys; sys.argv = ['lorafit', *{}]\ntry:\n  from lorafit.cli import main; main()\n"
    watch += "except SystemExit: pass\n"
    wrong = [["train", "m", "d", "-o", "o", "--r", "x"], ["compare", "m", "d", "-o", "o", "--methods", "lor"]]
    for arguments in (["--help"], ["train", "--help"], *wrong, ["compare", "--help"], ["--version"]):
        code = watch.format(arguments) + "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0, arguments


def test_every_setting_of_training_is_an_option_with_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafit", "train", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert [name for name in TrainConfig.model_fields if "--" + name.replace("_", "-") not in text] == ["model", "data"]


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("model is missing. Give it on the command line", []),
        ("--r: Input should be greater than or equal to 1, got '0'", ["--r", "0"]),
        ("no-such-model", ["no-such-model", "{data}"]),
        ("none.jsonl", ["{model}", "none.jsonl"]),
        ("target_modules ['q_porj'] match", ["{model}", "{data}", "--targets", "q_porj"]),
        ("config file none.toml does not exist", ["--config", "none.toml"]),
    ],
)
def test_bad_input_is_one_sentence_with_exit_2_and_no_traceback(
    sentence: str,
    arguments: list[str],
    inputs: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled = [text.format(model=inputs[0], data=inputs[1]) for text in arguments]
    code, printed = _called(capsys, monkeypatch, "train", *filled, "-o", str(tmp_path / "run"), "--precision", "fp32")
    last = printed.splitlines()[-1]
    assert code == 2
    assert last.startswith("lorafit: ")
    assert sentence.replace("target_modules", "targets") in last
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_row_names_its_file_and_line(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps(tiny.chat_row("a", "b")) + '\n{"messages": [\n')
    code, printed = _called(capsys, monkeypatch, "train", inputs[0], str(data), "-o", str(tmp_path / "run"))
    assert code == 2
    assert "bad.jsonl:2" in printed.splitlines()[-1]


def test_a_directory_that_another_process_trains_into_is_refused(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.rundir import RunDir

    with RunDir(tmp_path / "run").lock():
        code, printed = _called(capsys, monkeypatch, "train", *inputs, "-o", str(tmp_path / "run"))
    assert code == 2
    assert "in use by another lorafit process" in printed


def test_an_output_below_a_file_is_one_sentence(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    code, printed = _called(capsys, monkeypatch, "train", *inputs, "-o", str(tmp_path / "file" / "run"))
    assert code == 2
    assert "a part of the path is a file" in printed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_and_resume_finishes(
    number: int, code: int, inputs: tuple[str, str], tmp_path: Path
) -> None:
    command = ["train", *inputs, "-o", str(tmp_path / "run"), *FAST, "--max-steps", "100"]
    process = subprocess.Popen([*LORAFIT, *command], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "all is saved. Run the same command with --resume" in " ".join(errors.split())
    steps = metrics.read_text().count("\n")
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "manifest.json").exists()
    assert not (tmp_path / "run" / "run.json").exists()
    done = _typed(*command, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {steps}" in done.stderr
    assert json.loads(done.stdout)["steps"] == 100


def _limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with a limit of 40 kB a file, as a disk that is nearly full."""
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limit += f"sys.argv = {['lorafit', *arguments]!r}; from lorafit.cli import main; main()"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, timeout=120, env=environment)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(inputs: tuple[str, str], tmp_path: Path) -> None:
    done = _limited("train", *inputs, "-o", str(tmp_path / "run"), *FAST, "--r", "16")
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert "run.json" not in left
    assert not any(name.startswith((".step", ".adapter", "step-")) for name in left)


def test_a_disk_that_fills_while_merging_is_one_sentence_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    done = _limited("merge", str(finished), "-o", str(tmp_path / "merged"))
    assert done.returncode == 2, done.stderr
    assert "the file would exceed the size limit" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_evaluated_talked_to_and_merged_by_its_directory(
    finished: Path, inputs: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(target: str, *more: str) -> dict[str, Any]:
        return _answered(capsys, monkeypatch, "eval", target, inputs[1], "--rows", "4", *more)

    scores = {scale: scored(str(finished), "--scale", scale) for scale in ("0", "1")}
    assert {"loss", "perplexity", "exact_match", "accuracy", "rows"} <= scores["1"].keys()
    assert scores["1"]["loss"] != scores["0"]["loss"]
    assert scored(inputs[0], "--precision", "fp32")["loss"] == scores["0"]["loss"]

    talk = _typed("chat", str(finished), "--max-new-tokens", "5", stdin="What is 3?\n/scale 0.5\n/base\n")
    assert talk.returncode == 0, talk.stderr

    merged = finished.parent / "merged"
    done = _typed("merge", str(finished), "-o", str(merged), "--json")
    assert done.returncode == 0, done.stderr
    assert scored(str(merged), "--precision", "fp32")["loss"] == pytest.approx(scores["1"]["loss"], rel=1e-5)


def test_json_is_alone_on_stdout(finished: Path, inputs: tuple[str, str]) -> None:
    done = _typed("eval", str(finished), inputs[1], "--rows", "2", "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["rows"] == 2
    assert done.stdout.count("\n") == 1


def test_a_setting_that_is_on_can_be_turned_off(
    finished: Path, inputs: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _answered(capsys, monkeypatch, "eval", str(finished), inputs[1], "--rows", "2", "--no-generate")
    assert found["exact_match"] is None


def test_an_unfinished_run_says_how_to_finish_it(
    tmp_path: Path, inputs: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(f'model = "{inputs[0]}"')
    code, printed = _called(capsys, monkeypatch, "eval", str(tmp_path), inputs[1])
    assert code == 2
    assert "holds no finished run" in printed
    assert "--resume" in printed


def test_the_readme_example_on_digits_runs_and_learns(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "digits.py"
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in done.stdout.strip().split("\n\n"):
        lines = part.splitlines()
        rows = {line[:20].strip(): tuple(float(cell.rstrip("%")) for cell in line.split()[-2:]) for line in lines[1:-1]}
        assert rows["LoRA, scale 0.0"] == rows["detached"] == rows["base"]
        assert rows["LoRA, scale 1.0"] == rows["merged"] == rows["loaded"] == rows["LoRA"]
        assert rows["base"][0] > 85 and rows["base"][1] < 15
        assert all(rows[way][1] > 75 for way in ("head alone", "LoRA", "all weights"))
        assert float(lines[-1].split()[-3]) < 1e-3  # merged against unmerged, in float32


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("--methods names 'lor', which is no method. Did you mean 'lora'?", ["--methods", "lora,lor"]),
        ("--budget 'soon' is not a time", ["--budget", "soon"]),
        ("--eval '0%' is not a share", ["--eval", "0%"]),
        ("keep.txt does not exist", ["--keep", "keep.txt"]),
        ("--seeds: Input should be greater than or equal to 1", ["--seeds", "0"]),
    ],
)
def test_bad_settings_of_a_comparison_are_one_sentence_and_leave_nothing(
    sentence: str,
    arguments: list[str],
    inputs: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, printed = _called(capsys, monkeypatch, "compare", *inputs, "-o", str(tmp_path / "c"), *arguments)
    assert code == 2 and sentence in printed.splitlines()[-1] and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []
