import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lorafit.demo import messages
from lorafit.demo.messages import INTENTS, SYSTEM, Example
from lorafit.demo.phrases import TEST, TRAIN, Phrases

HERE = Path(messages.__file__).parent
ORDER = re.compile(r"[A-Z]{2}\d{5}")
PHRASES = {"train": TRAIN, "test": TEST}
# The longest run of words that a training and a test message may share, with the product and the order ("order no.
# AB12345") each masked as one word. It arises from small words and the two masks alone ("of the P from O"), since no
# phrase, pattern or product is in both lists. Counting the order as one word makes this stricter than a plain 8-gram.
SHARED_WORDS = 6


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Example]]:
    return messages.splits()


@pytest.fixture(scope="module")
def everything(splits: dict[str, list[Example]]) -> list[Example]:
    return splits["train"] + splits["test"]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    """Letters and spaces only, in lower case: what is left of a phrase whatever the customer did to it."""
    return " ".join(re.sub(r"[^a-z0-9 ]", "", text.lower().replace("-", " ")).split())


def says(message: str, phrase: str) -> bool:
    return f" {plain(phrase)} " in f" {plain(message)} "


def cues(urgency: str) -> list[str]:
    """All phrases of both splits that say so, the longest first."""
    groups = [group.get(urgency, ()) for phrases in (TRAIN, TEST) for group in (phrases.cues, phrases.tails)]
    return sorted((cue for group in groups for cue in group), key=len, reverse=True)


def masked(example: Example) -> list[str]:
    text = plain(example.message)
    if example.order:
        text = re.sub(rf"\b(order )?(no |number )?{example.order.lower()}\b", "ORDER", text)
    if example.product:
        text = re.sub(rf"\b{example.product}(e?s)?\b", "PRODUCT", text)
    return text.split()


def runs(example: Example, length: int) -> Iterator[tuple[str, ...]]:
    words = masked(example)
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def phrase_lists(phrases: Phrases) -> dict[str, set[str]]:
    lists: dict[str, set[str]] = {}
    for field in fields(Phrases):
        value = getattr(phrases, field.name)
        parts = value.values() if field.name in ("patterns", "cues", "tails") else [value]
        texts = {item if isinstance(item, str) else item.text for part in parts for item in part}
        lists[field.name] = {plain(text.replace("{n}", "")) for text in texts} - {""}
    return lists


@pytest.mark.parametrize("name", ["train", "test"])
def test_the_shipped_file_is_what_the_script_writes(name: str, splits: dict[str, list[Example]]) -> None:
    assert messages.jsonl(splits[name]).encode() == (HERE / f"{name}.jsonl").read_bytes()


def test_the_files_have_560_and_100_rows() -> None:
    assert (len(read("train")), len(read("test"))) == (560, 100)


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_row_is_a_chat_whose_answer_has_the_four_keys_in_order(name: str) -> None:
    for row in read(name):
        system, user, assistant = row["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == SYSTEM and user["content"]
        answer = json.loads(assistant["content"])
        assert list(answer) == ["intent", "order", "product", "urgency"]
        assert json.dumps(answer) == assistant["content"]
        assert answer["intent"] in INTENTS and answer["urgency"] in ("low", "normal", "high")


def test_the_order_of_the_answer_is_the_one_order_in_the_message(everything: list[Example]) -> None:
    for example in everything:
        assert [example.order] * (example.order is not None) == ORDER.findall(example.message), example.message
        assert example.order or not re.search(r"\d{3}", example.message), example.message


def test_the_product_of_the_answer_is_the_one_product_in_the_message(everything: list[Example]) -> None:
    names = [*TRAIN.products, *TEST.products]
    for example in everything:
        found = [n for n in names if re.search(rf"\b{n}(e?s)?\b", example.message, re.IGNORECASE)]
        assert [example.product] * (example.product is not None) == found, example.message


def test_no_message_holds_a_cue_of_another_urgency(everything: list[Example]) -> None:
    for example in everything:
        text = f" {plain(example.message)} "
        for cue in cues(example.urgency):
            text = text.replace(f" {plain(cue)} ", " ")  # "not urgent" is low, though "urgent" alone is high
        others = [cue for urgency in ("low", "high") if urgency != example.urgency for cue in cues(urgency)]
        assert [cue for cue in others if says(text, cue)] == [], example.message


def test_every_low_or_high_message_holds_a_cue_unless_a_typo_hides_it(everything: list[Example]) -> None:
    hidden = 0
    for example in everything:
        if example.urgency != "normal":
            hidden += not any(says(example.message, cue) for cue in cues(example.urgency))
    assert hidden <= 0.05 * len(everything)


def test_intents_are_uniform_and_urgency_and_orders_keep_their_shares(splits: dict[str, list[Example]]) -> None:
    for rows in splits.values():
        intents = Counter(example.intent for example in rows)
        assert set(INTENTS) == set(intents) and max(intents.values()) - min(intents.values()) <= 1
        urgencies = Counter(example.urgency for example in rows)
        assert {u: urgencies[u] / len(rows) for u in urgencies} == {"high": 0.30, "normal": 0.45, "low": 0.25}
        assert len(rows) / 4 == sum(example.order is None for example in rows)
        assert 0 < sum(example.product is None for example in rows) <= len(rows) / 20


def test_no_message_occurs_twice(everything: list[Example]) -> None:
    assert len(everything) == len({plain(example.message) for example in everything})


def test_no_order_number_occurs_twice(everything: list[Example]) -> None:
    digits = [example.order[2:] for example in everything if example.order]
    assert len(digits) == len(set(digits))


def test_train_and_test_have_no_phrase_and_no_product_word_in_common() -> None:
    train, test = phrase_lists(TRAIN), phrase_lists(TEST)
    for name in train:
        assert set() == train[name] & test[name], name
    train_words, test_words = (set(" ".join(p.products).split()) for p in (TRAIN, TEST))
    assert set() == train_words & test_words
    assert len(TRAIN.products) >= 30 and len(TEST.products) >= 12


def test_the_rows_use_the_patterns_and_products_of_their_own_split_only(splits: dict[str, list[Example]]) -> None:
    for name, rows in splits.items():
        for example in rows:
            assert example.pattern in PHRASES[name].patterns[example.intent]
            assert example.product is None or PHRASES[name].products[example.product] in example.pattern.kinds


def test_every_pattern_and_product_is_used(splits: dict[str, list[Example]]) -> None:
    for name, rows in splits.items():
        named = {pattern for group in PHRASES[name].patterns.values() for pattern in group if pattern.kinds}
        assert set() == named - {example.pattern for example in rows}
        assert set() == set(PHRASES[name].products) - {example.product for example in rows}


def test_train_and_test_messages_share_no_long_run_of_words(splits: dict[str, list[Example]]) -> None:
    seen = {run for example in splits["train"] for run in runs(example, SHARED_WORDS + 1)}
    shared = {run for example in splits["test"] for run in runs(example, SHARED_WORDS + 1)} & seen
    assert set() == shared


def test_messages_have_8_to_28_words(everything: list[Example]) -> None:
    assert [e.message for e in everything if not 8 <= len(e.message.split()) <= 28] == []


def test_messages_are_free_of_slips_of_the_script(everything: list[Example]) -> None:
    slips = re.compile(r"[{}\[\]|]|  |^ | $| [.,!?:]|[,:;][.,!?:]|\.\.|\bA? ?a [aeiou]|\ban [^aeiou]|#order|\(\)")
    assert [example.message for example in everything if slips.search(example.message)] == []
