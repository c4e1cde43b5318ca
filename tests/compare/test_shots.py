"""Examples in front of a row: read, never learned, and the row is what it was."""

from __future__ import annotations

import numpy as np

from lorafit.compare.shots import with_examples
from lorafit.data.example import Chat, Completion, Example, Plain
from lorafit.data.mask import encode_all, prompt_ids
from tests import tiny


def chat(question: str, reply: str, system: str | None = None) -> Chat:
    head = ({"role": "system", "content": system},) if system else ()
    messages = (*head, {"role": "user", "content": question}, {"role": "assistant", "content": reply})
    return Chat(messages, f"rows:{question}")


def test_the_same_tokens_have_a_loss_with_examples_as_without() -> None:
    tokenizer = tiny.tokenizer()
    rows: list[Example] = [chat("a?", "yes", "Be brief."), chat("b?", "perhaps", "Be brief.")]
    drawn = [chat(f"{n}?", "no" if n % 2 else "yes", "Be brief.") for n in range(6)]
    longer = with_examples(rows, drawn, 3, 7, templated=True)
    assert longer is not None
    plain, after = (encode_all(some, tokenizer, 512).encoded for some in (rows, longer))
    for own, with_them in zip(plain, after, strict=True):
        learned = [row.input_ids[row.supervised].tolist() for row in (own, with_them)]
        assert learned[0] == learned[1]
        assert len(with_them.input_ids) > len(own.input_ids) + 3 * 10
    text = tokenizer.decode(prompt_ids(longer[0], tokenizer))
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("?") < text.index("a?")


def test_examples_of_different_replies_come_first() -> None:
    drawn = [chat(f"{n}?", "often" if n else "rare") for n in range(20)]
    longer = with_examples([chat("x?", "often")], drawn, 2, 1, templated=True)
    assert longer is not None and isinstance(longer[0], Chat)
    replies = {message["content"] for message in longer[0].messages[:-1] if message["role"] == "assistant"}
    assert replies == {"often", "rare"}


def test_prompts_without_a_template_are_joined_and_running_text_has_no_examples() -> None:
    rows = [Completion("2+2=", "4", "r:1")]
    longer = with_examples(rows, [Completion("1+1=", "2", "r:0")], 4, 0, templated=False)
    assert longer == [Completion("1+1=2\n\n2+2=", "4", "r:1")]
    assert with_examples([Plain("text", "r:1")], [Plain("more", "r:0")], 4, 0, templated=True) is None
    assert np.all([isinstance(row, Chat) for row in with_examples(rows, rows, 1, 0, templated=True) or []])
