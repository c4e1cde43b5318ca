"""Every setting of every command, with its default, its bounds and its help text; the only place with defaults.

The docstring of a field is its `--help`. A config is frozen: what a run used is what was resolved before it started.
Sources of a value, later ones winning: default, `--config FILE.toml`, flag.
"""

from lorafit.config.base import Frozen, build, parse_bytes, parse_seconds, read_toml
from lorafit.config.shipping import CombineConfig, ExportConfig, MergeConfig, ScaleConfig, ShrinkConfig
from lorafit.config.training import (
    EPOCHS,
    METHOD_VARIANTS,
    RATES,
    ROUNDED,
    LoRAConfig,
    MethodConfig,
    RowsConfig,
    TrainConfig,
    usual_rate,
)
from lorafit.config.using import (
    ChatConfig,
    CompareConfig,
    DataConfig,
    EvalConfig,
    PlanConfig,
    RankConfig,
    ReportConfig,
    ServeConfig,
    TrialsConfig,
)

__all__ = [
    "EPOCHS",
    "METHOD_VARIANTS",
    "RATES",
    "ROUNDED",
    "ChatConfig",
    "CombineConfig",
    "CompareConfig",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "Frozen",
    "LoRAConfig",
    "MergeConfig",
    "MethodConfig",
    "PlanConfig",
    "RankConfig",
    "ReportConfig",
    "RowsConfig",
    "ScaleConfig",
    "ServeConfig",
    "ShrinkConfig",
    "TrainConfig",
    "TrialsConfig",
    "build",
    "parse_bytes",
    "parse_seconds",
    "read_toml",
    "usual_rate",
]
