"""llama.cpp's server on a model file; as a program it prints its address and stays until it is killed. No torch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import xllamacpp

LIFE_S = 600


def start(model: Path, adapter: Path | None = None, n_ctx: int = 256) -> Any:
    """A server in this process, for as long as it is held. Keys and values are kept in float32."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(model), n_ctx, 1
    settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
    # Its threads wait for each other in a busy loop: with others at work, one is faster than two.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        laid = xllamacpp.CommonAdapterLoraInfo()
        laid.path, laid.scale = str(adapter), 1.0
        settings.lora_adapters = [laid]
    return xllamacpp.Server(settings)


if __name__ == "__main__":
    running = start(Path(sys.argv[1]))
    print(running.listening_address, flush=True)
    time.sleep(LIFE_S)
