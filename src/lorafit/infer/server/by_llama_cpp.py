"""Answers by llama.cpp's server, which runs inside this process: the wheel xllamacpp.

Prompts are given as token ids of our own, so that the model sees exactly what training rendered. Each request names its
adapter and its scale. Known traps:
- its cache of prompts in RAM finds prompts by their tokens alone, whatever adapter they were read with: it is off. That
  of a slot is emptied when the adapter or the scale changes.
- it takes any adapter number and any scale: both are checked before.
- it opens an HTTP port of its own, without our token: it gets a socket in a directory of ours, and a random key.
- it sets signal handlers: Python's are put back.
- in a stream it gives text, no ids; a token that it does not know as an end is seen by its probability's id.
- closed before its loop runs, it waits for ever.
- a JSON schema that it does not understand is passed over without a word: each is tried once.
"""

from __future__ import annotations

import ctypes
import functools
import json
import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.infer.server.ask import Ask, Finish, Take

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that are read at once: between two such batches a request can be ended.
BATCH_TOKENS = 512
LONGEST_SOCKET_PATH = 100  # the system's limit is 104 or 108 bytes
KNOWN_SCHEMAS = 64  # that need not be tried again
NO_JSON = "Q"
SURE = 1000.0  # a bias that no logit outweighs
PARAMETERS = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}  # llama.cpp's own would cut choices


