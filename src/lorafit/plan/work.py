"""What a step of training computes: rows of one length that share nothing, or those of a file that was looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lorafit.model.spec import ModelSpec
from lorafit.plan.flops import Flop, causal_pairs, full_step, lora_step

MICRO_TOKENS = 1024


class Pass(NamedTuple):
    """One forward and backward pass over some rows.

    tokens: that the model runs on. predicted: whose logits are computed. predicting: different positions that predict
    something. pairs: of a query and a key that attention multiplies.
    """

    tokens: int
    predicted: int
    predicting: int
    pairs: int


class Work(Protocol):
    """Steps of a run."""

    @property
    def tokens(self) -> float:
        """Of the rows of one step, as they are read."""

    @property
    def micro_tokens(self) -> int:
        """Most tokens of a forward pass, where memory is no matter."""

    def passes(self, micro_tokens: int) -> Sequence[Sequence[Pass]]:
        """The passes of each of some steps, none with more than `micro_tokens` unless a row has more."""


@dataclass(frozen=True)
class Shape:
    """The rows of a run. batch: of an optimizer step. length: tokens of each. loss_share: of tokens with a loss."""

    batch: int
    length: int
    loss_share: float = 1.0
    micro_tokens: int = MICRO_TOKENS

    @property
    def tokens(self) -> float:
        """Of one step."""
        return self.batch * self.length

    def passes(self, micro_tokens: int) -> Sequence[Sequence[Pass]]:
        """A row is never cut."""
        most = max(1, micro_tokens // self.length)
        full, rest = divmod(self.batch, most)
        return [[self._pass(rows) for rows in [most] * full + [rest] * (rest > 0)]]

    def _pass(self, rows: int) -> Pass:
        tokens = rows * self.length
        predicted = max(1, round(self.loss_share * tokens))
        return Pass(tokens, predicted, predicted, causal_pairs([self.length] * rows))


@dataclass(frozen=True)
class Steps:
    """Steps as a file's rows make them. by_micro: most tokens of a pass -> the passes of each of some steps."""

    tokens: float
    by_micro: Mapping[int, Sequence[Sequence[Pass]]]
    micro_tokens: int = MICRO_TOKENS

    def passes(self, micro_tokens: int) -> Sequence[Sequence[Pass]]:
        """Those that were counted. Raises KeyError for another size."""
        return self.by_micro[micro_tokens]


def largest(work: Work, micro_tokens: int) -> tuple[int, int]:
    """(tokens, predicted ones) of the largest pass."""
    every = [one for step in work.passes(micro_tokens) for one in step]
    return max(one.tokens for one in every), max(one.predicted for one in every)


def lora_flop(spec: ModelSpec, r: int, work: Work, micro_tokens: int, ends_early: bool = False) -> Flop:
    """Of one step of LoRA, the mean of those that are known. ends_early: as in 16 bits (docs/plan.md)."""
    steps = work.passes(micro_tokens)
    total = Flop(0, 0, 0)
    for tokens, predicted, predicting, pairs in (one for step in steps for one in step):
        total += lora_step(spec, r, tokens, predicted, pairs, predicting if ends_early else None)
    return _mean(total, len(steps))


def full_flop(spec: ModelSpec, work: Work, micro_tokens: int) -> Flop:
    """The same with all weights trained."""
    steps = work.passes(micro_tokens)
    total = Flop(0, 0, 0)
    for one in (one for step in steps for one in step):
        total += full_step(spec, one.tokens, one.predicted, one.pairs)
    return _mean(total, len(steps))


def _mean(total: Flop, count: int) -> Flop:
    return Flop(round(total.forward / count), round(total.backward / count), round(total.attention / count))
