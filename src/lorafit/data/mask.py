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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import Chat, Completion, Example, Message, Plain
from lorafit.data.template import as_chat, render
from lorafit.data.turns import SHOWN_CHARS, Draft, Turn, draft
from lorafit.errors import DataError, ModelError
from lorafit.units import format_count, format_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 256  # rows tokenised in one call: enough to keep its threads busy, few enough to keep offsets small


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row as the model reads it.

    input_ids: (tokens,) int32. supervised: (tokens,) bool; supervised[t]: token t has a loss, predicted from those
    before t, so supervised[0] is False. prompt_length: tokens before the last reply, 0 for running text.
    cut_tokens: how many were cut off at the end.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    prompt_length: int
    origin: str
    cut_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """All rows of a data file. rows: how many there were before running text was split. encoded: one per piece."""

    encoded: tuple[Encoded, ...]
    rows: int

    @property
    def pieces(self) -> int:
        """Rows after running text was split at seq_len: what is trained on."""
        return len(self.encoded)

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(row.input_ids) for row in self.encoded)

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss."""
        return sum(int(row.supervised.sum()) for row in self.encoded)

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return max(len(row.input_ids) for row in self.encoded)

    @property
    def cut_rows(self) -> int:
        """Rows that lost their end."""
        return sum(row.cut_tokens > 0 for row in self.encoded)

    @property
    def cut_tokens(self) -> int:
        """Tokens that were cut off."""
        return sum(row.cut_tokens for row in self.encoded)

    @property
    def summary(self) -> str:
        """One line for the screen."""
        supervised = self.supervised_tokens
        parts = [
            f"{format_count(self.rows)} rows",
            f"{format_count(self.tokens)} tokens (longest {format_count(self.longest)})",
            f"{format_count(supervised)} with a loss ({format_share(supervised, self.tokens)})",
        ]
        if self.pieces != self.rows:
            parts.append(f"split into {format_count(self.pieces)} pieces")
        if self.cut_rows:
            parts.append(f"{format_count(self.cut_rows)} rows cut by {format_count(self.cut_tokens)} tokens")
        return ", ".join(parts)


def encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> EncodedSet:
    """Every example as token ids and mask, in order. seq_len: most tokens of a piece, at least 2.

    Running text longer than seq_len is split; conversations and completions are cut at the end and counted.
    Raises DataError with file:line where a row cannot be trained on, ModelError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError("this tokenizer has no fast version, so it cannot tell which token is which text")
    marks = Marks.of(tokenizer)
    encoded: list[Encoded] = []
    for first in range(0, len(examples), CHUNK_ROWS):
        drafts = [draft(example, tokenizer) for example in examples[first : first + CHUNK_ROWS]]
        encoded += [piece for row in _encode_drafts(drafts, tokenizer, marks) for piece in _fit(row, seq_len)]
    if not any(row.supervised.any() for row in encoded):
        raise DataError(f"none of the {len(examples)} rows has a token with a loss", "Give rows with replies or text")
    return EncodedSet(tuple(encoded), len(examples))


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Encoded]:
    """One example; several pieces only for running text. As encode_all."""
    return list(encode_all([example], tokenizer, seq_len).encoded)


# --- what generation needs ------------------------------------------------------------------------------------------


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant's reply starts: the same as in training.

    Raises DataError as `render` does.
    """
    ids, _ = _tokenise([render(tokenizer, messages, add_generation_prompt=True)], tokenizer)
    _refuse_double_bos(ids[0], tokenizer, "the prompt")
    return ids[0]


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands before the expected reply. Raises DataError for running text, which has no prompt."""
    if isinstance(example, Completion) and tokenizer.chat_template:
        example = as_chat(example)
    if isinstance(example, Chat):
        return encode_prompt(example.messages[:-1], tokenizer)
    if isinstance(example, Plain):
        raise DataError(f"{example.origin} is running text, which has no prompt", "Give rows with a reply")
    return [*Marks.of(tokenizer).bos, *_tokenise([example.prompt], tokenizer)[0][0]]


def expected_reply(example: Example) -> str | None:
    """What an exact match compares with: the last reply as it stands in the row; None for running text.

    A template may trim it, so compare without the whitespace around it.
    """
    if isinstance(example, Chat):
        return example.messages[-1]["content"]
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

Ids = list[int]
Offsets = list[tuple[int, int]]  # first and last + 1 character of each token


@dataclass(frozen=True, slots=True)
class Marks:
    """A tokenizer's special tokens.

    bos: ids that it puts in front of a text by itself, often none. eos: its end-of-sequence token, if it has one.
    control: every added token that is not mere whitespace, and eos: one of these ends a turn.
    """

    bos: tuple[int, ...]
    eos: int | None
    control: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Marks:
        """Read off a tokenizer."""
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a", add_special_tokens=True).input_ids
        first = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
        control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        eos = tokenizer.eos_token_id
        return cls(tuple(full[:first]), eos, frozenset(control if eos is None else control | {eos}))


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Ids], list[Offsets]]:
    """Ids and character offsets of each text, without special tokens but those in the text itself."""
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # no warning about model_max_length: seq_len decides
    )
    return batch["input_ids"], batch["offset_mapping"]


