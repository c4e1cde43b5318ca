"""METHODS: what `train --method` knows. A new method is one file and one line here.

Names, variants and usual rates stand in `config.py` too, which is read without torch.
"""

from __future__ import annotations

from torch import nn

from lorafit.config import MethodConfig
from lorafit.errors import TargetError
from lorafit.lora.inject import adapted_modules
from lorafit.methods import adapter, bitfit, full, ia3, lora, prefix, prompt
from lorafit.methods.method import Attached, Method

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "adapter": adapter.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "ia3": ia3.METHOD,
    "bitfit": bitfit.METHOD,
    "full": full.METHOD,
}


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Add what the method of `config` trains, freeze the rest, and note on the model which method it was.

    Raises TargetError if the model has something attached already.
    """
    if hasattr(model, "_lorafit_method") or adapted_modules(model):
        raise TargetError("the model has an adapter already", "Load it again")
    attached = METHODS[config.method].attach(model, config)
    model._lorafit_method = config.method  # type: ignore[assignment]  # not a module or tensor
    return attached


def of(model: nn.Module) -> Method:
    """The method of what was attached to this model; LoRA's where nobody said."""
    return METHODS[str(getattr(model, "_lorafit_method", "lora"))]
