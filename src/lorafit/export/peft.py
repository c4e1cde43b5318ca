"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, written and read.

Written for, and held against, PEFT 0.21. PEFT itself is not imported. `peft_names.py` says which modules a file means,
`peft_tensors.py` which tensors it holds.

What PEFT computes otherwise: its lora_A of a convolution has no dilation, no groups and no padding mode, and where one
module stands in several places it adapts the first alone. Such an adapter is saved all the same, with `peft_type` set
to `LORAFIT_LORA`, so that PEFT stops at that name instead of computing something else; `load` takes both.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

from lorafit import files
from lorafit.config import LoRAConfig
from lorafit.errors import AdapterError, TargetError, listed
from lorafit.export.peft_names import Targets, exact_pattern, exact_targets, own_patterns, pattern_value, resolve
from lorafit.export.peft_tensors import from_peft, read_tensors, to_peft
from lorafit.export.peft_tokens import grow_for, read_tokens, split_tokens, tokens_of, tokens_to_peft
from lorafit.export.peft_whole import read_whole, split_whole, whole_groups, whole_to_peft
from lorafit.lora.base import Conv
from lorafit.lora.inject import detach, load_adapter_state, lora_layers
from lorafit.lora.layer import LoRALayer
from lorafit.lora.tokens import attach_rows, token_rows
from lorafit.lora.whole import attach_whole, whole_modules
from lorafit.methods import lora
from lorafit.methods.spectral import MOVING

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

PEFT_TYPE = "LORA"
OWN_TYPE = "LORAFIT_LORA"  # what PEFT has no layer for
NO_BIAS = "none"
MOST_ALPHA_PER_RANK = 1e6

PEFT_TIES = ("embed_tokens", "lm_head")

# The first of a value is what a file is read as: variants that only train LoRA otherwise are saved as LoRA.
USE_DORA = {"lora": False, "dora": True, "lora-fa": False, "vera": False}
USE_RSLORA = {"alpha/r": False, "alpha/sqrt(r)": True}
# PEFT's inits that leave the base weights as they are. All others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract something
# from them, which the file does not hold.
INITS: dict[Any, str] = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
}
# What starts from rounding is told as PEFT's default: under its own name PEFT would want to do it once more.
WRITTEN_INIT: dict[str, bool | str] = {"gaussian": "gaussian", "kaiming": True, "loftq": True, "qera": True}
WRITTEN_INIT |= dict.fromkeys(("pissa", "olora", "eva", "lora-ga"), True)

READ = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora",
    "init_lora_weights", "ensure_weight_tying", "bias", "trainable_token_indices", "modules_to_save",
}  # fmt: skip
# Fields that do not change what a trained adapter computes.
WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, checked. base: the model it was trained on, as whoever saved it called it.

    peft_type: `LORA`, or `LORAFIT_LORA` for what PEFT computes otherwise. ranks, alphas: PEFT's patterns, in order.
    ties: modules that share a weight share their adapter. task: PEFT's task type. tokens: module, or the end of its
    name -> tokens whose rows are trained in it; "" for the input embedding. whole: ends of names of modules that are
    replaced whole.
    """

    peft_type: str
    base: str | None
    task: str | None
    targets: Targets
    r: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    scaling_rule: str
    variant: str
    init: str
    dropout: float
    ties: bool
    tokens: dict[str, list[int]]
    whole: list[str]


# --- writing --------------------------------------------------------------------------------------------------------


def save(model: nn.Module, directory: Path, config: LoRAConfig, base: str, tokenizer: Any | None) -> None:
    """Write the model's adapter to `directory`, all of it or nothing; an older adapter there is replaced.

    config: what the adapter was attached with; targets, layers and patterns are written as the exact modules they came
    to. base: where PEFT finds the model. tokenizer: saved beside it, with its chat template, unless None.
    Raises AdapterError if there is no adapter or PEFT has no such variant, RunDirError if it can't be written.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterError("the model has no adapter to save", "Attach one first")
    settings = _settings(model, layers, config, base)
    tensors = to_peft(layers) | tokens_to_peft(token_rows(model)) | whole_to_peft(whole_modules(model))

    def fill(temporary: Path) -> None:
        files.write_json(temporary / CONFIG_NAME, settings)
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})  # `save` would copy all of it twice
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

    files.write_dir_atomic(directory, fill)


