"""An Example -> token ids and which of them have a loss.

What is promised for every reply that has a loss:
- its prompt's ids are exactly those that `encode_prompt` gives for the messages before it, as generation will see them;
- its loss covers the reply and the end-of-turn token, and nothing the template writes after that;
- masks come from positions, never from token ids: pad, end-of-sequence and end-of-turn may be one token.

The template's text is tokenised without the tokenizer's own special tokens, as `apply_chat_template(tokenize=True)`
does: a template writes every special token that it wants, BOS too. Rows without a template get BOS where the tokenizer
adds one.

Where prompt and reply meet, a tokenizer may merge characters of both sides into one token (a prompt that ends in a
space, a reply that starts with a line break). Generation can never produce that token: its prompt has ended. In front
of the last reply this is harmless, as prompt and rest are then tokenised apart, which is what generation does. In front
of an earlier reply it is not: what follows was built on the merged token, and the earlier prompt never sees it, so one
row cannot hold both. That is a DataError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.data import long
from lorafit.data.example import Chat, Completion, Example, Labelled, Message, Plain, Tagged, Tool
from lorafit.data.labels import with_label, with_tags
from lorafit.data.store import Encoded, Tokens, Writer
from lorafit.data.template import as_chat, render
from lorafit.data.tokenise import Text, Tokeniser, Whole
from lorafit.data.turns import SHOWN_CHARS, Draft, LossOn, Turn, drafts
from lorafit.errors import DataError
from lorafit.units import format_count, format_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 256  # rows tokenised in one call: enough to keep its threads busy, few enough to keep offsets small


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """All rows of a data file. encoded: one per piece.

    rows: how many there were before running text and conversations were split. rewritten: conversations that became
    one piece a reply, because the template writes a reply differently once others follow. labelled: whether the last
    cell of each is the number of its label, which is no token.
    """

    encoded: Tokens
    rows: int
    rewritten: int = 0
    labelled: bool = False

    @property
    def pieces(self) -> int:
        """Rows after running text was split at seq_len: what is trained on."""
        return len(self.encoded)

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return int(self.encoded.lengths.sum()) - self.labelled * self.supervised_tokens

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss."""
        return int(self.encoded.fact("supervised").sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return int((self.encoded.lengths - self.labelled * self.encoded.fact("supervised")).max())

    @property
    def cut_rows(self) -> int:
        """Rows that lost their end."""
        return int((self.encoded.fact("cut") > 0).sum())

    @property
    def cut_tokens(self) -> int:
        """Tokens that were cut off."""
        return int(self.encoded.fact("cut").sum(dtype=np.int64))

    @property
    def summary(self) -> str:
        """One line for the screen."""
        supervised = self.supervised_tokens
        parts = [
            f"{format_count(self.rows)} rows",
            f"{format_count(self.tokens)} tokens (longest {format_count(self.longest)})",
            ("each row with a label" if supervised == self.pieces else f"{format_count(supervised)} with a tag")
            if self.labelled
            else f"{format_count(supervised)} with a loss ({format_share(supervised, self.tokens)})",
        ]
        if self.pieces != self.rows:
            parts.append(f"split into {format_count(self.pieces)} pieces")
        if self.rewritten:
            count = format_count(self.rewritten)
            parts.append(f"{count} conversations split into one piece a reply: the template rewrites earlier ones")
        if self.cut_rows:
            parts.append(f"{format_count(self.cut_rows)} rows cut by {format_count(self.cut_tokens)} tokens")
        return ", ".join(parts)


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, loss_on: LossOn = "replies"
) -> EncodedSet:
    """Every example as token ids and mask, in order. seq_len: most tokens of a piece, at least 2.

    Running text longer than seq_len is split; conversations and completions are cut at the end and counted.
    Raises DataError with file:line where a row cannot be trained on, ModelError for a tokenizer without offsets.
    """
    marks, tokeniser = Marks.of(tokenizer), Tokeniser(tokenizer)
    writer, rewritten = Writer(), 0
    for first in range(0, len(examples), CHUNK_ROWS):
        chunk = examples[first : first + CHUNK_ROWS]
        own = [drafts(example, tokenizer, loss_on, long.reach(seq_len)) for example in chunk]
        rewritten += sum(len(some) > 1 for some in own)
        for row in encode_drafts([one for some in own for one in some], tokeniser, marks):
            for piece in fit(row, seq_len):
                writer.add(piece)
    encoded = EncodedSet(writer.finish({}), len(examples), rewritten)
    refuse_unsupervised(encoded)
    return encoded


