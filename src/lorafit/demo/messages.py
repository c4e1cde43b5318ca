"""The demonstration data: messages to a shop's customer service, and the JSON that a clerk would file them under.

`python -m lorafit.demo.messages` writes train.jsonl and test.jsonl beside this file, the same bytes every time.

How a message is labelled (the rule that a tuned model has to find):
intent    what the customer asks for, one of INTENTS.
order     the order number as written, without `#`; null when the message has none.
product   the noun of the message, singular, lower case, as the customer names it; null when it names none.
urgency   high: a deadline, a word such as "urgent" or "asap", or anger. low: says that there is no hurry. Else normal.

Test rows are made of other sentences, cues, products and numbers than training rows (phrases.py); only the way of
putting them together is shared, and the noise: typos, lost capitals, lost punctuation.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorafit.demo.phrases import TEST, TRAIN, Pattern, Phrases
from lorafit.files import write_atomic

T = TypeVar("T")
SYSTEM = "Turn the customer's message into JSON with intent, order, product, urgency."
INTENTS = ("refund", "delivery", "damaged", "cancel", "exchange", "invoice", "setup_help")
URGENCY_SHARES = {"high": 6, "normal": 9, "low": 5}
ROWS = {"train": 560, "test": 100}
SEED = 20
WORDS = range(8, 29)  # of a message; shorter and longer drafts are written anew
ORDER_LETTERS = "ABCDEFGHKLMNPRTUVWXY"  # without those that look like digits (I, O, Q, S, Z), and J
ORDER_FORMS = ("order {n}", "#{n}", "{n}", "order #{n}", "order no. {n}", "order number {n}")
SEVERAL = {"both", "two", "three", "four", "five"}
EMOJI = {"high": "😡", "normal": "🙂", "low": "🙂"}
TYPOS = {
    "please": "plese", "the": "teh", "received": "recieved", "address": "adress", "arrived": "arived", "can't": "cant",
    "don't": "dont", "isn't": "isnt", "it's": "its", "you": "u", "your": "yor", "could": "coud", "with": "wiht",
    "would": "woud", "and": "adn", "back": "bakc", "which": "wich", "where": "were", "there": "ther",
    "instructions": "instructons", "different": "diffrent", "ordered": "orderd", "want": "wnat", "need": "ned",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One message, its labels, and the pattern it was made from (which is not written to the file)."""

    message: str
    intent: str
    order: str | None
    product: str | None
    urgency: str
    pattern: Pattern

    def answer(self) -> str:
        """The reply to learn: JSON with the four keys, in this order."""
        keys = {"intent": self.intent, "order": self.order, "product": self.product, "urgency": self.urgency}
        return json.dumps(keys)

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The example as a chat."""
        contents = {"system": SYSTEM, "user": self.message, "assistant": self.answer()}
        return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


class Picker:
    """Draws from lists so that every item of a list is used about equally often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: Counter[object] = Counter()

    def pick(self, options: Sequence[T]) -> T:
        """One of the least used options."""
        fewest = min(self.used[option] for option in options)
        choice = self.rng.choice([option for option in options if self.used[option] == fewest])
        self.used[choice] += 1
        return choice

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability


def deal(rng: random.Random, shares: dict[str, int], count: int) -> list[str]:
    """`count` labels in random order, their numbers in proportion to the shares over every sum(shares) of them."""
    deck = [label for label, share in shares.items() for _ in range(share)]
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(deck, len(deck))
    return dealt[:count]


def order_numbers(rng: random.Random, count: int) -> list[str]:
    """`count` different numbers such as KD48213, no two with the same digits."""
    digits = rng.sample(range(10_000, 100_000), count)
    return [rng.choice(ORDER_LETTERS) + rng.choice(ORDER_LETTERS) + str(number) for number in digits]


def plural(noun: str) -> str:
    """The plural of a product: `s`, or `es` after a hiss."""
    return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def fill(text: str, noun: str, order: str, tail: str) -> str:
    """Put product, order and tail into a pattern. An empty order removes the part in brackets."""
    text = re.sub(r"\[(.*?)\]", r"\1" if order else "", text)
    article = "an" if noun.startswith(tuple("aeiou")) else "a"
    slots = {"p": noun, "ap": f"{article} {noun}", "ps": plural(noun), "P": noun.capitalize(), "o": order, "t": tail}
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", value)
    return text


def join(parts: list[str]) -> str:
    """Set the parts one after another; after a comma or colon a sentence starts small, unless with I or a number."""
    text = ""
    for part in parts:
        first = part.split(" ", 1)[0]
        keeps = first.startswith(("I'", "#")) or first == "I" or any(c.isupper() for c in first[1:])
        text += " " + (part[0].lower() + part[1:] if text.endswith((",", ":")) and not keeps else part)
    return text.strip()


def refers_back(sentence: str) -> bool:
    """Whether the sentence speaks of the product as "it" or "one", so that it must follow the core."""
    return bool({"it", "it's", "one"} & set(re.findall(r"[\w']+", sentence.lower())))