def _settings(model: nn.Module, layers: dict[str, LoRALayer], config: LoRAConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json; fields that are left out have PEFT's defaults."""
    if config.variant not in USE_DORA:
        raise AdapterError(
            f"PEFT's format has no variant {config.variant!r}",
            f"It knows {listed(USE_DORA)}; merge the adapter instead",
        )
    other = _unlike_peft(model, layers)
    task = _task_type(model)
    lasting = {name: layer.lasting_rank(config.scaling_rule) for name, layer in layers.items()}
    usual_r, usual_alpha = (
        Counter(lasting.values()).most_common(1)[0][0] if config.init in MOVING else (config.r, config.alpha)
    )
    return {
        "peft_type": OWN_TYPE if other else PEFT_TYPE,
        "task_type": task,
        "auto_mapping": None if task else _class_of(model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual_r,
        "lora_alpha": _plain(usual_alpha),
        "target_modules": exact_targets(model, layers),
        "rank_pattern": {exact_pattern(n): r for n, (r, _) in lasting.items() if r != usual_r},
        "alpha_pattern": {exact_pattern(n): _plain(alpha) for n, (_, alpha) in lasting.items() if alpha != usual_alpha},
        "lora_dropout": config.dropout,
        "use_rslora": USE_RSLORA[config.scaling_rule],
        "use_dora": USE_DORA[config.variant],
        "init_lora_weights": WRITTEN_INIT[config.init],
        "bias": NO_BIAS,
        "fan_in_fan_out": any(
            layer.kind.transposed and layer.kind.feature_dim is not None for layer in layers.values()
        ),
        "ensure_weight_tying": _peft_ties(layers) or any(module.tied_to for module in whole_modules(model).values()),
    } | _other_settings(model)


def _other_settings(model: nn.Module) -> dict[str, Any]:
    """The modules with trained rows, and those that are replaced; one tied to another PEFT finds by itself."""
    owners = {name: rows for name, rows in token_rows(model).items() if rows.tied_to is None}
    settings = {
        "trainable_token_indices": {name: rows.ids.tolist() for name, rows in owners.items()},
        "modules_to_save": list(whole_modules(model)),
    }
    return {name: value for name, value in settings.items() if value}


def _plain(alpha: float) -> float:
    """32, not 32.0: PEFT's field is annotated as a whole number, and some readers insist on it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _peft_ties(layers: dict[str, LoRALayer]) -> bool:
    """Whether PEFT is to tie adapters as ours are tied. It does so for its own two names, and warns about any other;
    there the modules have equal adapters of their own, which give the same logits.
    """
    is_tied = any(layer.tied_to for layer in layers.values())
    return is_tied and any(name.rpartition(".")[2] in PEFT_TIES for name in layers)


def _task_type(model: nn.Module) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = type(model).__name__
    return "CAUSAL_LM" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM") else None


def _class_of(model: nn.Module) -> dict[str, str]:
    """How PEFT's AutoPeftModel finds the class of a model without a task type."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _unlike_peft(model: nn.Module, layers: dict[str, LoRALayer]) -> str | None:
    """Why PEFT would compute something else with this adapter, as a sentence without its end; None if it would not."""
    for name, layer in layers.items():
        conv = cast(nn.Conv2d, layer.base)
        if isinstance(layer.kind, Conv) and (conv.groups > 1 or max(conv.dilation) > 1 or conv.padding_mode != "zeros"):
            return f"{name} is a convolution with groups, dilation or a padding mode"
    places = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoRALayer)]
    again = [name for name in places if name not in layers]
    return f"{again[0]} is the same module as one before it" if again else None