def _encode_drafts(drafts: list[Draft], tokenizer: PreTrainedTokenizerBase, marks: Marks) -> list[Encoded]:
    """Whole texts and prompts in one call each: a fast tokenizer spreads a batch over its threads."""
    all_ids, all_offsets = _tokenise([row.text for row in drafts], tokenizer)
    prompts = iter(_tokenise([turn.prompt for row in drafts for turn in row.turns] or [""], tokenizer)[0])
    rows = []
    for row, ids, offsets in zip(drafts, all_ids, all_offsets, strict=True):
        own = [next(prompts) for _ in row.turns]
        if own:
            ids, offsets = _as_generation_sees(row, ids, offsets, own, tokenizer)
        if row.templated:
            encoded = _supervise_turns(row, ids, offsets, own, marks)
        elif own:
            encoded = _supervise_completion(row, ids, len(own[0]), marks)
        else:
            encoded = _supervise_text(row, ids, marks)
        encoded.supervised[:1] = False
        _refuse_double_bos(encoded.input_ids[:2].tolist(), tokenizer, row.origin)
        rows.append(encoded)
    return rows


def _as_generation_sees(
    row: Draft, ids: Ids, offsets: Offsets, prompts: list[Ids], tokenizer: PreTrainedTokenizerBase
) -> tuple[Ids, Offsets]:
    """Ids that start with every prompt's own ids; see the head of this file. Raises DataError where none do."""
    if ids[: len(prompts[-1])] != prompts[-1]:
        prompt = row.turns[-1].prompt
        (first, rest), (first_offsets, rest_offsets) = _tokenise([prompt, row.text[len(prompt) :]], tokenizer)
        if tokenizer.decode(first + rest) != tokenizer.decode(ids):  # a tokenizer that puts a space before each text
            raise _merged(row, len(prompts) - 1)
        ids = first + rest
        offsets = first_offsets + [(start + len(prompt), end + len(prompt)) for start, end in rest_offsets]
    for number, own in enumerate(prompts):
        if ids[: len(own)] != own:
            raise _merged(row, number)
    return ids, offsets


def _merged(row: Draft, number: int) -> DataError:
    at = len(row.turns[number].prompt)
    around = row.text[max(0, at - SHOWN_CHARS // 2) : at + SHOWN_CHARS // 2]
    return DataError(
        f"{row.origin}: the tokenizer merges the end of the prompt with the start of reply {number + 1} "
        f"(in {around!r}), so generation would see other tokens than training",
        "Remove the whitespace at the start of the reply, or at the end of the prompt",
    )


def _supervise_turns(row: Draft, ids: Ids, offsets: Offsets, prompts: list[Ids], marks: Marks) -> Encoded:
    """A templated conversation: each reply with its end-of-turn token."""
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for turn, prompt in zip(row.turns, prompts, strict=True):
        start = len(prompt)
        end = _turn_end(turn, start, ids, offsets, marks)
        if end is None:
            raise DataError(
                f"{row.origin}: the chat template writes no end-of-turn token after a reply, "
                "so the model would never learn to stop",
                "Use a template that ends an assistant's turn with a special token, such as the tokenizer's eos_token",
            )
        _refuse_early_stop(ids[start : end - 1], {ids[end - 1], marks.eos}, row.origin)
        supervised[start:end] = True
    return Encoded(np.array(ids, dtype=np.int32), supervised, len(prompts[-1]), row.origin)


def _turn_end(turn: Turn, start: int, ids: Ids, offsets: Offsets, marks: Marks) -> int | None:
    """One past the end-of-turn token: the first added token after the reply's text; None if there is none."""
    for number in range(start, len(ids)):
        if offsets[number][0] >= turn.reply_end and ids[number] in marks.control:
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
    return Encoded(np.array(whole, dtype=np.int32), np.arange(len(whole)) >= start, start, row.origin)


def _supervise_text(row: Draft, ids: Ids, marks: Marks) -> Encoded:
    """Running text: all of it, with BOS and end-of-sequence around it."""
    whole = np.array(_between(ids, marks), dtype=np.int32)
    return Encoded(whole, np.ones(len(whole), dtype=np.bool_), 0, row.origin)


def _between(ids: Ids, marks: Marks) -> Ids:
    """BOS, the ids, and end-of-sequence where the text does not end with it already."""
    end = [] if marks.eos is None or ids[-1:] == [marks.eos] else [marks.eos]
    return [*marks.bos, *ids, *end]


def _refuse_early_stop(reply: Ids, stops: set[int | None], origin: str) -> None:
    if not stops.isdisjoint(reply):
        raise DataError(
            f"{origin}: a reply contains the token that ends a reply, so the model would learn to stop there",
            "Remove it from the reply",
        )


def _refuse_double_bos(ids: Ids, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError(
            f"{origin} starts with {tokenizer.bos_token!r} twice, which no model was trained on",
            "Remove it from the text: the tokenizer or the chat template adds it",
        )


def _fit(row: Encoded, seq_len: int) -> list[Encoded]:
    """The row in pieces of at most seq_len tokens. Raises DataError where a cut would leave no token with a loss.

    A piece of running text starts with the last token of the piece before: there it is only read, so that every token
    of the text but the first has a loss exactly once.
    """
    count = len(row.input_ids)
    if count <= seq_len:
        return [row]
    if row.prompt_length == 0:
        starts = range(0, count - 1, seq_len - 1)
        return [_slice(row, start, min(start + seq_len, count), cut_tokens=0) for start in starts]
    if not row.supervised[:seq_len].any():
        raise DataError(
            f"{row.origin}: the prompt alone fills all {seq_len} tokens, so nothing of the reply is left",
            f"Raise --seq-len to {count}, or shorten the row",
        )
    return [_slice(row, 0, seq_len, cut_tokens=count - seq_len)]


def _slice(row: Encoded, start: int, stop: int, cut_tokens: int) -> Encoded:
    supervised = row.supervised[start:stop].copy()
    supervised[0] = False
    return Encoded(row.input_ids[start:stop], supervised, min(row.prompt_length, stop), row.origin, cut_tokens)
