"""Causal attention over packed rows: every row sees itself and the prefix that it continues, and nothing else.

In bfloat16 it is a kernel of our own where the processor can (`kernels.rows`). Elsewhere it is two batched matrix
products per bucket and chunk of queries, with a softmax kernel between them that knows the mask from geometry; no mask
tensor exists. Either way scores are recomputed in the backward pass instead of kept (Dao et al. 2022, FlashAttention,
section 3.1). It is registered as a transformers attention function, so a model's own code calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafit.engine import kernels, workspace
from lorafit.engine.batch import CHUNK, Bucket
from lorafit.engine.kernels import rows as row_kernels
from lorafit.engine.kernels.plain import Geometry
from lorafit.engine.kernels.rows import RowTable
from lorafit.engine.tally import TALLY

NAME = "lorafit_packed"
# What attention functions of transformers are given and ours does without: an argument that it does not know might
# change what is to be computed, so the model is run padded instead.
IGNORED_ARGUMENTS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "position_embeddings"}
    | {"past_key_values", "output_hidden_states", "return_dict", "logits_to_keep", "labels", "dropout", "softcap"}
)

_layout: tuple[Bucket, ...] | None = None
# The window that each attention module asked for last, where someone listens: `Probe` does, for one pass.
windows: dict[nn.Module, int] | None = None


@contextmanager
def _in_force(layout: tuple[Bucket, ...]) -> Iterator[None]:
    """While this holds, attention is over these buckets. A recomputed layer must run inside it as well."""
    global _layout
    before, _layout = _layout, layout
    try:
        yield
    finally:
        _layout = before


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations by which the model's layers choose their attention function, each once."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


@contextmanager
def packed(configs: Sequence[Any], layout: tuple[Bucket, ...]) -> Iterator[None]:
    """While this holds, the attention of the model with these configurations is ours over these buckets."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        with _in_force(layout):
            yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


@contextmanager
def watched_windows() -> Iterator[dict[nn.Module, int]]:
    """While this holds, the window that each attention module asks for is noted; 0 where it has none."""
    global windows
    before, windows = windows, {}
    try:
        yield windows
    finally:
        windows = before


def register() -> None:
    """Make `NAME` known to transformers, as an attention function that needs no mask. Twice is once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*arguments: Any, **more: Any) -> None:
    return None


def rows_in_force() -> RowTable | None:
    """The rows of the batch that is running, where it is packed and the kernel of rows can take it."""
    return _rows(_layout) if _layout is not None else None


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls. query: (1, heads, tokens, dim). Returns (1, tokens, heads, dim).

    Raises NotImplementedError for what this attention can't do; the model is then run padded.
    """
    scaling = more.pop("scaling", None)
    window = more.pop("sliding_window", None) or 0
    if windows is not None:
        windows[module] = int(window)
    unknown = {name for name, given in more.items() if given is not None and given is not False} - IGNORED_ARGUMENTS
    if _layout is None or attention_mask is not None or unknown or more.get("softcap") or query.shape[0] != 1:
        raise NotImplementedError(f"packed attention can't serve {sorted(unknown) or 'this call'}")
    if more.get("dropout") or not getattr(module, "is_causal", True):
        raise NotImplementedError("packed attention is causal and without dropout")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    rows = _rows(_layout) if row_kernels.serve(q, v) else None
    if rows is not None:
        out: Tensor = _RowAttention.apply(q, k, v, rows, scale, window)  # type: ignore[no-untyped-call]
    else:
        out = _BucketAttention.apply(q, k, v, _layout, scale, window)  # type: ignore[no-untyped-call]
    return out[None], None


# --- row by row, in our own kernel ----------------------------------------------------------------------------------

_last_rows: tuple[tuple[Bucket, ...], RowTable | None] = ((), None)


def _rows(layout: tuple[Bucket, ...]) -> RowTable | None:
    """The rows of a layout as `kernels.rows` takes them; None where a prefix is no row of its own."""
    global _last_rows
    if _last_rows[0] is not layout:  # every layer asks for the same one
        starts = [bucket.tokens.view(bucket.rows, -1)[:, 0] for bucket in layout]
        pairs = torch.stack([torch.cat(starts), torch.cat([bucket.lengths for bucket in layout])], dim=1).tolist()
        places = {tuple(pair): number for number, pair in enumerate(pairs)}
        prefixes = [(bucket.prefix_start, bucket.prefix) for bucket in layout for _ in range(bucket.rows)]
        if all(prefix in places for prefix in prefixes if prefix[1]):
            continued = [places[prefix] if prefix[1] else -1 for prefix in prefixes]
            table = [(*pair, before) for pair, before in zip(pairs, continued, strict=True)]
            _last_rows = layout, RowTable(np.array(table, dtype=np.int64))
        else:
            _last_rows = layout, None
    return _last_rows[1]


