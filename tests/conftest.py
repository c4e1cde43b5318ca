"""Settings of all tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# What tests measure on a busy machine must not reach the user's cache; one place, so that kernels compile once.
os.environ.setdefault("LORAFIT_CACHE", str(Path(tempfile.gettempdir()) / "lorafit-tests"))
# The tensors are tiny: a second thread only waits for the first, and where tests run side by side, ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import HealthCheck, settings

# No deadline: what a test takes depends on the machine. The same examples every time: a red law is red for all.
settings.register_profile(
    "lorafit",
    deadline=None,
    derandomize=True,
    max_examples=200,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lorafit")
