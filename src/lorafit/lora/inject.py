"""Putting adapters into a model, and taking them out again: `attach` and `detach`, and what is done to all of them.

All base parameters are frozen and modules are replaced in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorafit.errors import AdapterError, ConfigError, TargetError, did_you_mean, listed
from lorafit.lora.adapted import Adapted
from lorafit.lora.dropout import DropoutKey
from lorafit.lora.init import INITS, layer_generator
from lorafit.lora.layer import Dropout, LoRALayer, new_layer, tied_layer
from lorafit.lora.targets import check_patterns, pattern_value, select, select_layers
from lorafit.lora.ties import tied_groups
from lorafit.lora.update import scaling
from lorafit.lora.variants import VARIANTS
from lorafit.quant.modules import number_count


@dataclass(frozen=True)
class AdaptedLayer:
    """What one owner of factors was given. in_features, out_features: of its weight as a matrix (see `base.py`)."""

    r: int
    alpha: float
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did. adapted: by module name, in the model's order; a shared weight once, under its owner.

    trainable_params: of the adapters. total_params: of the base alone, a shared parameter counted once.
    notes: what a user should know, a sentence each. skipped: how many modules a broad pattern left out, by class.
    """

    adapted: dict[str, AdaptedLayer]
    trainable_params: int
    total_params: int
    notes: list[str]
    skipped: dict[str, int]


@dataclass
class _Attachment:
    """The adapted modules by name, their dropout key, and what `detach` must put back. Kept on the model."""

    modules: dict[str, Adapted]
    key: DropoutKey
    requires_grad: dict[str, bool]
    fast_paths: list[tuple[str, str, int | bool]]


def attach(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    targets: str | Sequence[str],
    variant: str,
    rule: str,
    init: str,
    dropout: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    layers: str | Sequence[int] | None,
    seed: int,
) -> AttachReport:
    """Freeze the model and put a fresh adapter on every target, in place. The model's outputs do not change.

    targets, rank_pattern, alpha_pattern, layers: see `targets.py`; where several patterns mean a layer, the first one
    counts. dropout: the share of the adapter's input dropped in training, 0 <= p < 1. seed: of the A's, each drawn by
    (seed, module name). A module used in several places is adapted once; modules that share one weight share one
    adapter, the ones that no target names too (a note says so).
    Nothing is changed if anything is wrong. Raises TargetError (nothing matches, can't be adapted, attached already),
    RankError (r < 1 or above what a layer holds), ConfigError (a value or a name that is not known).
    """
    if adapted_modules(model):
        raise TargetError("the model has an adapter already", "Call detach(model) first")
    _check_settings(r, alpha, variant, rule, init, dropout)
    selection = select(model, targets)
    names = select_layers(model, selection.names, layers)
    notes = list(selection.notes)
    if len(names) < len(selection.names):
        notes.append(f"{len(selection.names) - len(names)} targets lie outside of layers {layers!r} and are left out")
    check_patterns("rank_pattern", rank_pattern, names)
    check_patterns("alpha_pattern", alpha_pattern, names)

    ranks = {name: _rank_alpha(name, r, alpha, rank_pattern, alpha_pattern) for name in names}
    groups = tied_groups(model, names, VARIANTS[variant].works_transposed, variant)
    made: dict[str, LoRALayer] = {}
    shared_dropout = Dropout(dropout, DropoutKey(seed=seed))
    for owner, others in groups.items():
        _check_same_rank(owner, others, ranks)
        made[owner] = new_layer(
            model.get_submodule(owner),
            name=owner,
            r=ranks[owner][0],
            alpha=ranks[owner][1],
            rule=rule,
            variant=variant,
            init=init,
            generator=layer_generator(seed, owner),
            dropout=shared_dropout,
        )
        for other in others:
            made[other] = tied_layer(made[owner], model.get_submodule(other), name=other)
        if others:
            notes.append(f"{owner} shares its weight with {listed(others)}: one adapter serves all of them")
    total = install(model, made, shared_dropout.key, notes)
    owners = {name: layer for name, layer in made.items() if layer.tied_to is None}
    return AttachReport(
        adapted={n: AdaptedLayer(m.r, m.alpha, m.in_features, m.out_features) for n, m in owners.items()},
        trainable_params=sum(p.numel() for p in trainable_parameters(model)),
        total_params=total,
        notes=notes,
        skipped=dict(selection.skipped),
    )