class _RowAttention(torch.autograd.Function):
    """q: (tokens, heads, dim). k: (tokens, kv_heads, dim). v: (tokens, kv_heads, dim_v). Tokens may be apart."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: RowTable, scale: float, window: int) -> Tensor:
        out, log_sum = row_kernels.forward(q, k, v, rows, scale, window)
        # v is a view of one matrix with q and k as they were before they were rotated; a copy lets go of those.
        ctx.save_for_backward(q, k, workspace.rows(v, *v.shape).copy_(v), log_sum)
        ctx.rows, ctx.scale, ctx.window = rows, scale, window
        TALLY.add(row_flop(q, v, rows))
        return out

    @staticmethod
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sum = ctx.saved_tensors
        TALLY.add(2 * row_flop(q, v, ctx.rows))
        return *row_kernels.backward(q, k, v, g_out, log_sum, ctx.rows, ctx.scale, ctx.window), None, None, None


def row_flop(q: Tensor, v: Tensor, rows: RowTable) -> int:
    """Of the two products of the forward pass."""
    return 2 * q.shape[1] * rows.pairs * (q.shape[2] + v.shape[2])


# --- bucket by bucket, in batched products --------------------------------------------------------------------------


class _BucketAttention(torch.autograd.Function):
    """q: (tokens, heads, dim). k: (tokens, kv_heads, dim). v: (tokens, kv_heads, dim_v). Rows may be apart."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: tuple[Bucket, ...], scale: float, window: int
    ) -> Tensor:
        out = workspace.rows(q, len(q), q.shape[1], v.shape[2]).zero_()  # a token of no row has no attention
        shared = _Prefixes(k, v)
        sums: list[Tensor] = []
        for bucket in layout:
            part = _Part(bucket, q, k, v, shared, scale, window)
            packed_out = part.Q.new_empty(*part.Q.shape[:2], v.shape[2])
            for chunk in part.chunks():
                sums.append(chunk.forward(packed_out))
            part.kernels.scatter_heads_(part.cells(packed_out), bucket.tokens, out, False)
        TALLY.add(_flop(q, v, layout))
        # v is a view of one matrix with q and k as they were before they were rotated; a copy lets go of those.
        ctx.save_for_backward(q, k, workspace.rows(v, *v.shape).copy_(v), *sums)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *sums = ctx.saved_tensors
        # Zeros: what a prefix gets from the rows that continue it is added to what it gives itself.
        gq, gk, gv = (workspace.rows(x, *x.shape).zero_() for x in (q, k, v))
        shared = _Prefixes(k, v)
        remaining = iter(sums)
        for bucket in ctx.layout:
            part = _Part(bucket, q, k, v, shared, ctx.scale, ctx.window)
            g_packed = part.kernels.gather_heads(g_out, bucket.tokens, k.shape[1])
            gradients = _Gradients(part, g_packed.view(*part.Q.shape[:2], v.shape[2]))
            for chunk in part.chunks():
                chunk.backward(gradients, next(remaining))
            for packed_gradient, y in ((gradients.Q, gq), (gradients.K, gk), (gradients.V, gv)):
                part.kernels.scatter_heads_(part.cells(packed_gradient), bucket.tokens, y, True)
        shared.add_gradients(gk, gv)
        TALLY.add(2 * _flop(q, v, ctx.layout))
        return gq, gk, gv, None, None, None


def _flop(q: Tensor, v: Tensor, layout: tuple[Bucket, ...]) -> int:
    """Of the two products of the forward pass. What a chunk multiplies with and does not see is not counted."""
    return 2 * q.shape[1] * sum(bucket.attended_pairs for bucket in layout) * (q.shape[2] + v.shape[2])


