"""`lorafit serve` over real HTTP, with tiny models that were really trained."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from lorafit.config import LoRAConfig, TrainConfig
from lorafit.data.mask import encode_prompt
from lorafit.errors import AdapterError, ConfigError, LorafitError
from lorafit.export import peft
from lorafit.infer import generate
from lorafit.lora.inject import set_scale
from lorafit.methods import lora
from lorafit.opening import open_target
from lorafit.run import Start, train
from tests import tiny
from tests.infer.learned import LEARNED, learn
from tests.infer.serving import Running, model, text_of, tokenizer

SYSTEM = "Answer as you learned."
QUESTIONS = [question for question, _ in LEARNED]
OTHERS = [(question, LEARNED[number - 1][1]) for number, question in enumerate(QUESTIONS)]
CHAT = "/v1/chat/completions"
TOKEN = "0123456789abcdef-of-a-test"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/; law/, a run that knows the rows by heart under a system message; tone/, an adapter with other answers."""
    directory = tmp_path_factory.mktemp("made")
    model().save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    rows = [tiny.chat_row(*pair) for pair in LEARNED]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": SYSTEM})
    tiny.write_rows(directory / "rows.jsonl", rows)
    config = TrainConfig(
        model=str(directory / "model"), data=str(directory / "rows.jsonl"), output=str(directory / "law"), r=8,
        alpha=24.0, batch_size=5, epochs=150, lr=1e-2, precision="fp32", threads=1,
    )  # fmt: skip
    train(config, {}, Start(False, False, time.time()), quiet())
    learned = learn(OTHERS, model(), tokenizer())
    peft.save(learned.model, directory / "tone", LoRAConfig(r=8, alpha=24.0), str(directory / "model"), tokenizer())
    return directory


@pytest.fixture(scope="module")
def dora(made: Path) -> Path:
    """An adapter of a variant that llama.cpp does not have, untrained but not idle."""
    base = model()
    config = LoRAConfig(r=3, alpha=7.0, variant="dora")
    lora.attach(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.METHOD.trainable(base).items():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft.save(base, made / "dora", config, str(made / "model"), tokenizer())
    return made / "dora"


@pytest.fixture(scope="module")
def running(made: Path) -> Iterator[Running]:
    with Running(made / "law", made / "tone", backend="llama.cpp", context=512) as server:
        yield server


@pytest.fixture(scope="module")
def plain(dora: Path) -> Iterator[Running]:
    with Running(dora, queue=1) as server:
        yield server


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def ours(target: Path, questions: list[str], scale: float = 1.0, most: int = 40, **system: str) -> list[str]:
    """What `lorafit chat` says to each question."""
    opened = open_target(str(target), None, 1.0, "fp32", False, quiet())
    if opened.has_adapter:
        set_scale(opened.model, scale)
    start = [{"role": "system", "content": text} for text in system.values()]
    prompts = [encode_prompt([*start, {"role": "user", "content": q}], opened.tokenizer) for q in questions]
    answers = generate.answer(
        opened.model, opened.tokenizer, prompts, batch_size=1, max_new_tokens=most, temperature=0.0, seed=0,
        on_answer=lambda: None,
    )  # fmt: skip
    return [answer.text for answer in answers]


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_our_own_generation_for_each_adapter_also_side_by_side(
    running: Running, made: Path
) -> None:
    expected = {
        "law": ours(made / "law", QUESTIONS, system=SYSTEM),  # the training rows' system message is put in front
        "tone": ours(made / "tone", QUESTIONS),
        "model": ours(made / "model", QUESTIONS),
    }
    assert expected["law"] == [answer for _, answer in LEARNED]
    assert running.facts["backend"] == "llama.cpp"
    wanted = [(name, number) for number in range(len(QUESTIONS)) for name in expected]
    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(lambda one: running.chat(QUESTIONS[one[1]], model=one[0], max_tokens=40), wanted))
    assert got == [expected[name][number] for name, number in wanted]


def test_a_stream_is_the_whole_answer_in_pieces(running: Running) -> None:
    for question, answer in LEARNED:
        chunks = running.streamed(question, model="law", stream_options={"include_usage": True})
        assert text_of(chunks) == answer == running.chat(question, model="law")
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(chunks) > 8
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[-1]["usage"]["completion_tokens"] == len(answer.encode())  # the tokenizer has a token a byte


