from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.config import ChatConfig, EvalConfig, MergeConfig, TrainConfig, build, parse_seconds, read_toml
from lorafit.errors import ConfigError

NEEDED = {"model": "m", "data": "d.jsonl", "output": "out"}


def test_a_flag_wins_over_the_file_and_the_file_over_the_default() -> None:
    config, source = build(TrainConfig, {"r": 4, "lr": 0.01}, {**NEEDED, "r": "8"})
    assert (config.r, config.lr, config.epochs) == (8, 0.01, 1)
    assert (source["r"], source["lr"], source["epochs"]) == ("flag", "file", "default")


def test_alpha_is_twice_r_unless_given() -> None:
    assert build(TrainConfig, {}, {**NEEDED, "r": "4"})[0].alpha == 8.0
    assert build(TrainConfig, {}, {**NEEDED, "r": "4", "alpha": "5"})[0].alpha == 5.0
    assert build(TrainConfig, {}, NEEDED)[0].alpha == 2 * build(TrainConfig, {}, NEEDED)[0].r


def test_lists_and_pairs_are_written_with_commas() -> None:
    config, _ = build(TrainConfig, {}, {**NEEDED, "targets": "q_proj, v_proj", "rank_pattern": "q_proj=4,*.mlp.*=2"})
    assert config.targets == ["q_proj", "v_proj"]
    assert config.rank_pattern == {"q_proj": 4, "*.mlp.*": 2}
    assert build(TrainConfig, {}, {**NEEDED, "targets": "re:a{1,2}"})[0].targets == "re:a{1,2}"


@pytest.mark.parametrize(
    ("sentence", "flags"),
    [
        ("--r: Input should be greater than or equal to 1, got '0'", {"r": "0"}),
        ("--r: Input should be a valid integer", {"r": "many"}),
        ("--lr: Input should be a finite number", {"lr": "nan"}),
        ("--precision: Input should be 'auto', 'fp32', 'bf16', 'fp16' or 'int8', got 'int4'", {"precision": "int4"}),
        ("--rank-pattern: expected NAME=VALUE", {"rank_pattern": "q_proj"}),
        ("--dropout: Input should be less than 1", {"dropout": "1"}),
    ],
)
def test_a_bad_value_names_the_flag_and_what_it_got(sentence: str, flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        build(TrainConfig, {}, {**NEEDED, **flags})
    assert sentence in str(error.value)


def test_a_missing_or_misspelt_setting_says_which() -> None:
    with pytest.raises(ConfigError, match=r"data is missing\. Give it on the command line"):
        build(TrainConfig, {}, {"model": "m", "output": "o"})
    with pytest.raises(ConfigError, match=r"unknown setting 'epoch'. Did you mean 'epochs'\?"):
        build(TrainConfig, {"epoch": 3}, NEEDED)


def test_a_config_file_that_is_missing_or_no_toml_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("r = = 3")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ChatConfig, MergeConfig])
def test_every_setting_has_a_help_text(config: type[TrainConfig]) -> None:
    assert [name for name, field in config.model_fields.items() if not (field.description or "").endswith(".")] == []


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("2h", 7200), ("1h30m", 5400)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-5m", "0s", "1.5h", "5 minutes"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        parse_seconds(text, "--budget")
