"""The kernels in C++ (`kernels.cpp`), for float32 and bfloat16 on a CPU. Names and results are those of `plain`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lorafit.engine import workspace
from lorafit.engine.kernels.build import library
from lorafit.engine.kernels.plain import SILU, Geometry
from lorafit.engine.kernels.products import LANES, has_low_rank
from lorafit.quant.bits import Int8, Nf4
from lorafit.quant.blocks import Blocks
from lorafit.quant.codecs import CODECS
from lorafit.quant.stored import Stored

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
P, N, F, I = c_void_p, c_int64, c_float, c_int  # noqa: E741  # one letter each, as in a signature
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "rms_norm": (P, P, P, P, P, N, N, F, I),
    "rms_norm_backward": (P, P, P, P, P, P, N, N),
    "rotary": (P, N, P, P, P, N, N, N, N, F),
    "gated": (P, N, P, N, P, N, N, I),
    "gated_backward": (P, N, P, N, P, N, P, N, N, I),
    "gather_heads": (P, N, P, P, N, N, N),
    "scatter_heads": (P, P, P, N, N, N, N, I),
    "softmax": (P, P, P, P, P, F),
    "softmax_backward": (P, P, P, P, P, P, P, F),
    "cross_entropy": (P, P, P, P, N, N, I),
    "quantize_rows": (P, N, P, P, P, N, N),
    "dequantize": (P, P, P, P, N, N, N, I),
    "scale_columns": (P, N, P, N, N),
    "scale_columns_backward": (P, N, P, N, P, P, P, N, N),
    "decode_blocks": (P, N, N, N, P, N, I),
    "decode_nf4": (P, P, N, N, P, N),
    "decode_int8": (P, P, N, N, P, N),
}
FORMATS = tuple(CODECS)  # in the order of `decode` in decode.cpp


class _CGeometry(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in Geometry.__dataclass_fields__]


@functools.cache
def available() -> bool:
    """Whether the library could be compiled and loaded."""
    return library() is not None


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, "ask available() first"
    function: Callable[..., None] = loaded[f"{name}_{SUFFIX[dtype]}"]
    function.argtypes, function.restype = ARGUMENTS[name], None  # type: ignore[attr-defined]  # ctypes' own
    return function


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """Rows may be apart, but each is one piece: only the first stride is free."""
    return x if x.is_contiguous() or (x.shape[0] and x[0].is_contiguous()) else x.contiguous()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, round_first: bool, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `plain.rms_norm`."""
    x = x.contiguous()
    y, inverse = workspace.rows(x, *x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _function("rms_norm", x.dtype)(
        *(x.data_ptr(), _pointer(more), weight.data_ptr(), y.data_ptr(), inverse.data_ptr(), *x.shape, eps, round_first)
    )
    return y, inverse


def rms_norm_backward(gy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, more: Tensor | None = None) -> Tensor:
    """See `plain.rms_norm_backward`."""
    gy, x = gy.contiguous(), x.contiguous()
    gx = workspace.rows(x, *x.shape)
    _function("rms_norm_backward", x.dtype)(
        *(gy.data_ptr(), x.data_ptr(), weight.data_ptr(), inverse.data_ptr(), _pointer(more), gx.data_ptr(), *x.shape)
    )
    return gx


def rotary(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    """See `plain.rotary`."""
    y = workspace.rows(x, *x.shape)
    _rotate(_rows(x), cosine, sine, inverse, y)
    return y


def rotary_(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
    """See `plain.rotary_`. The rows of x may be apart."""
    _rotate(x, cosine, sine, inverse, x)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool, y: Tensor) -> None:
    cosine, sine = cosine.contiguous(), sine.contiguous()
    _function("rotary", x.dtype)(
        *(x.data_ptr(), x.stride(0), cosine.data_ptr(), sine.data_ptr(), y.data_ptr(), y.stride(0)),
        *(*x.shape, -1.0 if inverse else 1.0),
    )


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """See `plain.gated`."""
    gate, up = _rows(gate), _rows(up)
    y = workspace.rows(gate, *gate.shape)
    given = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), y.data_ptr(), *gate.shape)
    _silu("silu_gated")(*given) if _is_silu(gate, kind) else _function("gated", gate.dtype)(*given, kind)
    return y