# --- reading --------------------------------------------------------------------------------------------------------


def load(model: nn.Module, directory: Path) -> LoRAConfig:
    """Attach the adapter in `directory`, ours or PEFT's own, to a base model, and load its weights, strictly.

    Returns the config that would attach the same one again, its targets resolved to module names. Each adapter is in
    training or eval mode as its base is. The model is left as it was if anything is wrong. Raises AdapterError with the
    field or the key for whatever can't be loaded whole and exactly: see `read_config` and `peft_tensors.from_peft`; and
    TargetError or RankError where a layer can't hold it.
    """
    found = read_config(directory)
    tensors = read_tensors(directory / WEIGHTS_NAME)
    names = resolve(model, found.targets)
    config = _lora_config(model, names, found)
    tokens = tokens_of(model, found.tokens)
    whole = whole_groups(model, found.whole, tensors, found.ties)
    rows_before = grow_for(model, tokens, tensors, bool(whole))
    lora.attach(model, config)
    try:
        if tokens:
            attach_rows(model, next(iter(tokens.values())), only=tokens)
        attach_whole(model, whole)
        layers = lora_layers(model)
        _check_same_function(model, layers, found)
        of_tokens, rest = split_tokens(token_rows(model), tensors)
        of_whole, of_layers = split_whole(whole_modules(model), rest)
        load_adapter_state(model, of_tokens | of_whole | from_peft(model, layers, of_layers, found.ties))
    except (AdapterError, TargetError):
        detach(model)
        if rows_before is not None:
            model.resize_token_embeddings(rows_before, mean_resizing=False)  # type: ignore[operator]
        raise
    return config


def _lora_config(model: nn.Module, names: list[str], found: AdapterConfig) -> LoRAConfig:
    patterns = own_patterns(model, names)
    ranks = {name: pattern_value(found.ranks, name, found.r) for name in names}
    alphas = {name: pattern_value(found.alphas, name, found.alpha) for name in names}
    for name in names:
        _check_alpha(f"lora_alpha of {name}", alphas[name], ranks[name])
    return LoRAConfig.model_validate(
        {
            "r": found.r,
            "alpha": found.alpha,
            "variant": found.variant,
            "targets": [patterns[name] for name in names],
            "rank_pattern": {patterns[name]: r for name, r in ranks.items() if r != found.r},
            "alpha_pattern": {patterns[name]: alpha for name, alpha in alphas.items() if alpha != found.alpha},
            "scaling_rule": found.scaling_rule,
            "init": found.init,
            "dropout": found.dropout,
        }
    )


def _check_same_function(model: nn.Module, layers: dict[str, LoRALayer], found: AdapterConfig) -> None:
    """Refuse an adapter of PEFT's on a layer for which its update is another function than ours."""
    other = _unlike_peft(model, layers)
    if other and found.peft_type == PEFT_TYPE:
        raise AdapterError(
            f"{other}, for which PEFT's update is another function than ours", "Load it with PEFT instead"
        )


