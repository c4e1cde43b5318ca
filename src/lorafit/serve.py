"""`serve` as one straight line: targets -> one base -> what computes -> a server until it is told to stop."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorafit import __version__, files
from lorafit.config import ServeConfig, parse_bytes
from lorafit.data.mask import stop_ids
from lorafit.errors import AdapterError, ConfigError, ModelError
from lorafit.export import gguf as export_gguf
from lorafit.export import peft, saved
from lorafit.infer.generate import end_tokens
from lorafit.infer.server.ask import Backend, Served
from lorafit.infer.server.body import Limits
from lorafit.infer.server.by_llama_cpp import ByLlamaCpp
from lorafit.infer.server.by_transformers import ByTransformers, sharing_weights
from lorafit.infer.server.guard import Guard
from lorafit.infer.server.said import TOKEN_VARIABLE, announce, say
from lorafit.infer.server.work import Work
from lorafit.lora.inject import detach
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.opening import Found, check_same_model, find, load_base, read_base, tokenizer_of
from lorafit.plan import machine
from lorafit.rundir import RunDir
from lorafit.slabs import SLABS, trim_heap
from lorafit.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRA = ("starlette", "uvicorn")
USUAL_CONTEXT = 4096
LEAST_TOKEN_CHARS = 16


@dataclass(frozen=True)
class Target:
    """One of the things to serve. text: what it was given as, without its name."""

    name: str
    text: str
    found: Found


@dataclass(frozen=True)
class Up:
    """A server that listens. facts: for --json. stop: ends it, from any thread."""

    facts: dict[str, Any]
    stop: Callable[[], None]


def serve(config: ServeConfig, console: Console, ready: Callable[[Up], None]) -> None:
    """Answer requests until a signal comes, or `Up.stop` is called. ready: called once it listens.

    Raises Interrupted on a signal, LorafitError for whatever the user can mend.
    """
    _need_extra()
    from lorafit.infer.server import app, listen

    guard = _guard(config, listen.is_loopback(config.host))
    limits = Limits(config.scale, config.max_scale, config.temperature, config.max_new_tokens)
    if abs(config.scale) > config.max_scale:
        raise ConfigError(f"--scale {config.scale:g} is above --max-scale {config.max_scale:g}", "Raise --max-scale")
    targets = _targets(config.runs)
    torch.set_num_threads(config.threads or machine.usual_threads())
    with (
        listen.ended_by_signals(),
        tempfile.TemporaryDirectory(prefix="lorafit-serve-") as directory,
        listen.bound(config.host, config.port) as socket,
    ):
        spec = _one_base(targets)
        backend, served, reason = _open(config, spec, targets, Path(directory), console)
        offered, work = {one.name: one for one in served}, Work(backend, config.queue)
        service = app.Service(offered, work, limits, guard, config.timeout_s, lambda line: say(console, line))
        listener = listen.Listener(service.app, work, config.grace_s, backend.parallel + config.queue)
        facts = {
            "host": config.host, "port": socket.getsockname()[1], "local": guard.local, "models": list(offered),
            "backend": backend.name, "reason": reason, "context": backend.context, "parallel": backend.parallel,
        }  # fmt: skip

        def up() -> None:
            announce(config, offered, facts, console)
            ready(Up(facts, listener.stop))

        try:
            listener.run(socket, up)
        finally:
            backend.close()


def _need_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs {' and '.join(missing)}, which is not installed", "Install it: pip install 'lorafit[serve]'"
        )


def _guard(config: ServeConfig, local: bool) -> Guard:
    """Raises ConfigError where others could ask without a token."""
    token = _token(config)
    if token is None and not local:
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and there is no token",
            f"Give one by --token-file or {TOKEN_VARIABLE}, such as that of `openssl rand -hex 24`",
        )
    return Guard(token, local, parse_bytes(config.max_body, "--max-body"))


def _token(config: ServeConfig) -> str | None:
    """From the file or the environment, None where there is neither. Raises ConfigError, which never shows it."""
    name = config.token_file or TOKEN_VARIABLE
    try:
        found = Path(config.token_file).read_text() if config.token_file else os.environ.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--token-file {config.token_file} cannot be read: {reason}", "Check the path") from None
    if found is None:
        return None
    token = found.strip()
    if len(token) < LEAST_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token in {name} has {len(token)} characters, or others than printable ASCII",
            f"Take at least {LEAST_TOKEN_CHARS}, such as those of `openssl rand -hex 24`",
        )
    return token


# --- what is served -------------------------------------------------------------------------------------------------


def _targets(texts: Sequence[str]) -> list[Target]:
    """What was given, under its names, which differ. Raises ConfigError."""
    targets = [_target(text) for text in texts]
    names = [target.name for target in targets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        first, second = [target.text for target in targets if target.name == twice[0]][:2]
        raise ConfigError(
            f"{first} and {second} would both be called {twice[0]!r}", f"Give one another name: other={second}"
        )
    return targets


def _target(text: str) -> Target:
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return Target(_name(text), text, find(text, None))
    if not name or not rest:
        raise ConfigError(f"{text!r} names nothing", "Give NAME=PATH, or PATH alone")
    return Target(name, rest, find(rest, None))


def _name(text: str) -> str:
    """Of a path its last part; of the adapter inside a run, the run's; a hub id or an installed model as it is."""
    path = Path(text).expanduser()
    if not path.exists():
        return text
    path = path.resolve()
    if path.name == "adapter" and RunDir(path.parent).exists:
        path = path.parent
    return path.name.removesuffix(".gguf")