def refuse_unsupervised(encoded: EncodedSet, bad: Sequence[str] = ()) -> None:
    """Raise DataError where nothing at all has a loss. bad: why rows were left out, the first of them first."""
    if not encoded.rows and bad:
        raise DataError(f"not one row can be used; the first: {bad[0]}", "Give rows that the model can be trained on")
    if not encoded.supervised_tokens:
        raise DataError(f"none of the {encoded.rows} rows has a token with a loss", "Give rows with replies or text")


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Encoded]:
    """One example; several pieces only for running text. As encode_all."""
    return list(encode_all([example], tokenizer, seq_len).encoded[:])


# --- what generation needs ------------------------------------------------------------------------------------------


def encode_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()
) -> list[int]:
    """Token ids of a conversation up to where the assistant's reply starts: the same as in training.

    Raises DataError as `render` does.
    """
    (ids,) = Tokeniser(tokenizer).ids([render(tokenizer, messages, add_generation_prompt=True, tools=tools)])
    _refuse_double_bos(ids, Marks.of(tokenizer), "the prompt")
    return ids


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands before the expected reply. Raises DataError for running text, which has no prompt."""
    if isinstance(example, Completion) and tokenizer.chat_template:
        example = as_chat(example)
    if isinstance(example, Chat):
        return encode_prompt(example.messages[:-1], tokenizer, example.tools)
    if isinstance(example, Plain | Labelled | Tagged):
        raise DataError(f"{example.origin} is text without a reply, which has no prompt", "Give rows with a reply")
    return [*Marks.of(tokenizer).bos, *Tokeniser(tokenizer).ids([example.prompt])[0]]


def expected_reply(example: Example) -> str | None:
    """What an exact match compares with: the last reply as it stands in the row; None for running text.

    A template may trim it, so compare without the whitespace around it.
    """
    if isinstance(example, Chat):
        return str(example.messages[-1]["content"])
    return example.completion if isinstance(example, Completion) else None


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a reply: end-of-sequence, and what the template writes after a reply, which training teaches."""
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        probe = Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "the probe")
        try:
            row = encode(probe, tokenizer, seq_len=1 << 30)[0]
        except DataError:  # a template that no row can be trained with; chatting with the base still works
            return frozenset(stops)
        stops.add(int(row.input_ids[row.supervised][-1]))
    return frozenset(stops)


# --- tokens ---------------------------------------------------------------------------------------------------------

