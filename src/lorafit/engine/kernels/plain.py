"""The kernels in torch's own operations: what `native` is held against, and what runs where it can't.

Names that end in _ write into their arguments. Everything is computed in float32 and rounded to storage once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.quant.stored import Stored

SILU, GELU_TANH = 0, 1


@dataclass(frozen=True)
class Geometry:
    """Which keys the score rows of one attention product see: the shared prefix, then their own row up to themselves.

    blocks: key/value heads x rows; block b is row b % rows. queries: of this chunk, the first being token `first` of
    its row. group: query heads a key/value head. keys: own keys in the scores. prefix: shared keys before them.
    window: most keys a query sees, itself included; 0 for all.
    """

    blocks: int
    rows: int
    queries: int
    group: int
    first: int
    keys: int
    prefix: int
    window: int


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, round_first: bool, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, inverse_rms): y = weight * x / rms(x). x: (n, width). weight: (width,) float32.

    round_first: the normalised x is rounded to storage before it meets the weight. more: added to x before, in its
    place, which must be contiguous then. Source: Zhang, Sennrich 2019, eq. 4.
    """
    if more is not None:
        x += more
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    normal = wide * inverse[:, None]
    if round_first:
        normal = normal.to(x.dtype).float()
    return (weight * normal).to(x.dtype), inverse


def rms_norm_backward(gy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, more: Tensor | None = None) -> Tensor:
    """The gradient of x, from that of y. more: added to it."""
    g, wide = gy.float() * weight, x.float()
    mean = (g * wide).mean(-1, keepdim=True) * inverse[:, None] ** 2
    gx = (inverse[:, None] * (g - wide * mean)).to(x.dtype)
    return gx if more is None else gx + more


