"""The tensors of adapter_model.safetensors: PEFT's keys and shapes, from our layers and back, strictly.

| ours (shapes in `lora/base.py`) | PEFT's key, after `base_model.model.{module}.` | PEFT's shape            |
|---------------------------------|------------------------------------------------|-------------------------|
| lora_A, lora_B                  | lora_A.weight, lora_B.weight                   | the same                |
| lora_A, lora_B of an embedding  | lora_embedding_A, lora_embedding_B             | the same                |
| magnitude (DoRA)                | lora_magnitude_vector                          | (out,); conv (1, out, 1, ...) |

PEFT has an adapter for each module; ours share one where modules share a weight. It is then written once per module,
as that module uses it: a head tied to an embedding gets A = B^T and B = A^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafit.errors import AdapterError, did_you_mean, listed
from lorafit.lora.adapted import Adapted
from lorafit.lora.layer import LoRALayer

PREFIX = "base_model.model."
MAGNITUDE = "magnitude"


def to_peft(layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    """Every tensor of the adapters under PEFT's key, contiguous, on the CPU, none sharing memory with another."""
    return {
        key: tensor.detach().to("cpu", copy=True).contiguous()
        for name, layer in layers.items()
        for key, tensor in _tensors(name, layer).items()
    }


def from_peft(
    model: nn.Module, layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor], ties_are_kept: bool
) -> dict[str, Tensor]:
    """A state for `lora.inject.load_adapter_state`, from PEFT's tensors.

    ties_are_kept: PEFT was told to let modules that share a weight share an adapter, so a file may hold it once.
    Weights of the base itself, which PEFT writes beside the adapter of an embedding, must be the ones in the model.
    Raises AdapterError, with the file's key, for a tensor that is missing, left over, of another shape, no float or not
    finite, and for modules that share a weight and do not share their update.
    """
    wanted = {key: tensor for name, layer in layers.items() for key, tensor in _tensors(name, layer).items()}
    optional = {key for name, layer in layers.items() if layer.tied_to for key in _tensors(name, layer)}
    _check_ties(layers, tensors, ties_are_kept)
    missing = [key for key in wanted if key not in tensors and key not in optional]
    extra = [key for key in tensors if key not in wanted and not _is_base_weight(model, key, tensors[key])]
    if missing or extra:
        raise _misfit(missing, extra)
    for key, tensor in wanted.items():
        if key in tensors:
            check_tensor(key, tensors[key], tensor)
    state = {
        key: t for name, layer in layers.items() if not layer.tied_to for key, t in _own(name, layer, tensors).items()
    }
    for name, layer in layers.items():
        if layer.tied_to:
            _check_shared(name, layer, tensors, state)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file. Raises AdapterError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", "Copy the adapter again; is the file whole?") from None


def _tensors(name: str, layer: LoRALayer) -> dict[str, Tensor]:
    """The layer's tensors under PEFT's keys, in the order of its own parameters: A, B, and what the variant adds."""
    A, B, _ = layer.lasting_factors()
    is_embedding = isinstance(layer.base, nn.Embedding)
    key_A, key_B = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {key_A: A, key_B: B}
    magnitude = layer._parameters.get(MAGNITUDE)
    if magnitude is not None:
        is_conv = layer.kind.weight.dim() > 2
        tensors["lora_magnitude_vector"] = layer.kind.per_output(magnitude)[None] if is_conv else magnitude
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in tensors.items()}


def _own(name: str, layer: LoRALayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer that owns its factors, under our names and in our shapes."""
    parameters = layer.named_parameters(recurse=False)
    keys = _tensors(name, layer)
    return {f"{name}.{own}": tensors[key].reshape(p.shape) for (own, p), key in zip(parameters, keys, strict=True)}


def _is_base_weight(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether a key names a weight of the base that is the same in the model. Raises AdapterError if it differs."""
    plain = key.removeprefix(PREFIX).replace(".token_adapter.", ".").replace(".base_layer.", ".")
    name, _, leaf = plain.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    own = (module.base if isinstance(module, Adapted) else module)._parameters.get(leaf)
    if own is None or not key.startswith(PREFIX):
        return False
    if own.shape != tensor.shape or not torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
        raise AdapterError(
            f"the adapter brings its own {key}, {tuple(tensor.shape)}, which differs from the model's, "
            f"{tuple(own.shape)}: it was trained on another or a resized model",
            "Load it into that model, or save it from PEFT with save_embedding_layers=False",
        )
    return True


def _misfit(missing: list[str], extra: list[str]) -> AdapterError:
    parts = [f"{len(missing)} tensors are missing: {listed(missing, 3)}"] if missing else []
    parts += [f"{len(extra)} have no place in the model: {listed(extra, 3)}"] if extra else []
    hint = did_you_mean(extra[0], missing) if extra else ""
    return AdapterError(
        f"the adapter does not fit: {'; '.join(parts)}", hint or "Load it into the model it was trained on, and whole"
    )


def check_tensor(key: str, tensor: Tensor, wanted: Tensor) -> None:
    """Raise AdapterError, with the key, for a tensor of another shape, of no floats, or that is not finite."""
    if tensor.shape != wanted.shape:
        raise AdapterError(
            f"{key} has shape {tuple(tensor.shape)}, the model and adapter_config.json want {tuple(wanted.shape)}",
            "Load the adapter into the model that it was trained on",
        )
    if not tensor.is_floating_point():
        raise AdapterError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, not floats", "Save it as floats")
    if not tensor.isfinite().all():
        raise AdapterError(f"{key} holds values that are not finite", "Save the adapter again, or train it again")


def _check_ties(layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor], ties_are_kept: bool) -> None:
    """An adapter on one of several modules that share a weight, and on it alone, would tear them apart."""
    for name, layer in layers.items():
        if layer.tied_to and not ties_are_kept and not any(key in tensors for key in _tensors(name, layer)):
            raise AdapterError(
                f"the adapter changes {layer.tied_to} but not {name}, and in this model both are one weight",
                "Load the model with tie_word_embeddings=False, or train with PEFT's ensure_weight_tying=True",
            )


def _check_shared(name: str, layer: LoRALayer, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """A layer that shares its owner's factors must have been given the same ones, where it was given any."""
    own = [own_name for own_name, _ in layer.named_parameters(recurse=False)]
    if layer.transposed:
        own[:2] = reversed(own[:2])  # its A is the owner's B, its B the owner's A
    for key, own_name in zip(_tensors(name, layer), own, strict=True):
        owned = state[f"{layer.tied_to}.{own_name}"]
        if key in tensors and not torch.equal(tensors[key], owned.T if layer.transposed else owned):
            raise AdapterError(
                f"{key} is not the update of {layer.tied_to}, and in this model both modules are one weight",
                "Load the model with tie_word_embeddings=False, or train with PEFT's ensure_weight_tying=True",
            )
