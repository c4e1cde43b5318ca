"""What stands behind `lorafit serve`, without HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.formats import read_examples
from lorafit.data.mask import encode_all
from lorafit.data.rows import Row
from lorafit.export import gguf as export_gguf
from lorafit.infer.generate import end_tokens
from lorafit.infer.server.ask import Ask, Served, UntilStop
from lorafit.infer.server.body import ApiError, Limits, Order, read_order
from lorafit.infer.server.by_llama_cpp import ByLlamaCpp, drops_first_space
from lorafit.infer.server.by_transformers import ByTransformers, sharing_weights
from lorafit.infer.server.guard import Guard
from lorafit.lora.inject import attach
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from tests import tiny
from tests.infer.serving import model, tokenizer

LIMITS = Limits(scale=1.0, max_scale=4.0, temperature=0.0, max_new_tokens=50)
TOOLS_TEMPLATE = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + tiny.CHATML
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}


def ordered(body: dict[str, Any], system: str | None = None, template: str = tiny.CHATML, chat: bool = True) -> Order:
    own = tiny.tokenizer(template)
    backend = ByTransformers([tiny.llama()], [own], 512, 1)
    offered = {"a": Served("a", 0, system, own, end_tokens(tiny.llama(), own))}
    return read_order(json.dumps(body).encode(), chat, offered, LIMITS, backend)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "said",
    [
        [("user", "Hi"), ("assistant", "Hello.")],
        [("user", " 雨?\n"), ("assistant", "🌧"), ("user", "<|im_end|>"), ("assistant", "No."), ("user", "")],
    ],
)
def test_the_prompt_has_the_token_ids_that_training_rendered(said: list[tuple[str, str]], system: str | None) -> None:
    messages = [{"role": role, "content": content} for role, content in said]
    if messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": "Yes"})
    start = [] if system is None else [{"role": "system", "content": system}]
    examples = read_examples([Row({"messages": [*start, *messages]}, "rows.jsonl:1")])
    (row,) = encode_all(examples, tiny.tokenizer(), 512).encoded[:]
    trained = row.input_ids[: len(row.input_ids) - len(messages[-1]["content"].encode()) - 2].tolist()
    assert ordered({"messages": [*start, *messages[:-1]]}).ask.prompt == trained
    assert ordered({"messages": messages[:-1]}, system).ask.prompt == trained  # put in front
    developer = [{**message, "role": "developer"} for message in start]
    assert ordered({"messages": [*developer, *messages[:-1]]}).ask.prompt == trained


def test_tools_are_rendered_as_in_training_unless_none_may_be_called() -> None:
    messages = [{"role": "user", "content": "Will it rain?"}]
    with_reply = [*messages, {"role": "assistant", "content": "No"}]
    row = Row({"messages": with_reply, "tools": [TOOL]}, "rows.jsonl:1")
    (encoded,) = encode_all(read_examples([row]), tiny.tokenizer(TOOLS_TEMPLATE), 512).encoded[:]
    body = {"messages": messages, "tools": [TOOL]}
    prompt = ordered(body, template=TOOLS_TEMPLATE).ask.prompt
    assert prompt == encoded.input_ids[: encoded.prompt_length].tolist()
    assert len(ordered({**body, "tool_choice": "none"}, template=TOOLS_TEMPLATE).ask.prompt) < len(prompt)


def test_a_given_system_message_wins_over_that_of_training() -> None:
    own = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert ordered({"messages": own}, "Be brief.").ask.prompt == ordered({"messages": own}).ask.prompt


def test_what_a_request_leaves_open_is_filled_in() -> None:
    hi = {"messages": [{"role": "user", "content": "Hi"}]}
    ask = ordered(hi).ask
    assert (ask.scale, ask.temperature, ask.max_new_tokens, ask.top_p) == (1.0, 0.0, 50, 1.0)
    asked = ordered({**hi, "scale": -0.5, "temperature": 2, "max_completion_tokens": 7, "seed": -1, "user": "x"}).ask
    assert (asked.scale, asked.temperature, asked.max_new_tokens, asked.seed) == (-0.5, 2.0, 7, 2**32 - 1)
    long = ordered({"prompt": "a" * 500}, chat=False).ask
    assert long.max_new_tokens == 12  # what the context leaves
    assert ordered({**hi, "max_tokens": None, "stop": None, "n": 1, "tools": None}).ask.max_new_tokens == 50


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": [1, 258]}, "token ids are from 0 to 257"),
        ({"prompt": [-1]}, "token ids are from 0"),
        ({"prompt": ["a", "b"]}, "one prompt a request"),
        ({"prompt": ""}, "holds no tokens"),
        ({"prompt": []}, "one prompt a request"),
        ({"prompt": "a", "echo": True}, "echo: Input should be False"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "without stream: true"),
        ({"prompt": "a", "presence_penalty": 1.0}, "not possible with the backend transformers"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "has no json_schema"),
        ({"prompt": "a", "promt": "b"}, "Did you mean 'prompt'?"),
    ],
)
def test_a_wrong_body_is_a_sentence(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ApiError) as error:
        ordered(body, chat=False)
    assert (error.value.status, sentence in error.value.message) == (400, True), error.value.message


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_is_cut_at_the_first_stop_however_it_comes(pieces: list[str], stops: list[str]) -> None:
    cut, text = UntilStop(stops), "".join(pieces)
    out = "".join(cut.push(piece) for piece in pieces)
    rest = "" if cut.found else cut.rest()
    assert cut.found == any(stop in text for stop in stops)
    # Of stops that begin together, whichever ends first is seen first.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert out + rest == text
    else:
        assert text.startswith(out)
        assert any(text[len(out) :].startswith(stop) for stop in stops)
        assert not any(stop in out for stop in stops)


def test_models_that_share_weights_keep_their_adapters_apart() -> None:
    base = tiny.llama()
    before = base(input_ids=torch.tensor([[5, 6]])).logits
    copy = sharing_weights(base)
    attach(
        copy, r=3, alpha=7.0, targets="all-linear", variant="lora", rule="alpha/r", init="gaussian", dropout=0.0,
        rank_pattern={}, alpha_pattern={}, layers=None, seed=0,
    )  # fmt: skip
    for name, parameter in copy.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(base(input_ids=torch.tensor([[5, 6]])).logits, before)
    assert not torch.allclose(copy(input_ids=torch.tensor([[5, 6]])).logits, before)
    own = {parameter.data_ptr() for parameter in base.parameters()}
    assert own <= {parameter.data_ptr() for parameter in copy.parameters()}


@pytest.fixture(scope="module")
def in_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("in_gguf")
    model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    spec = model_spec.read(str(directory))
    loaded = model_load.load(spec, torch.float32)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, directory / "model.gguf", "f32")
    return directory / "model.gguf"


@contextmanager
def by_llama_cpp(file: Path, directory: Path, stops: frozenset[int]) -> Iterator[ByLlamaCpp]:
    directory.mkdir()
    made = ByLlamaCpp(
        file, [], directory, context=64, parallel=1, threads=1, stops=stops, tokenizer=tokenizer()
    )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def test_llama_cpp_ends_at_tokens_that_it_does_not_know_as_ends(in_gguf: Path, tmp_path: Path) -> None:
    def answered(name: str, stops: frozenset[int]) -> tuple[str, str]:
        texts: list[str] = []

        def take(text: str, tokens: int) -> bool:
            texts.append(text)
            return False

        with by_llama_cpp(in_gguf, tmp_path / name, stops) as backend:
            finish = backend.answer(Ask(None, 0.0, tokenizer()("What is it?").input_ids, stops, 20, 0.0), take)
        return "".join(texts), finish

    whole, finish = answered("a", frozenset({1}))
    assert finish == "length"
    letter = next(one for one in whole[3:] if one.isascii())
    (stop,) = tokenizer()(letter).input_ids
    assert answered("b", frozenset({1, stop})) == (whole[: whole.index(letter)], "stop")


def test_llama_cpps_own_port_answers_nobody(in_gguf: Path, tmp_path: Path) -> None:
    with by_llama_cpp(in_gguf, tmp_path / ("long" * 25), frozenset({1})) as backend:  # no room for a socket's path
        address = str(backend._server.listening_address)
        assert address.startswith("http://127.0.0.1:")
        for path, body in (("/v1/completions", b'{"prompt": "a"}'), ("/lora-adapters", b"[]"), ("/tokenize", b"{}")):
            with pytest.raises(urllib.error.HTTPError, match="401") as error:
                urllib.request.urlopen(address + path, body, timeout=30)
            error.value.close()
    with tempfile.TemporaryDirectory(dir="/tmp") as short, by_llama_cpp(in_gguf, Path(short) / "a", frozenset()) as one:
        assert str(one._server.listening_address).endswith("llama.sock")


def test_a_first_space_is_dropped_where_our_decoder_drops_it() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁a": 3, "▁b": 4}, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    assert drops_first_space(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not drops_first_space(tiny.tokenizer())


def test_the_command_line_does_without_the_servers_libraries_until_it_serves() -> None:
    code = "import sys; sys.argv = ['lorafit', 'serve', '--help']\ntry:\n  from lorafit.cli import main; main()\n"
    code += "except SystemExit: pass\nsys.exit(bool({'starlette', 'uvicorn', 'xllamacpp', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True), ("LOCALHOST:80", True), ("127.0.0.1", True), ("127.9.9.9:1", True), ("[::1]", True),
        ("[::1]:8000", True), ("", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example:80", False),
        ("10.0.0.1", False), ("[::2]:80", False), ("evil.example:127", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_a_local_server_answers_under_local_names_alone(host: str, is_local: bool) -> None:
    headers = [(b"host", host.encode())]
    Guard(None, False, 10).check("/", headers)
    if is_local:
        Guard(None, True, 10).check("/", headers)
    else:
        with pytest.raises(ApiError, match="localhost"):
            Guard(None, True, 10).check("/", headers)