def rotary(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    """Rotary embedding of pairs (j, j + dim/2). x: (n, heads, dim). cosine, sine: (n, dim). inverse: the transpose.

    Source: Su et al. 2021 (RoFormer), eq. 34, in the half-split layout of transformers.
    """
    wide, c, s = x.float(), cosine.float()[:, None], sine.float()[:, None]
    if inverse:
        turned = wide * s
        return (wide * c + torch.cat(_swap(turned, -1), -1)).to(x.dtype)
    return (wide * c + torch.cat(_swap(wide, 1), -1) * s).to(x.dtype)


def rotary_(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
    """The same, in the place of x."""
    x.copy_(rotary(x, cosine, sine, inverse))


def _swap(x: Tensor, direction: int) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return -direction * second, direction * first


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) * up. Both (n, width). Source: Shazeer 2020 (GLU variants), eq. 6."""
    return (_act(gate.float(), kind) * up.float()).to(gate.dtype)


def gated_backward(gy: Tensor, gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """Gradients of gate and up side by side: (n, 2 width)."""
    g, x = gy.float(), gate.float()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = _act(leaf, kind)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return torch.cat([g * up.float() * slope, g * y.detach()], -1).to(gate.dtype)


def gated_again(gy: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """What `gated_backward` gives, and what `gated` gave: the factor A behind it needs that once more."""
    return gated_backward(gy, gate, up, kind), gated(gate, up, kind)


def _act(x: Tensor, kind: int) -> Tensor:
    return F.silu(x) if kind == SILU else F.gelu(x, approximate="tanh")


def gather_heads(x: Tensor, tokens: Tensor, kv_heads: int) -> Tensor:
    """Tokens to cells: (kv_heads, cells, heads / kv_heads * dim).

    x: (n, heads, dim). tokens: (cells,) int32, -1 for a cell of zeros.
    """
    packed = x.reshape(len(x), kv_heads, -1)[tokens.long().clamp_min(0)]
    return packed.masked_fill((tokens < 0)[:, None, None], 0).transpose(0, 1).contiguous()


def scatter_heads_(packed: Tensor, tokens: Tensor, y: Tensor, add: bool) -> None:
    """Cells back to tokens: y[token] = packed[:, cell], or += where add. y: (n, heads, dim). No token has two cells."""
    real = tokens >= 0
    where = tokens[real].long()
    values = packed.transpose(0, 1)[real].reshape(len(where), *y.shape[1:])
    y[where] = y[where] + values if add else values


def softmax_(own: Tensor, shared: Tensor | None, lengths: Tensor, at: Geometry, scale: float) -> Tensor:
    """Raw scores to probabilities, over both parts together. Returns log sum exp: (blocks, queries * group) float32.

    own: (blocks, queries * group, keys). shared: (blocks, queries * group, prefix). lengths: (rows,) int32, real tokens
    of each row; queries beyond become zeros.
    """
    scores = _both(own, shared).float() * scale
    seen, real = _seen(lengths, at, own.device)
    scores = scores.masked_fill(~seen, -math.inf)
    log_sum = scores.logsumexp(-1).masked_fill(~real, 0)
    _write(torch.exp(scores - log_sum[..., None]).masked_fill(~(seen & real[..., None]), 0), own, shared)
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
    """Raw scores to probabilities (own, shared); gradients of probabilities to those of scores (g_own, g_shared)."""
    seen, real = _seen(lengths, at, own.device)
    seen = seen & real[..., None]
    p = torch.exp(_both(own, shared).float() * scale - log_sum[..., None]).masked_fill(~seen, 0)
    g = _both(g_own, g_shared).float().masked_fill(~seen, 0)
    _write(scale * p * (g - (p * g).sum(-1, keepdim=True)), g_own, g_shared)
    _write(p, own, shared)


def _both(own: Tensor, shared: Tensor | None) -> Tensor:
    return own if shared is None else torch.cat([shared, own], -1)


def _write(values: Tensor, own: Tensor, shared: Tensor | None) -> None:
    own.copy_(values[..., values.shape[-1] - own.shape[-1] :])
    if shared is not None:
        shared.copy_(values[..., : shared.shape[-1]])


def _seen(lengths: Tensor, at: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys are seen: (blocks, queries * group, prefix + keys); which queries are real: without the last axis."""
    token = at.first + torch.arange(at.queries, device=device).repeat_interleave(at.group)
    position = at.prefix + token[:, None]
    key = torch.arange(at.prefix + at.keys, device=device)
    seen = key <= position
    if at.window:
        seen &= key > position - at.window
    real = token < lengths.to(device).repeat(at.blocks // at.rows)[:, None]
    return seen.expand(at.blocks, -1, -1), real


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, gradient: bool) -> Tensor:
    """-log softmax(logits)[target]: (n,) float32. With gradient, logits become weight * (softmax - onehot)."""
    wide = logits.float()
    nll = F.cross_entropy(wide, targets, reduction="none")
    if gradient:
        p = wide.softmax(-1)
        p[torch.arange(len(p), device=p.device), targets] -= 1
        logits.copy_(weights[:, None] * p)
    return nll


def quantize_rows(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(q int8, scales float32 (n,)): row i of x (times `columns`) is close to scales[i] * q[i], |q| <= 127."""
    wide = x.float() if columns is None else x.float() * columns
    top = wide.abs().amax(-1)
    inverse = torch.where(top > 0, 127 / top, 0.0)
    return torch.round(wide * inverse[:, None]).to(torch.int8), top / 127


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8, scales float32 (width,)): column j of x is close to scales[j] * q[:, j], |q| <= 127."""
    scales = x.abs().amax(0).float() / 127
    return torch.round(x.float() * torch.where(scales > 0, 1 / scales, 0.0)).to(torch.int8), scales


def dequantize_(sums: Tensor, rows: Tensor, columns: Tensor | None, y: Tensor, add: bool) -> None:
    """Y = sums * rows[i] * columns[j] (+ y where add). sums: (n, width) int32. y: (n, width)."""
    values = sums.float() * rows[:, None]
    if columns is not None:
        values = values * columns
    y.copy_(values + y.float() if add else values)


def scale_columns_(y: Tensor, columns: Tensor) -> None:
    """Y times `columns`, (width,) float32, in its place. y: (n, width)."""
    y.copy_((y.to(columns.dtype) * columns).to(y.dtype))


def scale_columns_backward(g: Tensor, u: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(g times `columns`, sum over rows of g u: (width,) as `columns`). g, u: (n, width)."""
    wide = g.to(columns.dtype)
    return (wide * columns).to(g.dtype), (wide * u.to(columns.dtype)).sum(0)


def decode_(stored: Stored, out: Tensor) -> None:
    """Write the matrix that is stored in fewer bits into out, (rows, width), each number rounded once."""
    out.copy_(stored.decode(out.dtype))