def _one_base(targets: Sequence[Target]) -> model_spec.ModelSpec:
    """The base of all targets. Raises AdapterError where there are two, or one that is rounded in two ways."""
    first, spec = targets[0], _base(targets[0])
    for other in targets[1:]:
        own = _base(other)
        if own.path != spec.path and model_spec.sha256(own) != model_spec.sha256(spec):
            raise AdapterError(
                f"{first.text} and {other.text} stand on two base models, {first.found.base} and {other.found.base}",
                "Serve each by a server of its own, on another --port",
            )
    # Blocks that were kept hold the same numbers as those that were decoded at once.
    as_it_is = {"auto": "it is", "keep": "it is"}
    storages = {as_it_is.get(target.found.storage, target.found.storage) for target in _with_adapters(targets)}
    if len(storages) > 1:
        raise AdapterError(
            f"these runs were trained on their base as {' and as '.join(sorted(storages))}, which are two models",
            "Serve each by a server of its own, on another --port",
        )
    return spec


def _base(target: Target) -> model_spec.ModelSpec:
    """The base of a target, the one it was trained on. Raises ModelError, AdapterError."""
    spec = read_base(target.text, target.found)
    check_same_model(target.text, target.found, spec)
    labels = saved.labels_of(target.found.adapter) if target.found.adapter is not None else None
    if labels is not None:
        raise ConfigError(f"{target.text} {labels.told} and writes no text", "Leave it out; `lorafit eval` uses it")
    if target.found.adapter is not None and saved.method_of(target.found.adapter) == "full":
        raise AdapterError(
            f"{target.text} was trained by --method full: it is another model, and no adapter beside its base",
            f"Merge it and serve that: lorafit merge {target.text} -o DIR",
        )
    return spec


def _with_adapters(targets: Sequence[Target]) -> list[Target]:
    return [target for target in targets if target.found.adapter is not None]


def _offered(
    targets: Sequence[Target],
    adapters: Sequence[tuple[PreTrainedTokenizerBase, frozenset[int]]],
    base: tuple[PreTrainedTokenizerBase, frozenset[int]],
) -> list[Served]:
    """What a request can name: the targets in order, and the base. adapters: tokenizer and end tokens of each."""
    served: list[Served] = []
    for target in targets:
        number = sum(one.adapter is not None for one in served) if target.found.adapter else None
        tokenizer, stops = base if number is None else adapters[number]
        served.append(Served(target.name, number, target.found.system, tokenizer, stops))
    if len(adapters) == len(targets):
        name = _name(targets[0].found.base)
        if name in {one.name for one in served}:
            raise ConfigError(
                f"a run is called {name!r}, as its base model is", f"Give it another name: NAME={targets[0].text}"
            )
        served.append(Served(name, None, None, *base))
    return served


# --- what computes --------------------------------------------------------------------------------------------------


def _open(
    config: ServeConfig, spec: model_spec.ModelSpec, targets: Sequence[Target], directory: Path, console: Console
) -> tuple[Backend, list[Served], str | None]:
    """By llama.cpp where it can, else by transformers with the reason why. Raises ModelError, AdapterError."""
    context = _context(config, spec)
    reason: str | None = "--backend transformers"
    if config.backend != "transformers":
        reason = _why_not_llama_cpp(spec, targets)
        if reason is None:
            try:
                return *_by_llama_cpp(config, spec, targets, directory, context, console), None
            except (AdapterError, ModelError) as error:
                if config.backend == "llama.cpp":
                    raise
                reason = error.what
        if config.backend == "llama.cpp":
            raise ConfigError(f"--backend llama.cpp cannot be had: {reason}", "Leave it out")
        say(console, f"by transformers, which is slower and answers one request at a time: {reason}")
    return *_by_transformers(config, spec, targets, context), reason


def _context(config: ServeConfig, spec: model_spec.ModelSpec) -> int:
    known = spec.max_positions
    if config.context is not None and known and config.context > known:
        raise ConfigError(f"--context {config.context} is more than {spec.name} can read, {known}", "Lower it")
    return config.context or min(known or USUAL_CONTEXT, USUAL_CONTEXT)