def test_scale_0_is_the_base_and_no_prompt_is_remembered_for_another_scale(running: Running, made: Path) -> None:
    question, scales = QUESTIONS[0], [1.0, 0.0, 1.0, 0.5, 0.0, -0.5]
    after = [running.chat(question, model="law", scale=scale, max_tokens=40) for scale in scales]
    expected = [ours(made / "law", [question], scale, system=SYSTEM)[0] for scale in scales]
    expected[1] = expected[4] = ours(made / "model", [question], system=SYSTEM)[0]
    for got, text in zip(after, expected, strict=True):
        # At its limit an answer may be in the middle of a character, whose first bytes llama.cpp does not give.
        assert text.startswith(got)
        assert len(got) > 20 or got == text
    assert len(set(after)) == 4
    with Running(made / "law", scale=0.5, context=512) as fresh:
        assert fresh.chat(question, max_tokens=40) == after[3]
        assert fresh.chat(question, scale=0, max_tokens=40) == after[1]


def test_a_prompt_that_was_put_aside_is_not_taken_up_by_another_scale(made: Path) -> None:
    one, other = "The card that I ordered has not come. " * 3, "Once there was a dragon by the sea. " * 3

    def said(server: Running, prompt: str, scale: float) -> str:
        status, found = server.asked("/v1/completions", prompt=prompt, scale=scale, max_tokens=30)
        assert status == 200
        return str(found["choices"][0]["text"])

    with Running(made / "tone", parallel=1, context=256) as server:
        tuned, _, base = (said(server, text, scale) for text, scale in [(one, 1.0), (other, 0.0), (one, 0.0)])
    with Running(made / "tone", parallel=1, context=256) as server:
        assert said(server, one, 0.0) == base != tuned


