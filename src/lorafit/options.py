"""Options of a command, made from the fields of a config class: a default and a help text stand in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from lorafit.config import Frozen

ALIASES = {"output": ("-o", "--output"), "schedule": ("--schedule", "--lr-schedule")}


def options_of(
    config: type[Frozen], arguments: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `config`; the fields in `arguments` are positional.

    The command is called with `given`, a dict of what the user typed, besides the parameters it declares itself.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name != "given"
        ]

        def called(**values: Any) -> None:
            given = {name: values.pop(name) for name in config.model_fields}
            command(given=given, **values)

        parameters = [
            _parameter(config, name, name in arguments) for name in (*arguments, *_options(config, arguments))
        ]
        # Typer reads the parameters from these two.
        called.__signature__ = inspect.Signature(parameters + own)  # type: ignore[attr-defined]  # a real attribute
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters + own}
        called.__doc__ = command.__doc__
        called.__name__ = command.__name__
        return called

    return decorate


def _options(config: type[Frozen], arguments: tuple[str, ...]) -> list[str]:
    return [name for name in config.model_fields if name not in arguments]


def _parameter(config: type[Frozen], name: str, positional: bool) -> inspect.Parameter:
    """One typer parameter. Values stay text until pydantic reads them: its messages name the field and the bounds."""
    field = config.model_fields[name]
    help_text = field.description or ""
    if positional:
        several = get_origin(field.annotation) is list
        metavar = f"{name.upper()}..." if several else name.upper()
        kind: Any = typer.Argument(metavar=metavar, help=help_text, show_default=False)
        return _keyword(name, Annotated[list[str] | None if several else str | None, kind])
    if field.annotation is bool:
        flag = name.replace("_", "-")
        both = f"--{flag}/--no-{flag}" if field.default else f"--{flag}"
        kind = typer.Option(both, help=help_text, show_default=False)
        return _keyword(name, Annotated[bool | None, kind])
    names = ALIASES.get(name, ("--" + name.replace("_", "-"),))
    metavar = _metavar(str(field.annotation))
    kind = typer.Option(*names, help=help_text + _choices_and_default(field), metavar=metavar, show_default=False)
    return _keyword(name, Annotated[str | None, kind])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: str) -> str:
    return "N" if annotation.startswith(("<class 'int'", "int |")) else "X" if "float" in annotation else "TEXT"


def _choices_and_default(field: FieldInfo) -> str:
    """` One of a, b. Default: a.`, as far as there are such and the help text does not say so itself."""
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    one_of = f" One of {', '.join(choices)}." if choices else ""
    silent = field.is_required() or field.default_factory is not None or field.default in (None, "")
    return one_of if silent or "Default:" in (field.description or "") else f"{one_of} Default: {field.default}."