def parts_of(picker: Picker, phrases: Phrases, core: str, order: str, urgency: str, room: int) -> list[str]:
    """Arrange the core sentence among those that give `order` and `urgency` (each if not ""), and chatter.

    `room` is how many more sentences of chatter are welcome.
    """
    parts = [core]
    if order and picker.chance(0.4):
        parts.insert(0, picker.pick(phrases.before).replace("{n}", order))
    elif order:
        parts.append(picker.pick(phrases.after).replace("{n}", order))
    if room:
        several = SEVERAL & set(core.lower().split())
        detail = picker.pick([d for d in phrases.details if not (several and refers_back(d))])
        parts.insert(0 if picker.chance(0.3) and not refers_back(detail) else len(parts), detail)
    if urgency:
        parts.insert(0 if picker.chance(0.3) else len(parts), picker.pick(phrases.cues[urgency]))
    return parts


def misspell(text: str, word: str) -> str:
    """Put the usual slip in place of the first such word; a capital stays."""
    slip = TYPOS[word]
    text = re.sub(rf"(?<!\S){word}(?!\S)", slip, text, count=1)
    return re.sub(rf"(?<!\S){word.capitalize()}(?!\S)", slip.capitalize(), text, count=1) if slip not in text else text


def typed(picker: Picker, text: str, order: str | None, urgency: str) -> str:
    """What the customer's fingers make of it: no capitals, no punctuation, typos, an emoji. The order is safe."""
    if picker.chance(0.12):
        known = sorted({word.lower() for word in text.split(" ")} & TYPOS.keys())
        text = misspell(text, picker.pick(known)) if known else text
    if picker.chance(0.14):
        text = text.lower()
        if picker.chance(0.6):
            text = re.sub(r"[.,!?](?= |$)", "", text).replace("'", "")
        text = text.replace(order.lower(), order) if order else text
    elif picker.chance(0.12):
        text = text.removesuffix(".")
    return f"{text} {EMOJI[urgency]}" if picker.chance(0.025) else text


def draft(picker: Picker, phrases: Phrases, pattern: Pattern, noun: str, order: str | None, urgency: str) -> str:
    """Write one message around a pattern."""
    hurry = "" if urgency == "normal" else urgency
    tail = " " + picker.pick(phrases.tails[hurry]) if hurry and "{t}" in pattern.text and picker.chance(0.5) else ""
    inside = picker.pick(ORDER_FORMS) if order and "[" in pattern.text and picker.chance(0.65) else ""
    core = fill(pattern.text, noun, inside.replace("{n}", order or ""), tail)
    chatter = picker.chance(0.55 if urgency == "normal" else 0.15)
    parts = parts_of(picker, phrases, core, "" if inside else order or "", "" if tail else hurry, int(chatter))
    if order is None and picker.chance(0.25):
        parts.append(picker.pick(phrases.no_number))
    if picker.chance(0.3):
        parts.insert(0, picker.pick(phrases.greetings))
    if picker.chance(0.25):
        parts.append(picker.pick(phrases.closings))
    return typed(picker, join(parts), order, urgency)


def examples(phrases: Phrases, numbers: list[str], seed: int) -> list[Example]:
    """One example per number, intents and urgencies in fixed shares, a quarter without the number, in random order."""
    picker = Picker(random.Random(seed))
    count = len(numbers)
    urgencies = deal(picker.rng, URGENCY_SHARES, count)
    has_order = deal(picker.rng, {"yes": 3, "": 1}, count)
    has_product = deal(picker.rng, {"yes": 18, "": 1}, count)
    made: list[Example] = []
    for i, number in enumerate(numbers):
        intent, order = INTENTS[i % len(INTENTS)], number if has_order[i] else None
        named = bool(has_product[i]) or intent == "setup_help"
        pattern = picker.pick([p for p in phrases.patterns[intent] if bool(p.kinds) == named])
        product = picker.pick([n for n, kind in phrases.products.items() if kind in pattern.kinds]) if named else None
        noun = product or ""
        message = ""
        while len(message.split()) not in WORDS or any(message == other.message for other in made):
            message = draft(picker, phrases, pattern, noun, order, urgencies[i])
        made.append(Example(message, intent, order, product, urgencies[i], pattern))
    picker.rng.shuffle(made)
    return made


def splits() -> dict[str, list[Example]]:
    """The training and the test examples."""
    numbers = order_numbers(random.Random(SEED), sum(ROWS.values()))
    train, test = numbers[: ROWS["train"]], numbers[ROWS["train"] :]
    return {"train": examples(TRAIN, train, SEED + 1), "test": examples(TEST, test, SEED + 2)}


def jsonl(rows: list[Example]) -> str:
    """The text of a file: one chat a line."""
    return "".join(json.dumps(example.row(), ensure_ascii=False) + "\n" for example in rows)


def main() -> None:
    """Write both files beside this one."""
    for name, rows in splits().items():
        write_atomic(Path(__file__).with_name(f"{name}.jsonl"), jsonl(rows))


if __name__ == "__main__":
    main()