def _why_not_llama_cpp(spec: model_spec.ModelSpec, targets: Sequence[Target]) -> str | None:
    """What can be told before anything large is read."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "xllamacpp is not installed; it comes with pip install 'lorafit[serve]'"
    for target in _with_adapters(targets):
        where = target.found.adapter or Path()
        if (method := saved.method_of(where)) != "lora":
            return f"{target.name} was trained by --method {method}, which llama.cpp has not"
        adapter = peft.read_config(where)
        if adapter.variant != "lora":
            return f"{target.name} is an adapter of variant {adapter.variant}, which llama.cpp has not"
        if adapter.tokens:
            return f"{target.name} has trained embeddings of tokens, which a GGUF LoRA file cannot hold"
    if spec.kind == "hf" or _with_adapters(targets):
        try:
            export_gguf.architecture_of(spec)
        except ModelError as error:
            return error.what
    return None


def _by_llama_cpp(
    config: ServeConfig,
    spec: model_spec.ModelSpec,
    targets: Sequence[Target],
    directory: Path,
    context: int,
    console: Console,
) -> tuple[Backend, list[Served]]:
    """Write what llama.cpp reads, let go of our own model, start it. Raises ModelError, AdapterError."""
    adapters = _with_adapters(targets)
    base_file = _base_file(config, spec, adapters)
    loaded: model_load.Loaded | None = None
    if adapters or not base_file.is_file():
        # For adapters only the names and shapes of its layers count: in 16 bits it takes the least memory.
        precision = "bf16" if base_file.is_file() else "fp32"
        loaded, _ = load_base(_rounded(targets), spec, precision, config.trust_remote_code)
        if not base_file.is_file():
            export_gguf.write_model(loaded.model, loaded.tokenizer, spec, base_file, config.type)
            size = format_bytes(base_file.stat().st_size)
            say(console, f"wrote {base_file} ({size}), {spec.name} for llama.cpp; kept for the next time")
    told = []
    for number, target in enumerate(adapters):
        assert loaded is not None and target.found.adapter is not None
        peft.load(loaded.model, target.found.adapter)
        export_gguf.write_adapter(loaded.model, spec, directory / f"{number}.gguf")
        tokenizer = tokenizer_of(target.found.adapter, loaded.model, loaded.tokenizer)
        told.append((tokenizer, end_tokens(loaded.model, tokenizer)))
        detach(loaded.model)
    own = loaded.tokenizer if loaded else model_load.load_tokenizer(spec, config.trust_remote_code)
    base = (own, end_tokens(loaded.model, own) if loaded else stop_ids(own))
    served = _offered(targets, told, base)
    del loaded
    _free()
    backend = ByLlamaCpp(
        base_file,
        [directory / f"{number}.gguf" for number in range(len(adapters))],
        directory,
        context=context,
        parallel=config.parallel,
        threads=config.threads or machine.usual_threads(),
        stops=frozenset().union(*(one.stops for one in served)),
        tokenizer=own,
    )
    return backend, served


def _base_file(config: ServeConfig, spec: model_spec.ModelSpec, adapters: Sequence[Target]) -> Path:
    """The GGUF file of the base: its own, or the one that is written once for its bytes, its rounding and its type."""
    if spec.kind == "gguf":
        return spec.path
    storage = adapters[0].found.storage if adapters else "auto"
    name = f"{model_spec.sha256(spec)[:32]}-{storage}-{config.type}-{__version__}.gguf"
    return files.cache_dir() / "gguf" / name


def _rounded(targets: Sequence[Target]) -> Found:
    """Of the targets, all of one base, one that knows how that was rounded and computed in training."""
    return next(iter(_with_adapters(targets)), targets[0]).found


def _free() -> None:
    """Give the memory of a model that nothing refers to back to the system."""
    gc.collect()
    SLABS.release()
    trim_heap()


def _by_transformers(
    config: ServeConfig, spec: model_spec.ModelSpec, targets: Sequence[Target], context: int
) -> tuple[Backend, list[Served]]:
    loaded, _ = load_base(_rounded(targets), spec, config.precision, config.trust_remote_code)
    models, told = [], []
    for target in _with_adapters(targets):
        assert target.found.adapter is not None
        own = replace(loaded, model=sharing_weights(loaded.model))
        saved.load(own.model, target.found.adapter)
        tokenizer = tokenizer_of(target.found.adapter, own.model, own.tokenizer)
        models.append(own.model)
        told.append((tokenizer, end_tokens(own.model, tokenizer)))
    base = (loaded.tokenizer, end_tokens(loaded.model, loaded.tokenizer))
    served = _offered(targets, told, base)
    tokenizers = [tokenizer for tokenizer, _ in [*told, base]]
    threads = config.threads or machine.usual_threads()
    return ByTransformers([*models, loaded.model], tokenizers, context, threads), served
