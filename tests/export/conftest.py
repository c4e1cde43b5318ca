"""What the tests of adapter directories share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.export import peft
from tests import tiny
from tests.export.adapters import CONFIG, adapted


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    peft.save(adapted(tiny.llama(), CONFIG), path, CONFIG, base="the/base", tokenizer=None)
    return path
