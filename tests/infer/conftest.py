from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorafit.lora.inject import lora_layers, set_scale
from tests.infer.learned import Learned, learn


@pytest.fixture(scope="session")
def trained() -> Learned:
    return learn()


@pytest.fixture
def learned(trained: Learned) -> Iterator[Learned]:
    """At scale 1, whatever a test before it did."""
    set_scale(trained.model, 1.0)
    for layer in lora_layers(trained.model).values():
        layer.training = True  # as training leaves it
    yield trained
