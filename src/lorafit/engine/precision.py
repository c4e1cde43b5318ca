"""Which type products with frozen weights are computed in.

On a CPU without native bf16 it is far slower than fp32, and int8 without VNNI is slower still: measure, never assume.
fp16 is there for processors that multiply in it (AVX512-FP16, AMX-FP16, Arm's), and for CUDA.
The best that was ever measured is kept in the user's cache, for this processor, torch and number of threads: a machine
that is busy today does not choose for tomorrow.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable

import torch

from lorafit import processor, rates
from lorafit.engine import workspace
from lorafit.engine.product import Dense, Packed, Product, make_int8
from lorafit.errors import ConfigError

# The type that the model is loaded in; int8 products are made from bf16 weights.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
# Fewer bits must pay for their rounding with time.
MUST_BE_FASTER_BY = 1.3
# A type that is asked for by name and is so many times slower is warned of.
FAR_SLOWER = 2.0
ROWS, IN, OUT = 512, 576, 1536
FLOP = 2 * ROWS * IN * OUT
REPEATS = 7
# So many times as slow as fp32 a type will not become the fastest by measuring on: where there are no instructions for
# int8, seven products of it take seconds.
HOPELESS = 4.0


def choose(precision: str, storage: str = "auto") -> str:
    """The type as asked; for `auto`, fewer bits where that makes products 1.3 times as fast here.

    storage: that of the base, `auto` for as they are computed with. Raises ConfigError for one of which int8 would make
    copies, and for fp16 where nothing multiplies in it.
    """
    if precision == "fp16" and not has_fp16():
        raise ConfigError(
            "--precision fp16 is given, and this processor has no products in it (AVX512-FP16, AMX-FP16 or Arm's)",
            "Give --precision bf16, which takes as much memory, or leave it out: what is fastest here is measured",
        )
    if precision == "int8" and storage != "auto":
        raise ConfigError(
            f"--precision int8 copies every weight twice, and --base-storage {storage} is there to copy none",
            "Give --precision bf16, or leave --base-storage out",
        )
    if precision != "auto":
        return precision
    rate, best = flop_per_s(), "fp32"
    for name in known() if storage == "auto" else [name for name in known() if name != "int8"]:
        if rate[name] > MUST_BE_FASTER_BY * rate[best]:
            best = name
    return best


def warning(precision: str) -> str | None:
    """What to say of a type that is asked for by name and is far slower than fp32 here, if there is anything."""
    if precision in ("auto", "fp32"):
        return None
    rate = flop_per_s(("fp32", precision))
    times = rate["fp32"] / rate[precision]
    if times < FAR_SLOWER:
        return None
    unless = ", unless memory is short" if precision == "bf16" else ""
    return (
        f"{precision} products take {times:.1f} times as long as fp32 ones on this processor, which has no "
        f"instructions for them: leave --precision out{unless}"
    )


def has_fp16() -> bool:
    """Whether products of float16 are computed as such here."""
    return torch.cuda.is_available() or processor.has_fp16()


def known() -> list[str]:
    """The types that there are here, in the order of their bits; bf16, whose range is float32's, before fp16."""
    return ["fp32", "bf16", *(["fp16"] if has_fp16() else []), "int8"]


def flop_per_s(names: Iterable[str] | None = None, again: bool = False) -> dict[str, float]:
    """Floating-point operations a second in a product of 512 x 576 with 576 x 1536, by precision: the best ever seen.

    names: those that are asked for, by default all. Each is measured once a process, all together in about 20 ms, and
    again where that is asked for: a core that idled is slow at first.
    """
    if again:
        _best_rate.cache_clear()
    threads = torch.get_num_threads()
    return {name: _best_rate(name, threads) for name in names or known()}


@functools.cache
def _best_rate(name: str, threads: int) -> float:
    most_s = math.inf if name == "fp32" else HOPELESS * FLOP / _best_rate("fp32", threads)
    found = max(_measure(name, most_s), rates.read(threads).flop_per_s.get(name, 0.0))
    rates.keep(threads, rates.Rates(flop_per_s={name: found}))
    workspace.forget()  # or blocks of the first batches would be as large as what was measured on
    return found


def _measure(precision: str, most_s: float) -> float:
    """FLOP/s of x W^T, the best of several: what the machine can do when it is left alone.

    most_s: of one product; a second one that takes longer is the last.
    """
    product = _product(precision, torch.ones(OUT, IN, dtype=DTYPES[precision]))
    x = torch.ones(ROWS, IN, dtype=DTYPES[precision])
    best = math.inf
    for number in range(REPEATS):
        start = time.perf_counter()
        product.forward(x)
        best = min(best, time.perf_counter() - start)
        if number and best > most_s:
            break
    return FLOP / best


def _product(precision: str, W: torch.Tensor) -> Product:
    if precision == "int8":
        return make_int8(W, None)
    return Packed(W, ROWS) if precision == "fp32" and torch.backends.mkldnn.is_available() else Dense(W)  # type: ignore[no-untyped-call]
