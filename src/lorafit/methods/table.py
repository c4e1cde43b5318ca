"""METHODS: what `train --method` knows. A new method is one file and one line here."""

from __future__ import annotations

from lorafit.methods import lora
from lorafit.methods.method import Method

METHODS: dict[str, Method] = {"lora": lora.METHOD}
