"""Changing a setting changes what a run makes or says, beyond the lines that echo the settings."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.config import TrainConfig
from lorafit.errors import LorafitError
from lorafit.run import Start, train
from tests import tiny

BASE: dict[str, Any] = {
    "r": 3,
    "alpha": 7.0,
    "batch_size": 4,
    "precision": "fp32",
    "threads": 1,
    "epochs": 2,
    "eval": "25%",
    "max_steps": None,
}
# Each on top of BASE; where a setting acts only beside another one, that one is given too.
CHANGED: dict[str, dict[str, Any]] = {
    "r": {"r": 2},
    "alpha": {"alpha": 5.0},
    "variant": {"variant": "dora"},
    "targets": {"targets": "q_proj"},
    "layers": {"layers": "last:1"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2.0}},
    "scaling_rule": {"scaling_rule": "alpha/sqrt(r)"},
    "init": {"init": "kaiming"},
    "dropout": {"dropout": 0.3},
    "seed": {"seed": 1},
    "model": {"model": "other"},
    "data": {"data": "other"},
    "output": {"output": "other"},
    "method": {"method": "ia3"},
    "task": {"task": "classify"},
    "pooling": {"pooling": "last", "method": "head", "data": "labelled"},
    "layer": {"layer": 1, "method": "head", "data": "labelled"},
    "probe": {"probe": True, "method": "head", "data": "labelled"},
    "bottleneck": {"bottleneck": 5, "method": "adapter"},
    "virtual_tokens": {"virtual_tokens": 3, "method": "prompt"},
    "prompt_text": {"prompt_text": "Say what it is.", "method": "prompt"},
    "eval": {"eval": "50%"},
    "eval_every": {"eval_every": 1},
    "patience": {"patience": 1, "eval_every": 1, "lr": 1.0, "clip": None},
    "epochs": {"epochs": 3},
    "max_steps": {"max_steps": 1},
    "batch_size": {"batch_size": 3},
    "shuffle": {"shuffle": False},
    "micro_tokens": {"micro_tokens": 60},
    "seq_len": {"seq_len": 40},
    "format": {"format": "text"},
    "rename": {"rename": {"messages": "chat"}},
    "template": {"template": "alpaca"},
    "skip_bad": {"skip_bad": True, "data": "with bad rows"},
    "loss_on": {"loss_on": "all"},
    "add_tokens": {"add_tokens": ["What"]},
    "lr": {"lr": 0.01},
    "rank_schedule": {"rank_schedule": "halving"},
    "head_lr": {"head_lr": 0.01, "method": "lora", "data": "labelled"},
    "lora_plus": {"lora_plus": 4.0},
    "schedule": {"schedule": "cosine"},
    "warmup": {"warmup": 0.6},
    "weight_decay": {"weight_decay": 0.5},
    "beta1": {"beta1": 0.5},
    "beta2": {"beta2": 0.5},
    "clip": {"clip": 1e-4},
    "r_start": {"r_start": 4, "rank_schedule": "adalora"},
    "rank_hold": {"rank_hold": 0.5, "rank_schedule": "adalora"},
    "rank_settle": {"rank_settle": 0.6, "rank_schedule": "adalora"},
    "gate_rate": {"gate_rate": 2.0, "rank_schedule": "adalora"},
    "orthogonality": {"orthogonality": 5.0, "rank_schedule": "adalora"},
    "precision": {"precision": "bf16"},
    "feature_cache": {"feature_cache": "0MiB", "layers": "last:1"},
    "base_storage": {"base_storage": "keep"},
    "save_every": {"save_every": 1},
    "memory": {"memory": "1MiB"},
    "threads": {"threads": 2},
    "trust_remote_code": {"trust_remote_code": True, "model": "with code"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("places")
    with_code = tiny.write_model(directory / "with_code")
    config = json.loads((with_code / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (with_code / "config.json").write_text(json.dumps(config))
    return {
        "model": str(tiny.write_model(directory / "model")),
        "other model": str(tiny.write_model(directory / "other", seed=1)),
        "with code": str(with_code),
        "data": str(tiny.write_chat(directory / "rows.jsonl", 12)),
        "other data": str(tiny.write_chat(directory / "other.jsonl", 13)),
        "labelled": str(tiny.write_labelled(directory / "labelled.jsonl", 12)),
        "with bad rows": str(
            tiny.write_rows(
                directory / "bad.jsonl", [*(tiny.chat_row(f"{n}?", "!") for n in range(12)), {"messages": []}]
            )
        ),
    }


def _made(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Everything a run leaves but times and the echo of its settings; or the sentence with which it was refused."""
    heard = io.StringIO()
    console = Console(file=heard, width=2000)
    try:
        result = train(TrainConfig(**settings), {}, Start(False, False, time.time()), console)
    except LorafitError as error:
        return {"refused": str(error)}
    run = Path(settings["output"])
    timed = ("train_s", "load_s", "prepare_s", "mfu", "peak_rss_bytes", "predicted_train_s")
    return {
        "where": run.name,
        "adapter": next((run / "adapter").glob("*.safetensors")).read_bytes(),
        "result": {key: value for key, value in result.items() if key not in timed},
        "metrics": [{**json.loads(line), "step_s": 0} for line in (run / "metrics.jsonl").read_text().splitlines()],
        "kept": sorted(path.name for path in (run / "checkpoints").glob("*")),
    }


@pytest.fixture(scope="module")
def plain(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("plain")
    return _made({**BASE, **{k: places[k] for k in ("model", "data")}, "output": str(directory / "run")}, directory)


def test_every_setting_has_a_change_here() -> None:
    assert set(CHANGED) == set(TrainConfig.model_fields)


@pytest.mark.parametrize("name", CHANGED)
def test_changing_it_changes_what_a_run_makes(
    name: str, places: dict[str, str], plain: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**BASE, **{k: places[k] for k in ("model", "data")}, "output": str(tmp_path / "run"), **CHANGED[name]}
    for place in ("model", "data"):
        value = settings[place]
        settings[place] = places.get(f"other {place}" if value == "other" else value, value)
    settings["output"] = str(tmp_path / Path(settings["output"]).name)
    made = _made(settings, tmp_path)
    acts_beside = {"method", "rank_schedule"} & set(CHANGED[name])  # such as on that method alone
    if acts_beside and name not in acts_beside:
        usual = {key: value for key, value in settings.items() if key != name}
        plain = _made({**usual, "output": str(tmp_path / "usual" / Path(settings["output"]).name)}, tmp_path)
    if name == "trust_remote_code":
        refused = _made({**settings, "trust_remote_code": False, "output": str(tmp_path / "no")}, tmp_path)
        assert made != refused
    assert made != plain
