"""Fine-tune models by low-rank adaptation (LoRA) on the machine you have.

The Python API, for any `torch.nn.Module`:

    from lorafit import LoRAConfig, attach, detach, load, merge, save, set_scale, trainable_parameters, unmerge

    attach(model, LoRAConfig(r=4, alpha=8))             # freeze the model, add dW = (alpha / r) B A to its layers
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)
    ...                                                 # train as always
    set_scale(model, 0.5)                               # half of the update; 0 is the base model
    merge(model)                                        # no overhead from here on; unmerge(model) undoes it bitwise
    save(model, "adapter")                              # PEFT's format

`plan_module` counts what a network takes from its parameters' shapes alone.

Names are imported when they are first used, so that `import lorafit` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.api import attach, load, save
    from lorafit.config import LoRAConfig
    from lorafit.lora.inject import (
        detach,
        lora_layers,
        merge,
        set_scale,
        trainable_parameters,
        unmerge,
    )
    from lorafit.plan.module import plan_module

__version__ = "0.1.0"

_WHERE = {
    "LoRAConfig": "lorafit.config",
    "attach": "lorafit.api",
    "load": "lorafit.api",
    "save": "lorafit.api",
    "detach": "lorafit.lora.inject",
    "lora_layers": "lorafit.lora.inject",
    "merge": "lorafit.lora.inject",
    "plan_module": "lorafit.plan.module",
    "set_scale": "lorafit.lora.inject",
    "trainable_parameters": "lorafit.lora.inject",
    "unmerge": "lorafit.lora.inject",
}

__all__ = [
    "LoRAConfig",
    "attach",
    "detach",
    "load",
    "lora_layers",
    "merge",
    "plan_module",
    "save",
    "set_scale",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
