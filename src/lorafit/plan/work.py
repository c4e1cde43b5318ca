"""What a step of training computes: rows of one length that share nothing, or those of a file that was looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec
from lorafit.plan.flops import Flop, causal_pairs
from lorafit.plan.steps import Amount, ends_early, once, step, untouched

MICRO_TOKENS = 1024
# What rows begin with is computed once where that saves so much; as in `data.batching`.
MIN_SAVED_TOKENS = 32


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
    """The rows of a run. batch: of an optimizer step. length: tokens of each. loss_share: of tokens with a loss.

    lead: virtual tokens in front of each, which the rows of a pass share. sees_all: whether each token sees all others
    of its row, as an encoder's do.
    """

    batch: int
    length: int
    loss_share: float = 1.0
    micro_tokens: int = MICRO_TOKENS
    lead: int = 0
    sees_all: bool = False

    @property
    def tokens(self) -> float:
        """Of one step."""
        return self.batch * self.length

    def passes(self, micro_tokens: int) -> Sequence[Sequence[Pass]]:
        """A row is never cut."""
        most = max(1, (micro_tokens - self.lead) // self.length)
        full, rest = divmod(self.batch, most)
        return [[self._pass(rows) for rows in [most] * full + [rest] * (rest > 0)]]

    def _pass(self, rows: int) -> Pass:
        own = rows * self.length
        shared = (rows - 1) * self.lead >= MIN_SAVED_TOKENS
        predicted = max(1, round(self.loss_share * own))
        own_pairs = self.length**2 if self.sees_all else causal_pairs([self.length])
        pairs = rows * (own_pairs + self.length * self.lead)
        times = 1 if shared else rows  # that the tokens in front are computed
        return Pass(own + times * self.lead, predicted, predicted, pairs + times * causal_pairs([self.lead]))


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


def amount_of(passes: Sequence[Pass], ends_early: bool = False) -> Amount:
    """What these take together. ends_early: as in 16 bits (docs/plan.md)."""
    tokens, predicted, predicting, pairs = (sum(column) for column in zip(*passes, strict=True))
    return Amount(tokens, predicted, pairs, predicting if ends_early else None, len(passes))


def step_flop(
    spec: ModelSpec, config: MethodConfig, work: Work, micro_tokens: int, labels: int = 0, in_16_bits: bool = False
) -> Flop:
    """Of one step, the mean of those that are known. labels: of a head that tells them apart."""
    steps = work.passes(micro_tokens)
    early = in_16_bits and ends_early(spec, config)
    total = step(spec, config, amount_of([one for own in steps for one in own], early), labels)
    return Flop(*(round(part / len(steps)) for part in (total.forward, total.backward, total.attention)))


def flop_once(spec: ModelSpec, config: MethodConfig, work: Work, micro_tokens: int) -> float:
    """Of one step, what later epochs do not compute again: the forward pass below all that is trained."""
    steps = work.passes(micro_tokens)
    amount = amount_of([one for own in steps for one in own])
    return once(spec, untouched(spec, config), amount.tokens, amount.pairs).total / len(steps)