def test_a_running_text_goes_on(running: Running, made: Path) -> None:
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    for prompt in (text, [text], ids):
        status, found = running.asked("/v1/completions", model="law", prompt=prompt)
        assert (status, found["choices"][0]["text"]) == (200, '{"a": 1}')
        assert found["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8}


def test_an_answer_ends_at_a_stop_or_a_limit(running: Running, plain: Running) -> None:
    def ended(server: Running, **body: Any) -> tuple[str, str]:
        status, found = server.asked(CHAT, messages=[{"role": "user", "content": "Hi"}], **body)
        assert status == 200
        choice = found["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    assert ended(running, model="law", stop='": ') == ('{"a', "stop")
    assert ended(running, model="law", stop=["1", "nowhere"]) == ('{"a": ', "stop")
    assert ended(running, model="law", max_tokens=3) == ('{"a', "length")
    whole, finish = ended(plain, max_tokens=20)
    assert finish == "length"
    assert ended(plain, max_tokens=20, stop=whole[4:6]) == (whole[: whole.index(whole[4:6])], "stop")


def test_sampling_follows_its_seed(running: Running) -> None:
    def drawn(seed: int) -> str:
        return running.chat("Hi", model="model", temperature=1.5, seed=seed, max_tokens=30)

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_answer_is_held_to_a_json_schema_that_is_understood(running: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = running.chat("Hi", model="tone", response_format=wanted, max_tokens=60)
    assert json.loads(answer)["n"] in (7, 8)
    wanted["json_schema"] = {"name": "n", "schema": {"type": "no such type"}}
    messages = [{"role": "user", "content": "Hi"}]
    status, found = running.asked(CHAT, model="tone", messages=messages, response_format=wanted)
    assert (status, found["error"]["code"]) == (400, "not_possible")


def test_what_is_served_is_listed(running: Running) -> None:
    status, found = running.raw("GET", "/v1/models")
    assert status == 200
    assert [one["id"] for one in found["data"]] == ["law", "tone", "model"] == running.facts["models"]
    assert running.raw("GET", "/v1/models/tone")[1] == found["data"][1]
    assert running.raw("GET", "/health") == (200, {"status": "ok"})


# --- what falls back ------------------------------------------------------------------------------------------------


def test_an_adapter_that_llama_cpp_cannot_hold_is_served_by_transformers(plain: Running, dora: Path) -> None:
    assert plain.facts["backend"] == "transformers"
    assert "variant dora" in plain.facts["reason"]
    assert plain.facts["reason"] in plain.said
    expected = ours(dora, QUESTIONS[:2])
    assert [plain.chat(question, max_tokens=40) for question in QUESTIONS[:2]] == expected
    assert text_of(plain.streamed(QUESTIONS[0], max_tokens=40)) == expected[0]
    base = ours(dora.parent / "model", QUESTIONS[:1])[0]
    assert plain.chat(QUESTIONS[0], scale=0, max_tokens=40) == base != expected[0]
    assert plain.chat(QUESTIONS[0], model="model", max_tokens=40) == base
    status, found = plain.asked(CHAT, messages=[{"role": "user", "content": "Hi"}], top_p=0.5)
    assert (status, found["error"]["param"]) == (400, "top_p")
    with pytest.raises(ConfigError, match="variant dora"), Running(dora, backend="llama.cpp"):
        pass


def test_two_adapters_by_transformers_share_the_base_and_are_told_apart(made: Path) -> None:
    with Running(made / "law", f"other={made / 'tone'}", backend="transformers") as server:
        assert server.facts["models"] == ["law", "other", "model"]
        for _ in range(2):
            assert server.chat("Hi", model="law", max_tokens=40) == '{"a": 1}'
            assert server.chat("Hi", model="other", max_tokens=40) == OTHERS[2][1]


# --- refusals -------------------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("status", "code", "body"),
    [
        (400, "bad_json", b"{"),
        (400, "bad_json", b"[1]"),
        (400, "bad_json", b'{"messages": NaN}'),
        (400, "bad_json", b"[" * 100_000),
        (400, "bad_json", b'{"model": "\xff"}'),
        (400, "missing_field", {}),
        (400, "unknown_field", {"messages": HI, "temprature": 1}),
        (400, "invalid_value", {"messages": HI, "temperature": "warm"}),
        (400, "invalid_value", {"messages": HI, "temperature": 3}),
        (400, "invalid_value", {"messages": HI, "max_tokens": 0}),
        (400, "invalid_value", {"messages": HI, "max_tokens": True}),
        (400, "invalid_value", {"messages": HI, "max_tokens": 401}),
        (400, "invalid_value", {"messages": HI, "stream": 1}),
        (400, "invalid_value", {"messages": HI, "n": 2}),
        (400, "invalid_value", {"messages": HI, "logprobs": True}),
        (400, "invalid_value", {"messages": HI, "scale": 4.5}),
        (400, "invalid_value", {"messages": HI, "scale": "1"}),
        (400, "bad_json", b'{"messages": [{"role": "user", "content": "Hi"}], "scale": Infinity}'),
        (400, "invalid_value", b'{"messages": [{"role": "user", "content": "Hi"}], "scale": 1e999}'),
        (400, "invalid_value", {"messages": HI, "scale": 1, "model": "model"}),
        (400, "invalid_value", {"messages": HI, "stop": [""]}),
        (400, "invalid_value", {"messages": "Hi"}),
        (400, "invalid_value", {"messages": [{"role": "pirate", "content": "Hi"}]}),
        (400, "invalid_value", {"messages": [*HI, {"role": "assistant", "content": "a"}]}),
        (400, "context_length_exceeded", {"messages": [{"role": "user", "content": "a" * 600}]}),
        (404, "model_not_found", {"messages": HI, "model": "lav"}),
        (413, "body_too_large", {"messages": [{"role": "user", "content": "a" * 2_000_000}]}),
    ],
)
def test_a_wrong_request_gets_a_status_a_code_and_a_sentence(
    status: int, code: str, body: Any, running: Running
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, found = running.raw("POST", CHAT, raw)
    assert (got, found["error"]["code"]) == (status, code), found
    assert len(found["error"]["message"]) > 10
    assert running.chat("Hi", model="law") == '{"a": 1}'  # nothing is broken by it


def test_a_body_without_a_length_is_measured_as_it_comes(running: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", running.facts["port"]), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(30):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", running.facts["port"]), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with pytest.raises(OSError):  # it does not listen for ever
            for _ in range(1000):
                connection.sendall(chunk)


def test_paths_methods_types_and_hosts_that_are_wrong_are_refused(running: Running) -> None:
    body = json.dumps({"messages": HI}).encode()
    refused = [
        running.raw("GET", "/lora-adapters"),
        running.raw("POST", "/v1/embeddings", body),
        running.raw("GET", CHAT),
        running.raw("POST", CHAT, body, **{"Content-Type": "text/plain"}),
        running.raw("POST", CHAT, body, Host="evil.example"),
        running.raw("GET", "/v1/models", None, Host="evil.example:80"),
    ]
    assert [status for status, _ in refused] == [404, 404, 405, 415, 403, 403]
    assert all({"message", "type", "code"} <= found["error"].keys() for _, found in refused)
    assert running.raw("GET", "/v1/chat/%1b[31m%0aGET")[0] == 404
    assert running.logged(r"GET /v1/chat/\x1b[31m\nGET 404")
    for host in ("localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert running.raw("GET", "/v1/models", None, Host=host)[0] == 200
    with running.open("GET", "/v1/models", headers={"Origin": "http://evil.example"}) as response:
        assert response.getheader("Access-Control-Allow-Origin") is None


def test_a_token_is_asked_for_and_never_shown(dora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    with Running(dora, token_file=str(tmp_path / "token")) as server:
        wrong = [{}, {"Authorization": "Bearer " + TOKEN[:-1]}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}]
        for headers in wrong:
            status, found = server.raw("GET", "/v1/models", None, **headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert server.raw("GET", "/v1/models", None, Authorization=f"Bearer {TOKEN}")[0] == 200
        assert server.raw("GET", "/health")[0] == 200
        assert TOKEN not in server.said
        assert f"$(cat {tmp_path / 'token'})" in server.said
    monkeypatch.setenv("LORAFIT_TOKEN", "short")
    with pytest.raises(ConfigError, match="has 5 characters"), Running(dora):
        pass


def test_what_cannot_be_served_is_one_sentence(
    made: Path, dora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.write_model(tmp_path / "other", seed=1)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        cases: list[tuple[type[LorafitError], str, list[object], dict[str, Any]]] = [
            (ConfigError, "there is no token", [dora], {"host": "0.0.0.0"}),
            (ConfigError, "Address already in use", [dora], {"port": port}),
            (ConfigError, "no address of this machine", [dora], {"host": "no such host"}),
            (ConfigError, "both be called 'dora'", [dora, dora], {}),
            (ConfigError, "is called 'model'", [f"model={dora}"], {}),
            (AdapterError, "two base models", [dora, other], {}),
            (ConfigError, "above --max-scale", [dora], {"scale": 5.0}),
            (ConfigError, "--context 513", [dora], {"context": 513}),
            (ConfigError, "--max-body", [dora], {"max_body": "much"}),
        ]
        for kind, sentence, runs, settings in cases:
            with pytest.raises(kind, match=sentence), Running(*runs, **settings):
                pass
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorafit\[serve\]'"), Running(dora):
        pass


# --- limits and ends ------------------------------------------------------------------------------------------------


def test_the_queue_is_short_and_who_leaves_is_not_answered_any_more(plain: Running) -> None:
    long = json.dumps({"messages": HI, "stream": True}).encode()
    with ThreadPoolExecutor(2) as threads:
        with plain.open("POST", CHAT, long) as first:
            assert first.readline().startswith(b"data: ")
            two = [threads.submit(plain.asked, CHAT, messages=HI, max_tokens=2) for _ in range(2)]
            (refused,), (waiting,) = wait(two, return_when=FIRST_COMPLETED)
            status, found = refused.result()
            assert (status, found["error"]["code"]) == (429, "queue_full")
        assert waiting.result()[0] == 200
    left = plain.logged(" 200 ", "not finished")
    assert int(left.split("+")[1].split()[0]) < 400


def test_a_request_has_a_limited_time(dora: Path) -> None:
    with Running(dora, timeout_s=0.2) as server:
        status, found = server.asked(CHAT, messages=HI)
        assert (status, found["error"]["code"]) == (504, "timeout")
        with server.open("POST", CHAT, json.dumps({"messages": HI, "stream": True}).encode()) as response:
            events = response.read().split(b"\n\n")
        assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "timeout"


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for temporary files in which the path of a socket finds room."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(number: int, code: int, made: Path, short: Path) -> None:
    command = [sys.executable, "-m", "lorafit", "serve", str(made / "law"), "--port", "0", "--json", "--grace-s", "0.1"]
    command += ["--type", "f32", "--backend", "llama.cpp" if number == signal.SIGTERM else "transformers"]
    environment = {**os.environ, "TMPDIR": str(short), "LORAFIT_TOKEN": TOKEN}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            errors, port = _interrupted(process, number)
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert errors.splitlines()[-1].startswith("lorafit: stopped by")
    assert "Traceback" not in errors
    assert TOKEN not in errors
    assert not list(short.iterdir())
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def _interrupted(process: subprocess.Popen[str], number: int) -> tuple[str, int]:
    """Send the signal in the middle of an answer. Returns what the server said, and its port."""
    assert process.stdout is not None
    up = json.loads(process.stdout.readline())
    ports = {c.laddr.port for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert ports == {up["port"]}  # llama.cpp's own server is no second way in
    with socket.create_connection(("127.0.0.1", up["port"]), timeout=30) as client:
        body = json.dumps({"messages": HI, "stream": True, "model": "model", "temperature": 2.0, "max_tokens": 450})
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return errors, up["port"]
