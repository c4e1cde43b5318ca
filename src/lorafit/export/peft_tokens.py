"""Trained rows of single tokens in PEFT's format: `trainable_token_indices`, and a tensor for each module.

PEFT calls it `{module}.token_adapter.trainable_tokens_delta`; it holds whole rows, not what was added to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import AdapterError
from lorafit.export.peft_tensors import PREFIX, check_tensor
from lorafit.lora.tokens import TokenRows, make_room

LEAF = ".token_adapter.trainable_tokens_delta"


def read_tokens(value: Any, config_name: str) -> dict[str, list[int]]:
    """trainable_token_indices: a list for the input embedding, or one for each module; all of them the same."""
    by_module: Any = {"": value} if isinstance(value, list) else value or {}
    lists = list(by_module.values()) if isinstance(by_module, dict) else [None]
    if not all(_are_token_ids(ids) and ids == lists[0] for ids in lists):
        raise AdapterError(
            f"{config_name} has trainable_token_indices = {json.dumps(value)[:80]}, which lorafit can't apply",
            "It must be a list of token ids, each once, or the same list for each module",
        )
    return dict(by_module)


def _are_token_ids(value: Any) -> bool:
    whole = isinstance(value, list) and value and all(type(number) is int and 0 <= number < 1 << 31 for number in value)
    return bool(whole) and len(set(value)) == len(value)


def tokens_to_peft(modules: Mapping[str, TokenRows]) -> dict[str, Tensor]:
    """The rows under PEFT's keys, on the CPU; those that a tied head shares with its embedding once."""
    owners = {name: module for name, module in modules.items() if module.tied_to is None}
    return {f"{PREFIX}{name}{LEAF}": module.rows.detach().to("cpu", copy=True) for name, module in owners.items()}


def tokens_of(model: Any, wanted: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Module name -> its tokens, from names or their ends ("": the input embedding). Raises AdapterError."""
    if not wanted:
        return {}
    embedding = model.get_input_embeddings()
    modules = {name: m for name, m in model.named_modules() if m in (embedding, model.get_output_embeddings())}
    found: dict[str, list[int]] = {}
    for end, ids in wanted.items():
        names = [n for n, m in modules.items() if (n == end or n.endswith(f".{end}") if end else m is embedding)]
        if not names:
            raise AdapterError(
                f"trainable_token_indices names {end!r}, which is neither the embedding nor the output head",
                "Load the adapter with PEFT",
            )
        found[names[0]] = ids
    return found


def grow_for(model: Any, tokens: Mapping[str, list[int]], tensors: Mapping[str, Tensor], has_whole: bool) -> int | None:
    """Give the model as many rows as the tokens need. Returns how many there were before, None if they were enough.

    Where PEFT has stored the whole embedding, because its user had made it larger, the new rows are taken from there.
    has_whole: modules are replaced whole, of which the embedding may be one.
    """
    if not tokens and not has_whole:
        return None
    before = int(model.get_input_embeddings().weight.shape[0])
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    stored = {name: tensor for name in names if (tensor := _stored(name, tensors)) is not None}
    wanted = [max(ids) for ids in tokens.values()] + [len(tensor) - 1 for tensor in stored.values()]
    most = max(wanted, default=0)
    if not make_room(model, [most]):
        return None
    for name, tensor in stored.items():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight[before:] = tensor[before:].to(weight.dtype)
    return before


def _stored(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    keys = (
        f"{PREFIX}{name}.weight",
        f"{PREFIX}{name}.base_layer.weight",
        f"{PREFIX}{name}.token_adapter.base_layer.weight",
    )
    return next((tensors[key] for key in keys if key in tensors), None)


def split_tokens(
    modules: Mapping[str, TokenRows], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the rows under our names, all other tensors). Raises AdapterError, with the key, for rows missing or unfit."""
    others = dict(tensors)
    rows: dict[str, Tensor] = {}
    for name, module in modules.items():
        key, owner = f"{PREFIX}{name}{LEAF}", module.tied_to or name
        if key in others:
            check_tensor(key, others[key], module.rows)
            found = others.pop(key)
            if not torch.equal(found, rows.setdefault(f"{owner}.rows", found)):
                raise AdapterError(
                    f"{key} is not what {owner} has, and in this model both are one weight",
                    "Load the model with tie_word_embeddings=False, or the adapter with PEFT",
                )
        elif owner == name:
            raise AdapterError(f"{key} is missing", "Copy the adapter again, and whole")
    return rows, others
