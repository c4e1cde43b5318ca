"""A real server in a thread, and a client that speaks HTTP to it."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.config import ServeConfig
from lorafit.serve import Up, serve
from tests import tiny
from tests.infer.learned import llama

SECONDS = 60.0


def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny one with a merge, which llama.cpp insists on."""
    made = tiny.tokenizer()
    stated = json.loads(made.backend_tokenizer.to_str())
    stated["model"]["vocab"]["zq"], stated["model"]["merges"] = 258, [["z", "q"]]
    made._tokenizer = Tokenizer.from_str(json.dumps(stated))
    return made


def model() -> LlamaForCausalLM:
    """The tiny model, for that tokenizer."""
    return llama(more_tokens=1)


class Running:
    """`lorafit serve` from enter to exit; what it said is in `said`. Raises what it raised where it did not start."""

    def __init__(self, *runs: object, **settings: Any) -> None:
        given = {"port": 0, "threads": 1, "type": "f32", "max_new_tokens": 400, **settings}
        self._config = ServeConfig(runs=[str(run) for run in runs], **given)
        self._said, self._up = io.StringIO(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            serve(self._config, Console(file=self._said, width=1000), self._ready)
        except BaseException as error:
            self._error = error
        finally:
            self._up.set()

    def _ready(self, up: Up) -> None:
        self.facts, self._stop = up.facts, up.stop
        self._up.set()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._up.wait(SECONDS)
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    @property
    def said(self) -> str:
        return self._said.getvalue()

    def logged(self, *parts: str) -> str:
        """The first line with all of these in it; a request's line comes after its answer."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for line in self.said.splitlines():
                if all(part in line for part in parts):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line with {parts} in:\n{self.said}")

    # --- asking -----------------------------------------------------------------------------------------------------

    @contextmanager
    def open(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.facts["port"], timeout=SECONDS)
        with closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            with connection.getresponse() as response:
                yield response

    def raw(self, *asked: Any, **headers: str) -> tuple[int, Any]:
        """(status, the body as JSON)."""
        with self.open(*asked, headers=headers) as response:
            return response.status, json.loads(response.read())

    def asked(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.raw("POST", path, json.dumps(body).encode())

    def chat(self, question: str, **body: Any) -> str:
        """The text of an answer to one message."""
        status, found = self.asked("/v1/chat/completions", messages=[{"role": "user", "content": question}], **body)
        assert status == 200, found
        return str(found["choices"][0]["message"]["content"])

    def streamed(self, question: str, **body: Any) -> list[dict[str, Any]]:
        """All chunks; that the last event is [DONE] is checked."""
        messages = [{"role": "user", "content": question}]
        raw = json.dumps({"messages": messages, "stream": True, **body}).encode()
        with self.open("POST", "/v1/chat/completions", raw) as response:
            assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: ") for event in events[:-1])
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