def gated_backward(gy: Tensor, gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """See `plain.gated_backward`."""
    if _is_silu(gate, kind):
        return _silu_backward(gy, gate, up, None)
    gy, gate, up = _rows(gy), _rows(gate), _rows(up)
    both = workspace.rows(gate, len(gate), 2 * gate.shape[1])
    _function("gated_backward", gate.dtype)(*_places(gy, gate, up), both.data_ptr(), *gate.shape, kind)
    return both


def gated_again(gy: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """See `plain.gated_again`."""
    if not _is_silu(gate, kind):
        return gated_backward(gy, gate, up, kind), gated(gate, up, kind)
    y = workspace.rows(gate, *gate.shape)
    return _silu_backward(gy, gate, up, y), y


def _silu_backward(gy: Tensor, gate: Tensor, up: Tensor, y: Tensor | None) -> Tensor:
    gy, gate, up = _rows(gy), _rows(gate), _rows(up)
    both = workspace.rows(gate, len(gate), 2 * gate.shape[1])
    outputs = both.data_ptr(), None if y is None else y.data_ptr()
    _silu("silu_gated_backward")(*_places(gy, gate, up), *outputs, *gate.shape)
    return both


def _places(*tensors: Tensor) -> Iterator[int]:
    """Of each the address and how far its rows are apart."""
    return (number for x in tensors for number in (x.data_ptr(), x.stride(0)))


def _is_silu(gate: Tensor, kind: int) -> bool:
    """Whether `gated.cpp` has it."""
    return kind == SILU and gate.dtype == torch.bfloat16 and gate.shape[1] % LANES == 0 and has_low_rank()


@functools.cache
def _silu(name: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, "ask available() first"
    function: Callable[..., None] = loaded[name]
    arguments = (P, N, P, N, P, N, N) if name == "silu_gated" else (P, N, P, N, P, N, P, P, N, N)
    function.argtypes, function.restype = arguments, None  # type: ignore[attr-defined]  # ctypes' own
    return function


def gather_heads(x: Tensor, tokens: Tensor, kv_heads: int) -> Tensor:
    """See `plain.gather_heads`."""
    x = _rows(x)
    width = x.shape[1] // kv_heads * x.shape[2]
    packed = x.new_empty(kv_heads, len(tokens), width)
    _function("gather_heads", x.dtype)(
        x.data_ptr(), x.stride(0), tokens.data_ptr(), packed.data_ptr(), kv_heads, len(tokens), width
    )
    return packed


def scatter_heads_(packed: Tensor, tokens: Tensor, y: Tensor, add: bool) -> None:
    """See `plain.scatter_heads_`. packed must be contiguous."""
    kv_heads, cells, width = packed.shape
    _function("scatter_heads", y.dtype)(
        packed.data_ptr(), tokens.data_ptr(), y.data_ptr(), y.stride(0), kv_heads, cells, width, add
    )


def softmax_(own: Tensor, shared: Tensor | None, lengths: Tensor, at: Geometry, scale: float) -> Tensor:
    """See `plain.softmax_`."""
    log_sum = own.new_empty(own.shape[:2], dtype=torch.float32)
    _function("softmax", own.dtype)(
        *(own.data_ptr(), _pointer(shared), lengths.data_ptr(), log_sum.data_ptr()),
        *(ctypes.addressof(_c(at)), scale),
    )
    return log_sum


def softmax_backward_(
    own: Tensor,
    shared: Tensor | None,
    g_own: Tensor,
    g_shared: Tensor | None,
    lengths: Tensor,
    log_sum: Tensor,
    at: Geometry,
    scale: float,
) -> None:
    """See `plain.softmax_backward_`."""
    _function("softmax_backward", own.dtype)(
        *(own.data_ptr(), _pointer(shared), g_own.data_ptr(), _pointer(g_shared)),
        *(lengths.data_ptr(), log_sum.data_ptr(), ctypes.addressof(_c(at)), scale),
    )


@functools.lru_cache(maxsize=4096)
def _c(at: Geometry) -> _CGeometry:
    return _CGeometry(*(getattr(at, name) for name in Geometry.__dataclass_fields__))


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, gradient: bool) -> Tensor:
    """See `plain.cross_entropy_`."""
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    _function("cross_entropy", logits.dtype)(
        logits.data_ptr(), targets.data_ptr(), weights.data_ptr(), nll.data_ptr(), *logits.shape, gradient
    )
    return nll


def quantize_rows(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `plain.quantize_rows`."""
    x = _rows(x)
    q, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    _function("quantize_rows", x.dtype)(
        x.data_ptr(), x.stride(0), _pointer(columns), q.data_ptr(), scales.data_ptr(), *x.shape
    )
    return q, scales


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.quantize_columns`."""
    x = _rows(x)
    scales = x.abs().amax(0).float() / 127
    columns = torch.where(scales > 0, 1 / scales, 0.0)
    q = x.new_empty(x.shape, dtype=torch.int8)
    _function("quantize_rows", x.dtype)(x.data_ptr(), x.stride(0), columns.data_ptr(), q.data_ptr(), None, *x.shape)
    return q, scales


def dequantize_(sums: Tensor, rows: Tensor, columns: Tensor | None, y: Tensor, add: bool) -> None:
    """See `plain.dequantize_`. The rows of y may be apart."""
    _function("dequantize", y.dtype)(
        sums.data_ptr(), rows.data_ptr(), _pointer(columns), y.data_ptr(), y.stride(0), *y.shape, add
    )


def scale_columns_(y: Tensor, columns: Tensor) -> None:
    """See `plain.scale_columns_`. The rows of y may be apart."""
    _function("scale_columns", y.dtype)(y.data_ptr(), y.stride(0), columns.data_ptr(), *y.shape)


def scale_columns_backward(g: Tensor, u: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.scale_columns_backward`."""
    g, u = _rows(g), _rows(u)
    scaled, sums = workspace.rows(g, *g.shape), g.new_empty(g.shape[1], dtype=torch.float32)
    _function("scale_columns_backward", g.dtype)(
        *(*_places(g, u), columns.data_ptr(), scaled.data_ptr(), sums.data_ptr(), *g.shape)
    )
    return scaled, sums


def decode_(stored: Stored, out: Tensor) -> None:
    """See `plain.decode_`. The rows of out may be apart."""
    data, at = _rows(stored.data), (out.data_ptr(), out.stride(0))
    if isinstance(stored, Blocks):
        form = FORMATS.index(stored.codec.name)
        _function("decode_blocks", out.dtype)(data.data_ptr(), data.stride(0), *stored.shape, *at, form)
    elif isinstance(stored, Nf4):
        tops = stored.tops()
        _function("decode_nf4", out.dtype)(data.data_ptr(), tops.data_ptr(), *stored.shape, *at)
    elif isinstance(stored, Int8):
        _function("decode_int8", out.dtype)(data.data_ptr(), stored.tops.data_ptr(), *stored.shape, *at)
    else:
        out.copy_(stored.decode(out.dtype))