def read_config(directory: Path) -> AdapterConfig:
    """adapter_config.json of an adapter directory, checked; no model is needed.

    Raises AdapterError, naming the field, if the directory holds no adapter, only pickled weights, another method than
    LoRA, a rank or alpha that makes no sense (r < 1, alpha <= 0 or above 1e6 r), or anything that lorafit can't apply:
    every field that this version does not know must be empty or false.
    """
    fields = _read_fields(directory)
    _check_features(fields)
    r, alpha = _rank("r", fields.get("r", 8)), fields.get("lora_alpha", 8)
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    for pattern, value in ranks.items():
        _rank(f"rank_pattern[{pattern!r}]", value)
    _check_alpha("lora_alpha", alpha, r)
    for pattern, value in alphas.items():
        _check_alpha(f"alpha_pattern[{pattern!r}]", value, max([r, *ranks.values()]))
    return AdapterConfig(
        peft_type=fields["peft_type"],
        base=fields.get("base_model_name_or_path"),
        task=fields.get("task_type"),
        targets=_targets(fields),
        r=r,
        alpha=float(alpha),
        ranks=ranks,
        alphas={pattern: float(value) for pattern, value in alphas.items()},
        scaling_rule=_key_of(USE_RSLORA, bool(fields.get("use_rslora"))),
        variant=_key_of(USE_DORA, bool(fields.get("use_dora"))),
        init=INITS[fields.get("init_lora_weights", True)],
        dropout=_dropout(fields.get("lora_dropout", 0.0)),
        ties=bool(fields.get("ensure_weight_tying")),
        tokens=read_tokens(fields.get("trainable_token_indices"), CONFIG_NAME),
        whole=read_whole(fields.get("modules_to_save"), CONFIG_NAME),
    )


def _read_fields(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{directory} holds no adapter: it has no {CONFIG_NAME}", "Check the path") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", "Copy the adapter again") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{path} holds a {type(fields).__name__}, not an object", "Copy the adapter again")
    if not (directory / WEIGHTS_NAME).is_file():
        if (directory / PICKLE_NAME).is_file():
            raise AdapterError(
                f"{directory} holds its weights as {PICKLE_NAME}, a pickle, which may run any code when it is read",
                "Load it where you trust it, and save it with safe_serialization=True",
            )
        raise AdapterError(f"{directory} has no {WEIGHTS_NAME}", "Copy the adapter again, and whole")
    return fields


def _check_features(fields: dict[str, Any]) -> None:
    """Refuse whatever would make the adapter compute something else than lorafit does. Raises AdapterError."""
    refused = [name for name, value in fields.items() if name not in READ | WITHOUT_EFFECT and value]
    if fields.get("peft_type") not in (PEFT_TYPE, OWN_TYPE):
        refused = ["peft_type"]
    elif fields.get("bias", NO_BIAS) != NO_BIAS:
        refused.append("bias")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in INITS:
        refused.append("init_lora_weights")
    if refused:
        name = refused[0]
        raise AdapterError(
            f"{CONFIG_NAME} has {name} = {json.dumps(fields.get(name))[:80]}, which lorafit can't apply",
            "Load it with PEFT, and merge it there or save it as plain LoRA",
        )


def _targets(fields: dict[str, Any]) -> Targets:
    include, layers, pattern = (
        fields.get("target_modules"),
        fields.get("layers_to_transform"),
        fields.get("layers_pattern"),
    )
    if not include or not (isinstance(include, str) or all(isinstance(name, str) for name in include)):
        raise AdapterError(
            f"{CONFIG_NAME} has target_modules = {json.dumps(include)[:80]}, which names no module",
            "Copy the adapter again",
        )
    return Targets(
        include=include,
        exclude=fields.get("exclude_modules") or [],
        layers=[layers] if isinstance(layers, int) else layers or None,
        layers_pattern=[pattern] if isinstance(pattern, str) and pattern else list(pattern or []),
        classifies=fields.get("task_type") == "SEQ_CLS",
    )


def _rank(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{CONFIG_NAME} has {field} = {value!r}; a rank is a whole number of at least 1", "Mend it")
    return value


def _check_alpha(field: str, value: Any, r: int) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0 < value <= MOST_ALPHA_PER_RANK * r:
        raise AdapterError(
            f"{CONFIG_NAME} has {field} = {value!r}; with rank {r} it must be above 0 and at most "
            f"{MOST_ALPHA_PER_RANK * r:g}",
            "Is the file damaged? Usual values are between r / 2 and 4 r",
        )


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise AdapterError(f"{CONFIG_NAME} has lora_dropout = {value!r}; it must be at least 0 and below 1", "Mend it")
    return float(value)


def _key_of(table: dict[str, bool], value: bool) -> str:
    return next(key for key, own in table.items() if own == value)