class _Prefixes:
    """Keys and values of each shared prefix, (kv_heads, prefix, dim), and the sum of their gradients."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.gradients: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, bucket: Bucket) -> tuple[Tensor, Tensor] | None:
        if not bucket.prefix:
            return None
        where = (bucket.prefix_start, bucket.prefix)
        if where not in self.found:
            span = slice(where[0], sum(where))
            self.found[where] = tuple(x[span].transpose(0, 1).contiguous() for x in (self.k, self.v))  # type: ignore[assignment]
        return self.found[where]

    def gradients_of(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        where = (bucket.prefix_start, bucket.prefix)
        if where not in self.gradients:
            self.gradients[where] = tuple(torch.zeros_like(x) for x in self.found[where])  # type: ignore[assignment]
        return self.gradients[where]

    def add_gradients(self, gk: Tensor, gv: Tensor) -> None:
        for (start, length), gradients in self.gradients.items():
            for y, gradient in zip((gk, gv), gradients, strict=True):
                y[start : start + length] += gradient.transpose(0, 1)


class _Part:
    """One bucket with its queries, keys and values in the layout of batched products: (kv_heads * rows, cells, dim).

    The query heads of a key head stand together, token by token: (kv_heads, rows, width, group, dim).
    """

    def __init__(
        self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, shared: _Prefixes, scale: float, window: int
    ) -> None:
        self.bucket, self.scale, self.window, self.shared = bucket, scale, window, shared
        self.kernels = kernels.of(q)
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.blocks = self.kv_heads * bucket.rows
        self.Q, self.K, self.V = (
            self.kernels.gather_heads(x, bucket.tokens, self.kv_heads).view(self.blocks, -1, x.shape[2])
            for x in (q, k, v)
        )
        self.prefix = shared.of(bucket)

    def cells(self, packed: Tensor) -> Tensor:
        """The same memory as (kv_heads, cells, group * dim)."""
        return packed.view(self.kv_heads, self.bucket.rows * self.bucket.width, -1)

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, self.bucket.width, CHUNK):
            yield _Chunk(self, first, min(CHUNK, self.bucket.width - first))


class _Gradients:
    """Sums over the chunks of a bucket, in its layout."""

    def __init__(self, part: _Part, g_out: Tensor) -> None:
        self.out = g_out
        several = part.bucket.width > CHUNK
        # One chunk writes all of them; several add up the keys' and values'.
        self.Q, self.K, self.V = (
            (torch.zeros_like if several else torch.empty_like)(x) for x in (part.Q, part.K, part.V)
        )
        self.beta = 1 if several else 0


class _Chunk:
    """The products of `queries` tokens of each row, from token `first` on, with all keys that they may see."""

    def __init__(self, part: _Part, first: int, queries: int) -> None:
        self.part = part
        self.lines = slice(first * part.group, (first + queries) * part.group)
        self.keys = slice(0, first + queries)
        self.geometry = Geometry(
            blocks=part.blocks,
            rows=part.bucket.rows,
            queries=queries,
            group=part.group,
            first=first,
            keys=first + queries,
            prefix=part.bucket.prefix,
            window=part.window,
        )

    def _by_head(self, x: Tensor) -> Tensor:
        """(blocks, lines, dim) as (kv_heads, rows * lines, dim): all rows meet a prefix in one product.

        A view where x is contiguous, as what is written into must be.
        """
        return x.reshape(self.part.kv_heads, -1, x.shape[-1])

    def _scores(self, left: Tensor, right: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Left (blocks, lines, dim) with the own keys or values `right`, and with the prefix's."""
        own = torch.bmm(left, right[:, self.keys].transpose(1, 2))
        if prefix is None:
            return own, None
        shared = torch.bmm(self._by_head(left), prefix.transpose(1, 2))
        return own, shared.view(*own.shape[:2], -1)

    def forward(self, out: Tensor) -> Tensor:
        """Writes its lines of out: (blocks, width * group, dim_v). Returns log sum exp of its scores."""
        part, prefix = self.part, self.part.prefix
        own, shared = self._scores(part.Q[:, self.lines], part.K, prefix[0] if prefix else None)
        log_sum: Tensor = part.kernels.softmax_(own, shared, part.bucket.lengths, self.geometry, part.scale)
        y = torch.bmm(own, part.V[:, self.keys])
        if prefix and shared is not None:
            self._by_head(y).baddbmm_(self._by_head(shared), prefix[1])
        out[:, self.lines] = y
        return log_sum

    def backward(self, g: _Gradients, log_sum: Tensor) -> None:
        """Adds to, or writes, the gradients of Q, K and V."""
        part, prefix = self.part, self.part.prefix
        q, g_out = part.Q[:, self.lines], g.out[:, self.lines]
        p, p_shared = self._scores(q, part.K, prefix[0] if prefix else None)
        s, s_shared = self._scores(g_out, part.V, prefix[1] if prefix else None)
        part.kernels.softmax_backward_(
            p, p_shared, s, s_shared, part.bucket.lengths, log_sum, self.geometry, part.scale
        )
        gq = torch.bmm(s, part.K[:, self.keys])
        g.K[:, self.keys].baddbmm_(s.transpose(1, 2), q, beta=g.beta)
        g.V[:, self.keys].baddbmm_(p.transpose(1, 2), g_out, beta=g.beta)
        if prefix and p_shared is not None and s_shared is not None:
            by_head = self._by_head
            by_head(gq).baddbmm_(by_head(s_shared), prefix[0])
            gk, gv = part.shared.gradients_of(part.bucket)
            gk.baddbmm_(by_head(s_shared).transpose(1, 2), by_head(q))
            gv.baddbmm_(by_head(p_shared).transpose(1, 2), by_head(g_out))
        g.Q[:, self.lines] = gq