Ids = list[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Marks:
    """A tokenizer's special tokens.

    bos: ids that it puts in front of a text by itself, often none. eos: its end-of-sequence token, if it has one.
    control: every added token that is not mere whitespace, and eos: one of these ends a turn. beginning: its
    beginning-of-sequence token, whoever writes it, as id and as text. closing: ids that end a text with a label: those
    that it puts behind a text by itself, else eos.
    """

    bos: tuple[int, ...]
    eos: int | None
    control: frozenset[int]
    beginning: tuple[int | None, str | None]
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Marks:
        """Read off a tokenizer."""
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a", add_special_tokens=True).input_ids
        first = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
        control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        eos = tokenizer.eos_token_id
        own = frozenset(control if eos is None else control | {eos})
        closing = tuple(full[first + len(bare) :]) or (() if eos is None else (eos,))
        return cls(tuple(full[:first]), eos, own, (tokenizer.bos_token_id, tokenizer.bos_token), closing)


def encode_drafts(rows: Sequence[Draft], tokeniser: Tokeniser, marks: Marks) -> list[Encoded]:
    """Drafts as token ids and mask, uncut; all in one call, as the tokenizer spreads a batch over its threads."""
    is_long = [not row.turns and not row.starts and long.is_long(row.text) for row in rows]
    texts = [row.text for row, alone in zip(rows, is_long, strict=True) if not alone]
    found: Iterator[Text | Ids] = iter(
        tokeniser.whole(texts) if any(row.turns or row.starts for row in rows) else tokeniser.ids(texts)
    )
    return [
        _supervise(row, long.ids_of(row.text, tokeniser) if alone else next(found), tokeniser, marks)
        for row, alone in zip(rows, is_long, strict=True)
    ]


def _supervise(row: Draft, text: Text | Ids, tokeniser: Tokeniser, marks: Marks) -> Encoded:
    if row.starts:
        assert isinstance(text, Whole)  # they were asked for
        encoded = with_tags(text, row.starts, row.labels, marks, row.origin, row.row)
    elif row.labels:
        ids = text if isinstance(text, list | np.ndarray) else text.ids
        encoded = with_label(ids, row.labels[0], marks, row.origin, row.row)
    elif isinstance(text, list | np.ndarray):
        encoded = _supervise_text(row, text, marks)
    elif not row.turns:
        encoded = _supervise_text(row, text.ids, marks)
    else:
        text, starts = _as_generation_sees(row, text, tokeniser)
        encoded = (
            _supervise_turns(row, text, starts, marks)
            if row.templated
            else _supervise_completion(row, text.ids, starts[0], marks)
        )
    if row.whole:
        encoded.supervised[:] = True
    encoded.supervised[:1] = False
    _refuse_double_bos(encoded.input_ids[:2].tolist(), marks, row.origin)
    return replace(encoded, cut_tokens=long.count_tokens(row.rest, tokeniser)) if row.rest else encoded


def _as_generation_sees(row: Draft, text: Text, tokeniser: Tokeniser) -> tuple[Text, list[int]]:
    """A text whose ids start with every prompt's own, and how many each has. Raises DataError where none does.

    See the head of this file.
    """
    prompts = [turn.prompt for turn in row.turns]
    starts = [tokeniser.prompt_tokens(text, prompt) for prompt in prompts]
    if starts[-1] is None:
        apart = tokeniser.joined(row.text, len(prompts[-1]))
        if tokeniser.backend.decode(apart.ids, skip_special_tokens=False) != tokeniser.backend.decode(
            text.ids, skip_special_tokens=False
        ):  # a tokenizer that puts a space before each text
            raise _merged(row, len(prompts) - 1)
        text, starts = apart, [tokeniser.prompt_tokens(apart, prompt) for prompt in prompts]
    found = [start for start in starts if start is not None]
    if len(found) < len(starts):
        raise _merged(row, starts.index(None))
    return text, found


def _merged(row: Draft, number: int) -> DataError:
    at = len(row.turns[number].prompt)
    around = row.text[max(0, at - SHOWN_CHARS // 2) : at + SHOWN_CHARS // 2]
    return DataError(
        f"{row.origin}: the tokenizer merges the end of the prompt with the start of reply {number + 1} "
        f"(in {around!r}), so generation would see other tokens than training",
        "Remove the whitespace at the start of the reply, or at the end of the prompt",
    )


def _supervise_turns(row: Draft, text: Text, starts: list[int], marks: Marks) -> Encoded:
    """A templated conversation: each reply with its end-of-turn token."""
    ids = text.ids
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for turn, start in zip(row.turns, starts, strict=True):
        end = _turn_end(turn, start, text, marks)
        if end is None and row.rest:  # it is cut off
            end = len(ids)
        if end is None:
            raise DataError(
                f"{row.origin}: the chat template writes no end-of-turn token after a reply, "
                "so the model would never learn to stop",
                "Use a template that ends an assistant's turn with a special token, such as the tokenizer's eos_token",
            )
        own_end = marks.eos if row.rest and end == len(ids) else ids[end - 1]
        _refuse_early_stop(ids[start : end - 1], {own_end, marks.eos}, row.origin)
        supervised[start:end] = True
    return Encoded(np.array(ids, dtype=np.int32), supervised, starts[-1], row.origin, row=row.row)


def _turn_end(turn: Turn, start: int, text: Text, marks: Marks) -> int | None:
    """One past the end-of-turn token: the first added token after the reply's text; None if there is none."""
    for number in range(max(start, text.token_at(turn.reply_end)), len(text.ids)):
        if text.ids[number] in marks.control and text.start(number) >= turn.reply_end:
            return number + 1
    return None


def _supervise_completion(row: Draft, ids: Ids, prompt_length: int, marks: Marks) -> Encoded:
    """A prompt and all that follows it, with BOS and end-of-sequence around them."""
    if marks.eos is None:
        raise DataError(
            f"{row.origin}: the tokenizer has no end-of-sequence token, so a reply could not be learned to end",
            "Use a model whose tokenizer has one",
        )
    start = len(marks.bos) + prompt_length
    if start == 0:
        raise DataError(f"{row.origin}: prompt is empty", "Write a prompt, or put the completion into text")
    whole = _between(ids, marks)
    _refuse_early_stop(whole[start:-1], {marks.eos}, row.origin)
    return Encoded(np.array(whole, dtype=np.int32), np.arange(len(whole)) >= start, start, row.origin, row=row.row)


def _supervise_text(row: Draft, ids: Ids, marks: Marks) -> Encoded:
    """Running text: all of it, with BOS and end-of-sequence around it."""
    whole = np.array(_between(ids, marks), dtype=np.int32)
    return Encoded(whole, np.ones(len(whole), dtype=np.bool_), 0, row.origin, row=row.row)


def _between(ids: Ids, marks: Marks) -> Ids:
    """BOS, the ids, and end-of-sequence where the text does not end with it already."""
    end = [] if marks.eos is None or (len(ids) and ids[-1] == marks.eos) else [marks.eos]
    if isinstance(ids, list):
        return [*marks.bos, *ids, *end]
    return np.concatenate([np.array(part, dtype=np.int32) for part in (marks.bos, ids, end)])


def _refuse_early_stop(reply: Ids, stops: set[int | None], origin: str) -> None:
    if not stops.isdisjoint(reply):
        raise DataError(
            f"{origin}: a reply contains the token that ends a reply, so the model would learn to stop there",
            "Remove it from the reply",
        )


def _refuse_double_bos(ids: Ids, marks: Marks, origin: str) -> None:
    token, text = marks.beginning
    if len(ids) > 1 and ids[0] == ids[1] == token:
        raise DataError(
            f"{origin} starts with {text!r} twice, which no model was trained on",
            "Remove it from the text: the tokenizer or the chat template adds it",
        )


def fit(row: Encoded, seq_len: int) -> list[Encoded]:
    """The row in pieces of at most seq_len tokens. Raises DataError where a cut would leave no token with a loss.

    A piece of running text starts with the last token of the piece before: there it is only read, so that every token
    of the text but the first has a loss exactly once.
    """
    count = len(row.input_ids)
    if count <= seq_len:
        if row.cut_tokens:
            raise DataError(
                f"{row.origin}: its first {long.reach(seq_len):,} characters are only {count:,} tokens",
                "Look at the row: is it a run of spaces?",
            )
        return [row]
    if row.prompt_length == 0:
        starts = range(0, count - 1, seq_len - 1)
        return [_slice(row, start, min(start + seq_len, count), cut_tokens=0) for start in starts]
    if not row.supervised[:seq_len].any():
        raise DataError(
            f"{row.origin}: the prompt alone fills all {seq_len} tokens, so nothing of the reply is left",
            f"Raise --seq-len to {count + row.cut_tokens}, or shorten the row",
        )
    return [_slice(row, 0, seq_len, cut_tokens=row.cut_tokens + count - seq_len)]


def _slice(row: Encoded, start: int, stop: int, cut_tokens: int) -> Encoded:
    supervised = row.supervised[start:stop].copy()
    supervised[0] = False
    prompt_length = min(row.prompt_length, stop)
    return Encoded(row.input_ids[start:stop], supervised, prompt_length, row.origin, cut_tokens, row.row)