def install(
    model: nn.Module, made: Mapping[str, Adapted], key: DropoutKey | None = None, notes: list[str] | None = None
) -> int:
    """Freeze the base, put adapted modules in the place of their bases, and remember what `detach` must put back.

    made: by the names of the modules they stand for. notes: what a user should know is added. Returns the number of the
    base's parameters, a shared one counted once. Raises TargetError if the model has an adapter already.
    """
    if adapted_modules(model):
        raise TargetError("the model has an adapter already", "Call detach(model) first")
    total = number_count(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    _replace(model, {module.base: module for module in made.values()})
    fast_paths = _leave_fast_paths(model)
    if fast_paths and notes is not None:
        notes.append(f"{len(fast_paths)} fused inference paths of nn.TransformerEncoder are off: they skip adapters")
    attachment = _Attachment(dict(made), key or DropoutKey(seed=0), flags, fast_paths)
    model._lorafit_attachment = attachment  # type: ignore[assignment]  # not a module or tensor
    return total


def detach(model: nn.Module) -> None:
    """Give back the original modules, weights bitwise as they were, and every requires_grad flag.

    Raises TargetError if no adapter is attached.
    """
    attachment = _attachment(model)
    unmerge(model)
    _replace(model, {module: module.base for module in adapted_modules(model).values()})
    for name, parameter in model.named_parameters():
        if name in attachment.requires_grad:  # what was added since, such as a new head, keeps its own flag
            parameter.requires_grad_(attachment.requires_grad[name])
    for name, attribute, value in attachment.fast_paths:
        setattr(model.get_submodule(name), attribute, value)
    del model._lorafit_attachment


def owners(model: nn.Module) -> dict[str, LoRALayer]:
    """The layers that have factors of their own, by name."""
    return {layer.name: layer for layer in attached_layers(model) if layer.tied_to is None}


def take_off(model: nn.Module, names: Collection[str]) -> None:
    """Give back some of the modules that were adapted; the base stays frozen. Raises TargetError if none was."""
    modules = _attachment(model).modules
    _replace(model, {modules[name]: modules.pop(name).base for name in names})


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """All adapted layers by module name, in the model's order; each once, tied ones too (see `LoRALayer.tied_to`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """All adapted layers, and the embeddings with trained rows, by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' tensors by name (`{module}.lora_A`, ...), a shared one once, under its owner; frozen ones too."""
    return {
        f"{name}.{key}": parameter
        for name, module in adapted_modules(model).items()
        if module.tied_to is None
        for key, parameter in module.named_parameters(recurse=False)
    }


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters that are trained, each once."""
    return list(trained_parameters(model).values())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `adapter_parameters` that are trained: what the optimizer is given."""
    return {name: parameter for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}


def attached_layers(model: nn.Module) -> Collection[LoRALayer]:
    """All adapted layers, without a walk over the model. Raises TargetError if no adapter is attached."""
    return [module for module in _attachment(model).modules.values() if isinstance(module, LoRALayer)]


def dropout_key(model: nn.Module) -> DropoutKey:
    """The key that all adapted layers share: set seed, step and rows on it before each forward pass.

    Raises TargetError if no adapter is attached.
    """
    return _attachment(model).key


def set_scale(model: nn.Module, scale: float) -> None:
    """Set the strength of all updates: 0 the base model, 1 the tuned one, above 1 emphasised, below 0 negated.

    Merged layers are merged again, from the original weights. Raises ConfigError if scale is not finite.
    """
    for module in adapted_modules(model).values():
        module.set_scale(scale)


def merge(model: nn.Module) -> None:
    """Write all updates into the base's weights; afterwards the adapters cost nothing. Twice is once.

    The originals are kept on the CPU until `unmerge`. If a layer can't be merged, none is. Raises MergeError.
    """
    done: list[Adapted] = []
    try:
        for module in adapted_modules(model).values():
            if not module.merged:
                module.merge()
                done.append(module)
    except Exception:
        for module in done:
            module.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bitwise."""
    for module in adapted_modules(model).values():
        module.unmerge()


def forget_originals(model: nn.Module) -> None:
    """Take merged adapters off and leave the merged weights: `detach` puts back what originals it finds."""
    for module in adapted_modules(model).values():
        module.forget_original()
    detach(model)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapters, copied to the CPU: `{module}.lora_A`, `.lora_B`, the variant's own, `.rows`.

    Names are those of the modules before `attach`; a shared adapter is there once, under its owner.
    """
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put what `adapter_state` gave into a model with the same adapters attached; all of it, or nothing.

    Raises AdapterError, with the tensor's name, if one is missing, left over, of another shape or not finite, and if
    the model is merged (its weights would not follow).
    """
    if any(module.merged for module in adapted_modules(model).values()):
        raise AdapterError("the adapter is merged into the model", "Call unmerge(model) before loading")
    parameters = adapter_parameters(model)
    missing = [name for name in parameters if name not in state]
    extra = [name for name in state if name not in parameters]
    if missing or extra:
        lines = [f"{len(missing)} tensors are missing: {listed(missing, 3)}"] if missing else []
        lines += [f"{len(extra)} have no place in the model: {listed(extra, 3)}"] if extra else []
        hint = did_you_mean(extra[0], missing) if extra else ""
        raise AdapterError(f"the adapter does not fit: {'; '.join(lines)}", hint or "Attach with the same targets")
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise AdapterError(
                f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(parameter.shape)}",
                "Attach with the same r and targets",
            )
        if not state[name].isfinite().all():
            raise AdapterError(f"{name} holds values that are not finite", "Save the adapter again, or train it again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _attachment(model: nn.Module) -> _Attachment:
    attachment = getattr(model, "_lorafit_attachment", None)
    if attachment is None:
        raise TargetError("the model has no adapter", "Call attach(model, ...) first")
    return cast(_Attachment, attachment)


def _check_settings(r: int, alpha: float, variant: str, rule: str, init: str, dropout: float) -> None:
    scaling(r, alpha, rule)  # raises what is to be raised for the three
    for what, name, registry in (("variant", variant, VARIANTS), ("init", init, INITS)):
        if name not in registry:
            hint = did_you_mean(name, registry) or "Choose one of them"
            raise ConfigError(f"{what} {name!r} is not known; there are {listed(registry)}", hint)
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1, got {dropout!r}", "0.05 is a usual choice")


def _rank_alpha(
    name: str, r: int, alpha: float, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float]
) -> tuple[int, float]:
    rank, strength = pattern_value(rank_pattern, name), pattern_value(alpha_pattern, name)
    return (r if rank is None else rank), float(alpha if strength is None else strength)


def _check_same_rank(owner: str, others: list[str], ranks: Mapping[str, tuple[int, float]]) -> None:
    for other in others:
        if ranks.get(other, ranks[owner]) != ranks[owner]:
            raise TargetError(
                f"{owner} and {other} share one weight, but their (r, alpha) are {ranks[owner]} and {ranks[other]}",
                "Give them the same in rank_pattern and alpha_pattern",
            )


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever they are used."""
    for parent in list(model.modules()):
        if parent in new.values():
            continue  # what is being put in keeps what it holds
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def _leave_fast_paths(model: nn.Module) -> list[tuple[str, str, int | bool]]:
    """Turn off torch's fused path of encoder layers that hold adapters: it reads weights and calls no module.

    Returns what to put back: module name, attribute, value.
    """
    changed: list[tuple[str, str, int | bool]] = []
    for name, module in model.named_modules():
        attribute = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
        key = attribute.get(type(module))
        if key is not None and adapted_modules(module):
            changed.append((name, key, getattr(module, key)))
            setattr(module, key, 0 if key == "activation_relu_or_gelu" else False)
    return changed