class ByLlamaCpp:
    """model, adapters: GGUF files. directory: of ours alone, for a socket. tokenizer: of the base.

    stops: tokens that may end an answer. Raises ModelError where llama.cpp cannot read the files.
    """

    name = "llama.cpp"
    unable: frozenset[str] = frozenset()

    def __init__(
        self,
        model: Path,
        adapters: Sequence[Path],
        directory: Path,
        *,
        context: int,
        parallel: int,
        threads: int,
        stops: frozenset[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.parallel, self.context = parallel, context
        self._adapters, self._drops_first_space = len(adapters), drops_first_space(tokenizer)
        self._no_json = int(tokenizer(NO_JSON, add_special_tokens=False).input_ids[-1])
        self._server = _start(_settings(model, adapters, directory, context, parallel, threads))
        # Asked of one token at least: a server that is closed before its loop has begun to run never ends.
        self._ends = frozenset(token for token in {self._no_json, *stops} if self._is_end(token))
        self._keeps_to = functools.lru_cache(KNOWN_SCHEMAS)(self._try_schema)

    def answer(self, ask: Ask, take: Take) -> Finish:
        """As of `Backend`."""
        if ask.schema is not None and not self._keeps_to(json.dumps(ask.schema)):
            raise ModelError("llama.cpp does not understand the JSON schema", "Use simpler keywords")
        told = _Told(take, self._drops_first_space, ask.stops - self._ends)
        self._complete(self._body(ask, watched=bool(told.stops)), told)
        return told.finish

    def close(self) -> None:
        """Free the model: the last reference ends its threads."""
        del self._server

    def _body(self, ask: Ask, watched: bool) -> dict[str, Any]:
        """The request in llama.cpp's words. watched: with the id of each token."""
        scales = [0.0] * self._adapters
        if ask.adapter is not None:
            scales[ask.adapter] = ask.scale
        body: dict[str, Any] = {
            **PARAMETERS,
            "prompt": ask.prompt,
            "n_predict": ask.max_new_tokens,
            "stream": True,
            "return_progress": True,
            "lora": [{"id": number, "scale": scale} for number, scale in enumerate(scales)],
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "seed": ask.seed,
            "presence_penalty": ask.presence_penalty,
            "frequency_penalty": ask.frequency_penalty,
        }
        if watched:
            body["n_probs"] = 1
        if ask.schema is not None:
            body["json_schema"] = ask.schema
        return body

    def _complete(self, body: dict[str, Any], told: _Told) -> None:
        try:
            # As bytes: what comes back is then bytes too, read here once.
            self._server.handle_completions(json.dumps(body).encode(), told)
        except RuntimeError as error:
            raise ModelError(f"llama.cpp refuses the request: {error}", "Change the request") from None
        if told.error is not None:
            raise told.error

    def _is_end(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at this token."""
        return self._forced(token, None)[0] == "stop"

    def _try_schema(self, schema: str) -> bool:
        """Whether an answer is held to a schema: a letter that begins no JSON must not come."""
        return NO_JSON not in self._forced(self._no_json, json.loads(schema))[1]

    def _forced(self, token: int, schema: dict[str, Any] | None) -> tuple[Finish, str]:
        """How an answer of one token ends, and its text, where this token is made likelier than all others."""
        texts: list[str] = []

        def take(text: str, tokens: int) -> bool:
            texts.append(text)
            return False

        told = _Told(take, False, frozenset())
        ask = Ask(None, 0.0, [token], frozenset(), 1, 0.0, schema=schema)
        self._complete(self._body(ask, watched=False) | {"logit_bias": [[token, SURE]]}, told)
        return told.finish, "".join(texts)


def _settings(model: Path, adapters: Sequence[Path], directory: Path, context: int, parallel: int, threads: int) -> Any:
    import xllamacpp

    made = xllamacpp.CommonParams()
    made.model.path = str(model)
    made.n_ctx, made.n_parallel, made.kv_unified = context * parallel, parallel, False
    made.n_batch = made.n_ubatch = BATCH_TOKENS
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads
    made.cache_ram_mib, made.cache_idle_slots, made.n_ctx_checkpoints = 0, False, 0
    made.fit_params = False  # else it may take another context than it is told to
    made.warmup, made.verbosity, made.ui = False, -1, False
    made.endpoint_slots = made.endpoint_props = made.endpoint_metrics = False
    made.n_threads_http = 1
    made.api_keys = [secrets.token_hex(32)]
    path = directory / "llama.sock"
    if len(str(path).encode()) <= LONGEST_SOCKET_PATH:
        made.hostnames = [str(path)]
    else:
        made.hostnames, made.port = ["127.0.0.1"], 0
    laid = []
    for adapter in adapters:
        one = xllamacpp.CommonAdapterLoraInfo()
        one.path, one.scale = str(adapter), 0.0
        laid.append(one)
    made.lora_adapters = laid
    return made


def _start(settings: Any) -> Any:
    """The server, its model loaded. Raises ModelError."""
    import xllamacpp

    try:
        with _signal_handlers_kept():
            return xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ModelError(f"llama.cpp cannot load {settings.model.path}: {error}", "Is the file whole?") from None


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put back the system's handlers of SIGINT and SIGTERM, as they were. In any thread, unlike `signal.signal`."""
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.restype = put.restype = ctypes.c_void_p
    get.argtypes, put.argtypes = [ctypes.c_int], [ctypes.c_int, ctypes.c_void_p]
    before = {number: get(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            put(number, handler)


class _Told:
    """What llama.cpp says of one answer, chunk by chunk. Called in the thread that asked, with the GIL."""

    def __init__(self, take: Take, drops_first_space: bool, stops: frozenset[int]) -> None:
        self.stops = stops
        self.finish: Finish = "taken"
        self.error: Exception | None = None
        self._take, self._first, self._tokens = take, drops_first_space, 0

    def __call__(self, raw: bytes) -> bool:
        """Whether the answer is to end here."""
        try:
            return self._read(json.loads(raw))
        except Exception as error:  # an exception would be lost in C++
            self.error = error
            return True

    def _read(self, chunk: dict[str, Any]) -> bool:
        if "choices" not in chunk:
            told = chunk.get("error", chunk)
            raise ModelError(f"llama.cpp refuses the request: {told.get('message', told)}", "Change the request")
        if "prompt_progress" in chunk:
            return self._take("", 0)
        (choice,) = chunk["choices"]
        if choice.get("finish_reason"):
            self.finish = "length" if choice["finish_reason"] == "length" else "stop"
            # A chunk may be of several tokens, as those of one character; the end token is not counted.
            tokens = chunk["usage"]["completion_tokens"] - (self.finish == "stop")
            self._take("", tokens - self._tokens)
            return False
        if self.stops and any(token["id"] in self.stops for token in (choice.get("logprobs") or {}).get("content", ())):
            self.finish = "stop"
            return True
        self._tokens += 1
        return self._take(self._piece(choice["text"]), 1)

    def _piece(self, text: str) -> str:
        """A tokenizer that writes words with a space in front drops the one in front of a text; llama.cpp keeps it."""
        if not self._first or not text:
            return text
        self._first = False
        return text.removeprefix(" ")


def drops_first_space(tokenizer: Any) -> bool:
    """Whether decoding leaves out the space in front of a text's first word."""
    last = tokenizer("a b", add_special_tokens=False).input_ids[-1:]
    return bool(tokenizer.decode(last) == "b" and not tokenizer.decode([*last, *last]).startswith("bb"))
