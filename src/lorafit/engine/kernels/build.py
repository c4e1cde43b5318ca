"""Compile the C++ files beside this one with the system's compiler, once; the library is kept in the user's cache.

Without a compiler, and with LORAFIT_NO_NATIVE=1, there is none: `plain` serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lorafit import files

log = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("kernels", "gated", "products", "attention", "decode")
)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("bf16.h", "dot.h"))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-shared", "-fPIC", "-std=c++17")
COMPILE_TIMEOUT_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be had. Compiles on first use on a machine (about 2 s)."""
    if os.environ.get("LORAFIT_NO_NATIVE") or sys.platform == "win32":
        return None
    compiler = next((path for name in _wanted() if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    openmp = _torch_openmp()
    for native in (True, False):
        command = _command(compiler, openmp, native)
        made = files.cache_dir() / f"kernels-{_key(command)}.so"
        try:
            if not made.exists():
                _compile(command, made)
            return ctypes.CDLL(str(made))
        except (OSError, subprocess.SubprocessError) as error:
            failed = error
    log.warning("the kernels could not be compiled, so training is slower: %s", _reason(failed))
    return None


def _reason(error: Exception) -> str:
    """The compiler's first complaint, or what kept it from running."""
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
    return next((line.strip() for line in said if "error" in line.lower()), str(error))


def _wanted() -> tuple[str, ...]:
    chosen = os.environ.get("CXX")
    return (chosen, *COMPILERS) if chosen else COMPILERS


def _torch_openmp() -> Path | None:
    """Torch's own OpenMP: with a second one in the process, two sets of threads would fight over the cores."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None


def _command(compiler: str, openmp: Path | None, native: bool) -> list[str]:
    command = [compiler, *FLAGS]
    if native:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        command += ["-march=native", "-mprefer-vector-width=512"] if x86 else ["-mcpu=native"]
    if openmp:
        command += ["-fopenmp", str(openmp)]
    return command


def _key(command: list[str]) -> str:
    """Changes with the source, the command and the processor's features, which -march=native depends on."""
    told = [
        *(source.read_text() for source in SOURCES + HEADERS),
        *command,
        torch.__version__,
        platform.machine(),
        _features(),
    ]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]


def _features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "kernels.so"
        subprocess.run(
            [command[0], *map(str, SOURCES), *command[1:], "-o", str(made)],
            check=True,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        made.replace(path)
