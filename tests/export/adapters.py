"""Adapter directories to test with: how one is made, and how its files are changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafit.config import LoRAConfig
from lorafit.errors import AdapterError
from lorafit.export import peft
from lorafit.lora.inject import lora_layers
from lorafit.methods import lora
from tests import tiny

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapted(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The model with an adapter that does something."""
    lora.attach(model, config)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.get_parameter("lora_B"), generator=generator)
    return model


CONFIG = LoRAConfig(r=4, alpha=10, targets=["q_proj", "up_proj"])


def rewrite(directory: Path, **fields: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path, sentence: str, model: nn.Module | None = None) -> None:
    """Loading is refused with this sentence, and the model is plain and unchanged afterwards."""
    model = model or tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        peft.load(model, directory)
    assert not lora_layers(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
