"""What all settings have in common: how values are read from a command line or a file, and refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lorafit.errors import ConfigError, did_you_mean, listed
from lorafit.units import GIB, MIB


def _comma_list(value: Any) -> Any:
    """`a,b` from a command line -> `[a, b]`; one name stays a string."""
    if isinstance(value, str) and "," in value and not value.startswith("re:"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _comma_pairs(value: Any) -> Any:
    """`q_proj=8,*.mlp.*=4` from a command line -> a dict."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
    if any(not pattern.strip() for pattern, _, _ in pairs):
        raise ValueError("expected NAME=VALUE, several separated by commas")
    return {pattern.strip(): number.strip() for pattern, _, number in pairs}


def _comma_texts(value: Any) -> Any:
    """`<a>,<b>` from a command line -> `[<a>, <b>]`, always a list."""
    return value.split(",") if isinstance(value, str) else value


Patterns = Annotated[str | list[str], BeforeValidator(_comma_list)]
PatternInts = Annotated[dict[str, int], BeforeValidator(_comma_pairs)]
PatternFloats = Annotated[dict[str, float], BeforeValidator(_comma_pairs)]
Names = Annotated[dict[str, str], BeforeValidator(_comma_pairs)]
Texts = Annotated[list[str], BeforeValidator(_comma_texts)]
Numbers = Annotated[list[float], BeforeValidator(_comma_texts)]


class Frozen(BaseModel):
    """Immutable, no unknown fields, no NaN; docstrings below fields become their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of `2GiB`, `1500MiB`, `4GB` or `500MB`. Raises ConfigError, which names the flag."""
    for unit, size in {"GiB": GIB, "MiB": MIB, "GB": 10**9, "MB": 10**6}.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit():
            return round(float(number) * size)
    raise ConfigError(f"{flag} {text!r} is not a size", "Give one such as 2GiB, 1500MiB or 4GB")


def parse_seconds(text: str, flag: str) -> float:
    """Seconds of `90s`, `20m`, `2h` or `1h30m`. Raises ConfigError, which names the flag."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.replace(" ", ""))
    seconds = (
        sum(int(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not seconds:
        raise ConfigError(f"{flag} {text!r} is not a time", "Give one such as 20m, 90s or 1h30m")
    return float(seconds)


C = TypeVar("C", bound=Frozen)


def read_toml(path: Path) -> dict[str, Any]:
    """A config file as a dict. Raises ConfigError if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist", "Check the path given to --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"config file {path} cannot be read as TOML: {error}", "Correct it, or leave it out"
        ) from None


def build(cls: type[C], file: dict[str, Any], flags: dict[str, Any]) -> tuple[C, dict[str, str]]:
    """The config from a file's values and the flags that were given, and where each value came from.

    Returns the config and {field: "default" | "file" | "flag"}. Raises ConfigError: the field, what it got, the fix.
    """
    unknown = sorted(set(file) - set(cls.model_fields))
    if unknown:
        hint = did_you_mean(unknown[0], cls.model_fields) or f"Known: {listed(cls.model_fields, 40)}"
        raise ConfigError(f"the config file has an unknown setting {unknown[0]!r}", hint)
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        config = cls.model_validate({**file, **given})
    except ValidationError as error:
        raise _explain(error) from None
    source = {name: "flag" if name in given else "file" if name in file else "default" for name in cls.model_fields}
    return config, source


def _explain(error: ValidationError) -> ConfigError:
    every = error.errors(include_url=False, include_context=False)
    first = every[0]
    field = str(first["loc"][0]) if first["loc"] else "config"
    flag = "--" + field.replace("_", "-")
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing", f"Give it on the command line or in the config file ({field} = ...)")
    # A setting of several types has an error for each.
    own = [str(one["msg"]).removeprefix("Value error, ") for one in every if one["loc"][:1] == first["loc"][:1]]
    reason = ", or ".join([own[0], *(other.removeprefix("Input should be ") for other in own[1:])])
    return ConfigError(f"{flag}: {reason}, got {first['input']!r}", "See --help for what it takes")
