"""METHODS: what `train --method` knows. A new method is one file and one line here.

Names, variants and usual rates stand in `config/` too, which is read without torch.
"""

from __future__ import annotations

from torch import nn

from lorafit.config import MethodConfig
from lorafit.errors import TargetError
from lorafit.lora.inject import adapted_modules
from lorafit.methods import adapter, bitfit, full, head, ia3, lora, prefix, prompt
from lorafit.methods.labels import attached_with, label_head, with_head
from lorafit.methods.method import Attached, Method

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "adapter": adapter.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "ia3": ia3.METHOD,
    "bitfit": bitfit.METHOD,
    "full": full.METHOD,
    "head": head.METHOD,
}


def is_attached(model: nn.Module) -> bool:
    """Whether a method has put something into this model, or trains its parameters."""
    return hasattr(model, "_lorafit_method") or bool(adapted_modules(model))


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Add what the method of `config` trains, freeze the rest, and note on the model which method it was.

    A head of labels that the model has trains too. Raises TargetError if the model has something attached already.
    """
    if is_attached(model):
        raise TargetError("the model has an adapter already", "Load it again")
    attached = METHODS[config.method].attach(model, config)
    model._lorafit_method = config.method  # type: ignore[assignment]  # not a module or tensor
    own = label_head(model)
    return attached if own is None else attached_with(model, own, attached)


def of(model: nn.Module) -> Method:
    """The method of what was attached to this model, and of its head of labels; LoRA's where nobody said."""
    method = METHODS[str(getattr(model, "_lorafit_method", "lora"))]
    return method if label_head(model) is None else with_head(method)


def scale_of(model: nn.Module) -> float:
    """The scale in force; 1 where nothing is attached."""
    first = next(iter(adapted_modules(model).values()), None)
    return first.scale if first is not None else float(getattr(full.trained(model), "scale", 1.0))


def changed_names(model: nn.Module) -> set[str]:
    """The parameters that merging changes, by their names in the plain model."""
    found = {f"{name}.{key}" for name, module in adapted_modules(model).items() for key in module.changes}
    return found or set(full.trainable(model) if full.trained(model) else ())


def why_not_merged(model: nn.Module) -> str | None:
    """Why what was trained cannot become part of the base's weights; None where it can."""
    return next((why for module in adapted_modules(model).values() if (why := module.why_not_merged)), None)


def forget(model: nn.Module) -> None:
    """Take off what was merged, and keep the weights: the model is a plain one then."""
    of(model).forget(model)
    if hasattr(model, "_lorafit_method"):
        del model._lorafit_method
