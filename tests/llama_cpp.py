"""The real llama.cpp, in this process: the server of the package xllamacpp, asked for probabilities and for ids."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model import gguf_header
from tests.llama_server import start

BEST = 40


class LlamaCpp:
    """A server for one model file, and an adapter laid over it. Keys and values are kept in float32."""

    def __init__(self, model: Path, adapter: Path | None = None, n_ctx: int = 256) -> None:
        self.server = start(model, adapter, n_ctx)
        # A token that is a character of its own is drawn, or nothing is told; the probabilities are those before that.
        self.letter = gguf_header.read_header(model).array("tokenizer.ggml.tokens").index("a")

    def next_tokens(
        self, ids: Sequence[int], first: int, scale: float | None = None, best: int = BEST
    ) -> list[dict[int, float]]:
        """For each beginning of `ids` from `first` tokens on, but the whole: the likeliest next ones, log-probability.

        scale: of the adapter, in the request.
        """
        asked: dict[str, Any] = {"n_predict": 1, "n_probs": best, "temperature": 0.0, "cache_prompt": False}
        asked["logit_bias"] = [[self.letter, 1000.0]]
        if scale is not None:
            asked["lora"] = [{"id": 0, "scale": scale}]
        found = []
        for count in range(first, len(ids)):
            answer = self.server.handle_completions({**asked, "prompt": list(ids[:count])})
            plain = answer if isinstance(answer, dict) else json.loads(answer)
            top = plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append({token["id"]: token["logprob"] for token in top})
        return found


class ServerProcess:
    """The same server, asked over HTTP as any client of llama-server asks it, in a process that is ended by force."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "tests.llama_server", str(model)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), "the server did not start"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request over HTTP, as any client of llama-server would make it."""
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids that a chat request is turned into: rendered, and cut as the server cuts prompts."""
        prompt = self.post("/apply-template", {"messages": messages})["prompt"]
        ids: list[int] = self.post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})[
            "tokens"
        ]
        return ids

    def chat_count(self, messages: list[dict[str, str]]) -> int:
        """How many tokens a chat request itself says that its prompt had."""
        asked = {"messages": messages, "max_tokens": 1, "cache_prompt": False}
        count: int = self.post("/v1/chat/completions", asked)["usage"]["prompt_tokens"]
        return count


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary): after each token, of every next one."""
    return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0].float(), -1)


def differences(ours: Tensor, theirs: list[dict[int, float]], first: int) -> Tensor:
    """How far apart they are, for every token that llama.cpp told."""
    return torch.stack(
        [(ours[first + n - 1, token] - value).abs() for n, top in enumerate(theirs) for token, value in top.items()]
    )


BLOCK = 32


def ours_with_bytes(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """As `log_probabilities`, with what is multiplied with each matrix rounded as llama.cpp's Q8_0 does: in blocks of
    32 to whole numbers up to 127, times a scale in float16.
    """
    frozen = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [module.register_forward_pre_hook(lambda _, given: (_in_bytes(given[0]),)) for module in frozen]
    try:
        return log_probabilities(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def _in_bytes(x: Tensor) -> Tensor:
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-8)
    return ((blocks / scale).round() * scale.half().float()).reshape(x.shape)
