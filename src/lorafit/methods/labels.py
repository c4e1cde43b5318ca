"""The head that tells labels apart, beside whatever method trains the body: features of a row -> a score a label.

In a decoder that is read by its last token the head takes the place of the output head: a row's last token then
predicts its label as it would predict a word, so batches, packing and the loss are those of any rows. Everywhere else
`Pooled` stands around the body and gives every token of a row what the whole row was pooled to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.engine.engine import Engine, prepare
from lorafit.engine.packing import SIDE_BY_SIDE
from lorafit.errors import AdapterError, ConfigError, listed
from lorafit.methods.depth import check_layer, hidden_at
from lorafit.methods.method import Attached, Method
from lorafit.units import format_count

# Of the head's first weights, as BERT's: small, but not 0, or nothing below it would have a gradient at first.
# Source: Devlin et al. 2019, https://github.com/google-research/bert, modeling.py.
FIRST_DEVIATION = 0.02
# A feature's deviation, relative to its mean, that is only float32's rounding.
SAME = 1e-6
ATTRIBUTE, PREFIX = "_lorafit_label_head", "label_head"
# These put tokens in front of a row, which a mean would count and which would be the first.
IN_FRONT = ("prefix", "prompt")


@dataclass(frozen=True)
class Labels:
    """What a head tells. names: labels or tags by number, sorted. pooling: last, mean, cls, or each token.

    several: whether any number of labels may hold of a row. task: classify, regress or tag. mean, deviation: of the
    training rows' numbers, by which they are standardised. layer: whose hidden states are read, see `methods.depth`;
    None for the last. bias: whether the head has one; as a rule not in the place of an output head, which has none.
    """

    names: tuple[str, ...]
    pooling: str
    several: bool = False
    task: str = "classify"
    mean: float = 0.0
    deviation: float = 1.0
    layer: int | None = None
    bias: bool = True

    @property
    def kind(self) -> str:
        """The loss: one of LOSSES."""
        return "number" if self.task == "regress" else "several" if self.several else "one"

    @property
    def told(self) -> str:
        """What a head does with these, for people."""
        if self.task == "regress":
            return "predicts numbers"
        what = "tags for words" if self.task == "tag" else "labels apart"
        return f"tells {format_count(len(self.names))} {what} ({listed(self.names, 4)})"


class LabelHead(nn.Module):
    """Scores = W x + b in float32, whatever the type of x. x: (..., hidden). Returns (..., labels).

    weight: (labels, hidden), bias: (labels,). kind: of the loss, one of LOSSES. While features are standardised, x is
    (x - mean) / deviation there; `fold` makes that a part of W and b. has_bias: whether there is a b.
    """

    bias: nn.Parameter | None

    def __init__(self, hidden: int, labels: int, seed: int, kind: str = "one", has_bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        first = torch.randn(labels, hidden, generator=torch.Generator().manual_seed(seed % 2**63))
        self.weight = nn.Parameter(FIRST_DEVIATION * first)
        self.register_parameter("bias", nn.Parameter(torch.zeros(labels)) if has_bias else None)
        self.standard: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        x = x.to(self.weight.dtype)
        if self.standard is not None:
            mean, deviation = self.standard
            x = (x - mean) / deviation
        return F.linear(x, self.weight, self.bias)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Read features as so many deviations from their mean, (hidden,) float64 both, until `fold`.

        A feature that is the same everywhere, but for rounding, is only centred.
        """
        varies = deviation > SAME * mean.abs()
        own = self.weight
        self.standard = mean.to(own), torch.where(varies, deviation, torch.ones_like(deviation)).to(own)

    @torch.no_grad()
    def start_at_shares(self, targets: Tensor) -> None:
        """Let a row of mean features be given each label with its share of the rows, whose standardised numbers mean 0.

        Features that are centred say nothing of it, and a bias alone is slow to learn it. targets: as of `nll`.
        """
        if self.kind == "number" or self.bias is None:
            return
        some = torch.empty(len(targets), len(self.bias))
        held = bits(targets, some) if self.kind == "several" else F.one_hot(targets, len(self.bias)).to(some)
        share = (held.sum(0) + 0.5) / (len(targets) + 1)  # of a label that rows held out alone have: not 0
        self.bias.copy_(share.logit() if self.kind == "several" else share.log())

    @torch.no_grad()
    def fold(self) -> None:
        """The same scores of features as they are: W / deviation, and b - W mean / deviation."""
        if self.standard is None:
            return
        mean, deviation = (one.double() for one in self.standard)
        wide = self.weight.double() / deviation
        assert self.bias is not None  # of a head alone
        self.bias.copy_(self.bias.double() - wide @ mean)
        self.weight.copy_(wide)
        self.standard = None

    def nll(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row, in nats or squared deviations: (rows,). scores: (rows, labels).

        targets: (rows,) int64, of a label, or bits of a set or a number.
        """
        return LOSSES[self.kind](scores, targets)


def numbers(targets: Tensor) -> Tensor:
    """Numbers in the cells that `data.labels.bits_of` made: float32, shaped like targets."""
    return (targets << 1).to(torch.uint32).view(torch.float32)


def _of_one(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets, reduction="none")


def _of_several(scores: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, bits(targets, scores), reduction="none").sum(1)


def _of_number(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores[:, 0] - numbers(targets).to(scores.dtype)).square()


# One label of all, any number of them, a number: (scores, targets) -> the loss of each row.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"one": _of_one, "several": _of_several, "number": _of_number}


def bits(sets: Tensor, like: Tensor) -> Tensor:
    """Sets of labels, (rows,), as 0 and 1, shaped and typed like `like`: (rows, labels)."""
    return (sets[:, None] >> torch.arange(like.shape[1], device=sets.device) & 1).to(like.dtype)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """In float32, over the tokens that are no padding."""
    weights = mask.to(torch.float32)[..., None]
    return (hidden.float() * weights).sum(1) / weights.sum(1)


# (hidden states (rows, width, hidden), mask (rows, width)) -> (rows, hidden).
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": lambda hidden, mask: hidden[:, 0]}


@dataclass
class Scores:
    """What a model returns, by the name that the engine reads."""

    logits: Tensor


class Pooled(nn.Module):
    """A body that gives hidden states, read as a whole: rows are padded on the right, side by side.

    Its "logits" are the same at every token of a row: those of what the row was pooled to. layer: as of `Labels`.
    """

    def __init__(
        self, body: nn.Module, head: LabelHead, pooling: str, writes_text: bool, layer: int | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        # A decoder would keep keys and values for tokens to come; an encoder may not know the word.
        self.options = {"use_cache": False} if writes_text else {}
        self.body, self.head, self.pooling, self.config = body, head, pooling, body.config
        self.train(body.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Scores:
        """input_ids, attention_mask: (rows, width). Positions are the body's own: families count them differently."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        run = partial(self.body, input_ids=input_ids, attention_mask=attention_mask, **self.options)
        hidden: Tensor = run().last_hidden_state if self.layer is None else hidden_at(self.body, self.layer, run)
        if self.pooling in POOLINGS:
            hidden = POOLINGS[self.pooling](hidden, attention_mask)[:, None].expand(*hidden.shape[:2], -1)
        return Scores(self.head(hidden))

    def get_input_embeddings(self) -> nn.Module:
        """The body's."""
        return cast(nn.Module, self.body.get_input_embeddings())  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module:
        """The head: what the loss is computed behind."""
        return self.head


# --- put on ---------------------------------------------------------------------------------------------------------


def pooling_of(wanted: str, is_encoder: bool, method: str, task: str = "classify") -> str:
    """last, mean or cls for what was asked for, each where words are tagged. Raises ConfigError for what cannot be.

    What a decoder says at its last token is about the next one, unless it is trained: a head alone finds more in the
    mean (docs/log.md).
    """
    if task == "tag" and wanted != "auto":
        raise ConfigError(f"--pooling {wanted} is given, and a tag is read at its own word", "Leave it out")
    usual = "each" if task == "tag" else "mean" if is_encoder or method == "head" else "last"
    found = usual if wanted == "auto" else wanted
    if found == "cls" and not is_encoder:
        raise ConfigError("--pooling cls: the first token of a decoder has seen no other", "Give last or mean")
    if method in IN_FRONT and (found != "last" or is_encoder):
        raise ConfigError(
            f"--method {method} puts tokens in front of a row, and this head would read them as part of it",
            "Give another method" if task == "tag" else "Give a decoder with --pooling last, or another method",
        )
    return found


def put_head(model: nn.Module, labels: Labels, seed: int) -> nn.Module:
    """The model with a fresh head. Returns the model itself, or a `Pooled` around its body."""
    head = LabelHead(int(model.config.get_text_config().hidden_size), len(labels.names), seed, labels.kind, labels.bias)  # type: ignore[union-attr, operator]
    head.to(next(model.parameters()).device)
    writes_text = model.get_output_embeddings() is not None  # type: ignore[operator]
    if labels.layer is not None:
        check_layer(model, labels.layer)
    if labels.pooling == "last" and writes_text and labels.layer is None:
        model.set_output_embeddings(head)  # type: ignore[operator]
        made = model
    else:
        made = Pooled(body_of(model), head, labels.pooling, writes_text, labels.layer)
    object.__setattr__(made, ATTRIBUTE, head)  # not a second place for its parameters
    return made


def body_of(model: nn.Module) -> nn.Module:
    """What gives hidden states: the model itself, or what is inside of one that writes text, or has a head."""
    if isinstance(model, Pooled):
        return model.body
    return cast(nn.Module, getattr(model, str(getattr(model, "base_model_prefix", "")), model))


def label_head(model: nn.Module) -> LabelHead | None:
    """The head of a model that tells labels apart, else None."""
    return cast("LabelHead | None", getattr(model, ATTRIBUTE, None))


def engine_of(model: nn.Module, share_prefix: bool, release: bool = False) -> Engine:
    """The engine for a model of either task; release: see `prepare`.

    Scores of labels are the head's own, whatever a model does to words'.

    Of a body that is pooled rows stay side by side; its frozen products are made faster all the same.
    """
    engine = prepare(model, share_prefix, release)
    if label_head(model) is not None:
        engine.chunked = True
    if isinstance(model, Pooled):
        positions = getattr(model.config, "max_position_embeddings", None)  # RoBERTa's family leaves out two
        engine.packing = replace(SIDE_BY_SIDE, widest=positions - 2) if isinstance(positions, int) else SIDE_BY_SIDE
        engine.notes = [note for note in engine.notes if not note.startswith("rows are padded")]  # it always is
    return engine


# --- beside a method --------------------------------------------------------------------------------------------------


def with_head(inner: Method) -> Method:
    """A method that trains the head too. The head has no scale: at 0 it reads the base's features."""

    def load_state(model: nn.Module, given: dict[str, Tensor]) -> None:
        own = _own(model)
        _check(own, given)
        inner.load_state(model, {name: value for name, value in given.items() if name not in own})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(given[name])

    return replace(
        inner,
        trainable=lambda model: inner.trainable(model) | _own(model),
        state=lambda model: inner.state(model) | {n: p.detach().to("cpu", copy=True) for n, p in _own(model).items()},
        load_state=load_state,
    )


def attached_with(model: nn.Module, head: LabelHead, attached: Attached) -> Attached:
    """What a method did to a model that has a head already, the head included. Lets the head train."""
    head.requires_grad_(True)
    count = sum(parameter.numel() for parameter in head.parameters())
    outputs = "one number" if head.kind == "number" else f"{format_count(len(head.weight))} labels"
    summary = f"{attached.summary}, and a head of {outputs}"
    return replace(
        attached,
        trainable_params=attached.trainable_params + count,
        total_params=attached.total_params - count,
        summary=summary,
    )


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    head = label_head(model)
    return {f"{PREFIX}.{name}": p for name, p in head.named_parameters()} if head is not None else {}


def _check(own: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]) -> None:
    for name, parameter in own.items():
        if name not in given:
            raise AdapterError(f"{name} is missing: there is no head of labels", "Copy the run again")
        if given[name].shape != parameter.shape:
            raise AdapterError(
                f"{name} has shape {tuple(given[name].shape)}, the model wants {tuple(parameter.shape)}",
                "Is it the head of another model, or of other labels?",
            )
        if not given[name].isfinite().all():
            raise AdapterError(f"{name} holds values that are not finite", "Save the run again, or train it again")
