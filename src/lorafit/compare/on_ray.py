"""Trials on a Ray cluster: each is a task, which runs the same child process on its node and says what it said.

Nodes share one file system: runs, rows and records lie where the comparison's directory is. What a node cannot reach is
said before anything runs.
"""

from __future__ import annotations

import importlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit import __version__, files
from lorafit.errors import ConfigError, LorafitError
from lorafit.trials import child

# Ray would otherwise tell its makers of every start.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# How often Ray starts a task again whose worker died.
RETRIES = 1
CHECK = ".ray"
KNOCK_S = 5.0
POLL_S = 0.5


@dataclass(frozen=True)
class Cluster:
    """Ray, connected. cpus: that a trial takes. slots: trials that run at the same time.

    under_way: tasks that a thread waits for. stopping: set when they are to be given up.
    """

    ray: Any
    cpus: int
    slots: int
    under_way: set[Any] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def call(self, work: str, arguments: tuple[Any, ...], log: Path) -> dict[str, Any]:
        """As `child.call`, on some node. A worker that died is Killed: the trial may be run again."""
        task = self.ray.remote(num_cpus=self.cpus, max_retries=RETRIES)(_on_worker)
        said = task.remote(work, arguments, str(log))
        self.under_way.add(said)
        try:
            while not self.ray.wait([said], timeout=POLL_S)[0]:
                if self.stopping.is_set():
                    raise child.Killed("it was given up")
            kind, value = self.ray.get(said)
        except self.ray.exceptions.RayError as error:
            raise child.Killed(f"its Ray worker died: {_first_line(error)}; see {log}") from None
        finally:
            self.under_way.discard(said)
        if kind == "done":
            found: dict[str, Any] = value
            return found
        raise (child.Killed if kind == "killed" else child.Refused)(*value)

    def check(self, directory: Path, paths: Sequence[str], look: Callable[[], Any]) -> None:
        """Every node must read what trials need. look: says what it finds there, the same everywhere.

        Raises ConfigError that names the node and what it lacks.
        """
        told = secrets.token_hex(8)
        files.write_atomic(directory / CHECK, told)
        wanted = look()
        try:
            for node in _nodes(self.ray):
                where = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = self.ray.remote(num_cpus=0, scheduling_strategy=where)(_reached)
                name = node["NodeManagerAddress"]
                try:
                    lacks = self.ray.get(task.remote(str(directory / CHECK), told, list(paths), look, wanted))
                except self.ray.exceptions.RayError as error:
                    raise ConfigError(
                        f"--ray: the node {name} cannot run lorafit: {_first_line(error)}",
                        "Install the same lorafit there, and in the same version of Python",
                    ) from None
                if lacks:
                    raise ConfigError(
                        f"--ray: the node {name} {lacks}",
                        "All nodes need model, rows and -o under the same path: put them on a file system they share",
                    )
        finally:
            (directory / CHECK).unlink(missing_ok=True)

    def close(self) -> None:
        """End what is under way on it. Ray ends this process if a thread still asks it for something afterwards."""
        self.stopping.set()
        while self.under_way:
            time.sleep(POLL_S / 4)
        self.ray.shutdown()


def connect(address: str, threads: int | None) -> Cluster:
    """A cluster at an address: `auto`, HOST:PORT, or `local` for one of this machine alone, which ends with us.

    A trial takes `threads` CPUs, or as many as the smallest node has. Raises ConfigError.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("--ray is given, and Ray is not installed", "pip install 'lorafit[ray]'") from None
    importlib.import_module("ray.util.scheduling_strategies")
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, OSError, AssertionError, ImportError) as error:
        raise _nobody(address, error) from None
    sizes = [int(node["Resources"]["CPU"]) for node in _nodes(ray)]
    cpus = threads or min(sizes, default=1)
    slots = sum(size // cpus for size in sizes)
    if not slots:
        ray.shutdown()
        raise ConfigError(
            f"--threads {cpus} is more than any node of the cluster has ({max(sizes, default=0)} CPUs)",
            "Give fewer, or leave it out",
        )
    return Cluster(ray, cpus, slots)


def _knock(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise _nobody(address, error) from None


def _nobody(address: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"--ray {address!r}: there is no cluster to connect to: {_first_line(error)}",
        "Start one by `ray start --head` and give its address (and set RAY_AUTH_MODE=token if it wants a token), or "
        "`local` for this machine alone",
    )


def _nodes(ray: Any) -> list[dict[str, Any]]:
    """Those that are there and compute."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- on a node --------------------------------------------------------------------------------------------------------


def _on_worker(work: str, arguments: tuple[Any, ...], log: str) -> tuple[str, Any]:
    """What the child said, as values: an error that crosses machines would lose its sentences."""
    try:
        return "done", child.call(work, arguments, Path(log))
    except child.Killed as error:
        return "killed", (error.what, error.do)
    except child.Refused as error:
        return "refused", (error.what, error.do, error.kind)
    except LorafitError as error:
        return "refused", (error.what, error.do)


def _reached(check: str, told: str, paths: list[str], look: Callable[[], Any], wanted: Any) -> str | None:
    """What a node lacks, as the end of a sentence; None where it has all."""
    try:
        seen = Path(check).read_text(encoding="utf-8")
    except OSError:
        seen = None
    if seen != told:
        return f"does not see the comparison's directory {Path(check).parent}"
    gone = [path for path in paths if not Path(path).exists()]
    if gone:
        return f"cannot reach {gone[0]}"
    try:
        found = look()
    except LorafitError as error:
        return f"cannot read the model: {error.what}"
    return None if found == wanted else f"has another model or lorafit: {found}, and here it is {wanted}"


def what_is_there(model: str) -> dict[str, str]:
    """What must be the same on all nodes."""
    from lorafit.model import spec as model_spec

    return {"lorafit": __version__, "model_sha256": model_spec.sha256(model_spec.read(model))}
