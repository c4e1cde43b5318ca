"""Where a module stands in a model, by its name."""

from __future__ import annotations


def place(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`: the first number, and what stands behind it.

    Where nothing does, as in `features.0`, the kind is what stands before it; without a number, the whole name.
    """
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None, name
    return int(parts[at]), ".".join(parts[at + 1 :] or parts[:at]) or "layer"
