"""A source -> its rows as tokens, in bounded memory: read, rendered and tokenised a few hundred rows at a time.

While the tokenizer's threads are at one lot of rows, the next is read and rendered. What a large source gives is kept
in the user's cache, under a hash of all that it depends on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit import files
from lorafit.data import store
from lorafit.data.example import Chat, Example, Labelled, Tagged
from lorafit.data.labels import Names, fit_label, fit_tags, reader_of, target_of
from lorafit.data.load import Source
from lorafit.data.long import reach
from lorafit.data.mask import CHUNK_ROWS, EncodedSet, Marks, encode_drafts, fit, refuse_unsupervised
from lorafit.data.rows import Row
from lorafit.data.split import DIGEST, digest, held_out, label_of
from lorafit.data.store import Encoded, Tokens, Writer
from lorafit.data.tokenise import Tokeniser
from lorafit.data.turns import Draft, LossOn, drafts
from lorafit.errors import DataError
from lorafit.units import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a source that is larger the tokens are kept on disk; what is smaller is tokenised in a second or two.
LARGE_BYTES = 8 << 20
# Changes whenever the same rows would become other tokens.
VERSION = 4
# Characters that wait to be tokenised at a time, beside those of one long row.
CHUNK_CHARS = 4 << 20
# Faults that are told one by one; beyond that they are counted.
TOLD = 1000
# Control characters, and what stands for a byte that could not be decoded.
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
ROW = np.dtype([("digest", DIGEST), ("label", "<i4")])  # label: its number, -1 where there is none


@dataclass(frozen=True)
class Reading:
    """How rows are read. fmt: a format's name, None to know it by the columns. rename: column -> new name.

    skip_bad: leave out rows that cannot be used, and count them. seq_len: most tokens of a piece. labels: what texts
    are labelled with, for a model that tells it; None for one that writes text.
    """

    fmt: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    loss_on: LossOn = "replies"
    seq_len: int = 2048
    labels: Names | None = None


@dataclass(frozen=True)
class Data:
    """The rows of a source, encoded, with what is known of them.

    records: (rows,) of ROW, for every record that was read. labels: their names by number. bad: a sentence for each
    row that was left out, at most TOLD. bad_rows: how many there were. unused: columns -> rows in which they stood.
    odd: where characters stand that are no text, at most TOLD; odd_rows: how many. system: the system message that all
    rows begin with, if they do. told: what rows are labelled with, as `Reading.labels`. lost_words: that begin with no
    token of their own, and so have no tag.
    """

    set: EncodedSet
    format: str
    records: NDArray[Any]
    labels: tuple[str, ...]
    bad: tuple[str, ...]
    bad_rows: int
    odd: tuple[str, ...]
    odd_rows: int
    unused: Mapping[str, int]
    system: str | None
    told: Names | None = None
    lost_words: int = 0

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """Which records are held out, about `share` of those that can be used: (records,). As `split.held_out`."""
        usable = np.zeros(len(self.records), dtype=np.bool_)
        usable[self.set.encoded.fact("row")] = True
        held = np.zeros(len(self.records), dtype=np.bool_)
        held[usable] = held_out(self.records["digest"][usable], self.records["label"][usable], share, seed)
        return held

    def remarks(self) -> list[str]:
        """What should not go unnoticed: columns that are not read, rows left out, equal rows."""
        lines = [f"column {name!r} of {format_count(count)} rows is not read" for name, count in self.unused.items()]
        lines += self.left_out()
        if self.lost_words:
            lines.append(f"{format_count(self.lost_words)} words begin with no token of their own and have no tag")
        if self.lost_words:
            lines.append(
                f"{format_count(self.lost_words)} words begin with no token of their own: their tags are not read"
            )
        again = len(self.records) - len(np.unique(self.records["digest"]))
        if again:
            lines.append(f"{format_count(again)} rows are equal to an earlier one")
        return lines

    def left_out(self) -> list[str]:
        """How many rows cannot be used, where there are such."""
        if not self.bad_rows:
            return []
        return [f"{format_count(self.bad_rows)} rows cannot be used and are left out; the first: {self.bad[0]}"]

    def also_in(self, other: Data) -> int:
        """How many of the records the other data has too."""
        return int(np.isin(self.records["digest"], other.records["digest"]).sum())

    def part(self, rows: NDArray[np.bool_]) -> EncodedSet:
        """The pieces of some of the records. rows: (records,)."""
        return replace(
            self.set, encoded=self.set.encoded.part(rows[self.set.encoded.fact("row")]), rows=int(rows.sum())
        )


def encode_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, reading: Reading, on_rows: Callable[[int], None]
) -> Data:
    """All rows of a source, from the cache where an earlier run left them. on_rows: told how many more were done.

    Raises DataError with file:line where a row cannot be used and is not to be skipped.
    """
    cache = files.cache_dir() / "tokens"
    if source.size() < LARGE_BYTES:
        return _encode(source, tokenizer, reading, on_rows, None)
    key = _key(source, tokenizer, reading)
    found = store.kept(cache, key)
    if found is None:
        written = store.begin(cache)
        try:
            _encode(source, tokenizer, reading, on_rows, written)
        except BaseException:
            shutil.rmtree(written, ignore_errors=True)
            raise
        found = store.keep(written, key)
    tokens, facts = store.opened(found)
    records = np.fromfile(found / "records.bin", ROW)
    return _data(tokens, records, facts)


def encode_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, reading: Reading) -> Data:
    """Rows that someone has read already, in memory. Raises DataError as `encode_source` does."""
    writer = Writer()
    encoder = _Encoder(tokenizer, reading, writer)
    encoder.run(iter(rows), lambda count: None)
    facts, records = encoder.facts(), encoder.records()
    data = _data(writer.finish(facts), records, facts)
    refuse_unsupervised(data.set, data.bad)
    return data


def _encode(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    on_rows: Callable[[int], None],
    directory: Path | None,
) -> Data:
    writer = Writer(directory)
    try:
        encoder = _Encoder(tokenizer, reading, writer)
        encoder.run(source.rows(), on_rows)
        facts, records = encoder.facts(), encoder.records()
        if directory is not None:
            records.tofile(directory / "records.bin")
        data = _data(writer.finish(facts), records, facts)
    finally:
        writer.close()
    refuse_unsupervised(data.set, data.bad)
    return data


def _data(tokens: Tokens, records: NDArray[Any], facts: dict[str, Any]) -> Data:
    return Data(
        set=EncodedSet(tokens, len(records) - facts["bad_rows"], facts["rewritten"], facts["told"] is not None),
        format=facts["format"],
        records=records,
        labels=tuple(facts["labels"]),
        bad=tuple(facts["bad"]),
        bad_rows=facts["bad_rows"],
        odd=tuple(facts["odd"]),
        odd_rows=facts["odd_rows"],
        unused=facts["unused"],
        system=facts["system"],
        lost_words=facts["lost_words"],
        told=None if facts["told"] is None else Names.of(facts["told"]),
    )


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> str:
    """A hash of all that the tokens depend on."""
    told: dict[str, Any] = {
        "version": VERSION,
        "source": source.digest(),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
        "special": [str(tokenizer.bos_token), str(tokenizer.eos_token)],
        "reading": asdict(reading),
    }
    if "strftime_now" in told["template"]:  # the text depends on the day
        told["day"] = datetime.date.today().isoformat()
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


class _Encoder:
    """The state of one pass over a source."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading, writer: Writer) -> None:
        self.tokenizer, self.reading, self.writer = tokenizer, reading, writer
        self.tokeniser, self.marks = Tokeniser(tokenizer), Marks.of(tokenizer)
        self.reader = reader_of(reading.fmt, reading.rename, reading.labels.task if reading.labels else "auto")
        self.bad: list[str] = []
        self.odd: list[str] = []
        self.bad_rows = self.odd_rows = self.rewritten = self.lost_words = 0
        self._digests = bytearray()
        self._labels = array("i")
        self._label_numbers: dict[str, int] = {}
        self._systems: set[str | None] = set()
        self._numbers = {name: n for n, name in enumerate(reading.labels.names if reading.labels else ())}

    def run(self, rows: Iterator[Row], on_rows: Callable[[int], None]) -> None:
        """Encode all rows, in order."""
        waiting: Future[list[Encoded | DataError]] | None = None
        with ThreadPoolExecutor(1) as pool:
            for count, ready in self._lots(rows):
                following = pool.submit(self._tokenise, ready)
                if waiting is not None:
                    self._write(waiting.result())
                waiting = following
                on_rows(count)
            if waiting is not None:
                self._write(waiting.result())

    def _lots(self, rows: Iterator[Row]) -> Iterator[tuple[int, list[Draft]]]:
        """(rows, their drafts), a few hundred rows at a time, fewer where they are long."""
        ready: list[Draft] = []
        count = chars = 0
        for number, row in enumerate(rows):
            own = self._drafts(number, row)
            ready += own
            count, chars = count + 1, chars + sum(len(draft.text) + len(draft.rest) for draft in own)
            if count >= CHUNK_ROWS or chars >= CHUNK_CHARS:
                yield count, ready
                ready, count, chars = [], 0, 0
        if count:
            yield count, ready

    def _drafts(self, number: int, row: Row) -> list[Draft]:
        self._digests += digest(row.record)
        told = self.reading.labels
        label = label_of(row.record) if told is None or told.task == "classify" else None
        self._labels.append(-1 if label is None else self._label_numbers.setdefault(label, len(self._label_numbers)))
        try:
            example = self.reader.read(row)
            found = self._drafts_of(example)
        except DataError as error:
            self._leave_out(error)
            return []
        self._note_system(example)
        self._note_odd(found)
        self.rewritten += len(found) > 1
        return [replace(draft, row=number) for draft in found]

    def _drafts_of(self, example: Example) -> list[Draft]:
        limit = reach(self.reading.seq_len)
        if self.reading.labels is None:
            return drafts(example, self.tokenizer, self.reading.loss_on, limit)
        told, cells = self.reading.labels, target_of(example, self._numbers, self.reading.labels)
        if isinstance(example, Tagged):
            starts = np.cumsum([0, *(len(word) + 1 for word in example.words)])[:-1]
            text, own = " ".join(example.words), tuple(starts.tolist())
            return [Draft(text, (), example.origin, templated=False, labels=cells, starts=own)]
        assert isinstance(example, Labelled)  # or it would have no target
        text, rest = example.text[:limit], example.text[limit:]
        if told.task == "classify" and not told.several:
            self._labels[-1] = self._label_numbers.setdefault(example.labels[0], len(self._label_numbers))
        return [Draft(text, (), example.origin, templated=False, rest=rest, labels=cells)]

    def _note_system(self, example: Example) -> None:
        """Which system messages there are, as long as it may be one."""
        if len(self._systems) < 2:
            first = example.messages[0] if isinstance(example, Chat) else {}
            self._systems.add(first.get("content") if first.get("role") == "system" else None)

    def _note_odd(self, found: list[Draft]) -> None:
        hit = next((hit for draft in found if (hit := NO_TEXT.search(draft.text))), None)
        if hit:
            self.odd_rows += 1
            if len(self.odd) < TOLD:
                self.odd.append(f"{found[0].origin} holds U+{ord(hit[0]):04X}")

    def _tokenise(self, ready: list[Draft]) -> list[Encoded | DataError]:
        """In a thread of its own. All at once, and one by one only where one of them cannot be used."""
        try:
            found = [*encode_drafts(ready, self.tokeniser, self.marks)]
        except DataError:
            return [self._one(draft) for draft in ready]
        for draft, row in zip(ready, found, strict=True):
            self.lost_words += len(draft.starts) and len(draft.starts) - int(row.supervised.sum())
        return [*found]

    def _one(self, draft: Draft) -> Encoded | DataError:
        try:
            return encode_drafts([draft], self.tokeniser, self.marks)[0]
        except DataError as error:
            return error

    def _write(self, encoded: Iterable[Encoded | DataError]) -> None:
        for row in encoded:
            try:
                if isinstance(row, DataError):
                    raise row
                pieces = self._fit(row)
            except DataError as error:
                self._leave_out(error)
                continue
            for piece in pieces:
                self.writer.add(piece)

    def _fit(self, row: Encoded) -> list[Encoded]:
        if self.reading.labels is None:
            return fit(row, self.reading.seq_len)
        fitted = fit_tags if self.reading.labels.task == "tag" else fit_label
        return [fitted(row, self.reading.seq_len, self.marks)]

    def _leave_out(self, error: DataError) -> None:
        if not self.reading.skip_bad:
            raise error
        self.bad_rows += 1
        if len(self.bad) < TOLD:
            self.bad.append(str(error))

    def records(self) -> NDArray[Any]:
        """Of every row that was read."""
        records = np.zeros(len(self._labels), ROW)
        records["digest"] = np.frombuffer(bytes(self._digests), DIGEST)
        records["label"] = self._labels
        return records

    def facts(self) -> dict[str, Any]:
        """What is kept beside the tokens."""
        only = next(iter(self._systems)) if len(self._systems) == 1 else None
        return {
            "format": self.reader.format,
            "labels": list(self._label_numbers),
            "bad": self.bad,
            "bad_rows": self.bad_rows,
            "odd": self.odd,
            "odd_rows": self.odd_rows,
            "rewritten": self.rewritten,
            "unused": self.reader.unused,
            "system": only,
            "lost_words": self.lost_words,
            "told": asdict(self.reading.labels) if self.reading.labels else None,
        }
