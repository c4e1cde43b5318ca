"""A model's tokenizer and chat template from its files, by `tokenizers` and `jinja2`: no transformers, no torch.

It has what `lorafit.data` asks a tokenizer for, and gives the same tokens; a plan counts with it before anything is
loaded. For training the model's own is loaded (`load.py`).
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorafit.errors import ModelError
from lorafit.model import gguf_header, gguf_tokenizer
from lorafit.model.find import read_json
from lorafit.model.spec import ModelSpec

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Ids(NamedTuple):
    """What calling a tokenizer gives."""

    input_ids: list[int]


class LightTokenizer:
    """backend: of the library `tokenizers`. special: texts of named tokens. chat_template: None where there is none.

    begins, ends: whether bos and eos are put around a text, beside what the backend does by itself.
    """

    is_fast = True

    def __init__(
        self,
        backend: Any,
        special: Mapping[str, str],
        chat_template: str | None,
        begins: bool = False,
        ends: bool = False,
    ) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(special)
        self.chat_template = chat_template
        self.begins, self.ends = begins, ends

    @property
    def bos_token(self) -> str | None:
        """Its text."""
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Its text."""
        return self.special_tokens_map.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its number."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Its number."""
        return self._id(self.eos_token)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Number -> added token."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def __call__(self, text: str, add_special_tokens: bool = True) -> Ids:
        """The tokens of a text."""
        ids = list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        before = [self.bos_token_id] if add_special_tokens and self.begins else []
        after = [self.eos_token_id] if add_special_tokens and self.ends else []
        return Ids([number for number in (*before, *ids, *after) if number is not None])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation; its tokens are asked for elsewhere. Raises what the template raises."""
        if tokenize or self.chat_template is None:
            raise ValueError("this tokenizer only renders, and by a chat template")
        rendered = compiled(self.chat_template).render(
            messages=list(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens_map,
        )
        return str(rendered)

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self.backend_tokenizer.token_to_id(text)


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    """The template in a sandbox with what transformers gives templates: its filters, functions, and loop controls."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


@functools.cache
def _generation_tag() -> type:
    """{% generation %} ... {% endgeneration %}, whose content is written as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # jinja2's own

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def read(spec: ModelSpec) -> LightTokenizer:
    """The tokenizer of a model. Raises ModelError where its files do not say it without transformers."""
    found = _of_gguf(spec) if spec.kind == "gguf" else of_directory(spec.path)
    if found is None:
        raise ModelError(
            f"the tokenizer of {spec.name} is of a kind that is not read without loading the model",
            "Leave DATA out, and say --seq-len and --rows",
        )
    return found


def _of_gguf(spec: ModelSpec) -> LightTokenizer | None:
    header = gguf_header.read_header(spec.path)
    built = gguf_tokenizer.backend_of(header)
    if built is None:
        return None
    backend, begins = built
    special, said = gguf_tokenizer.special_tokens(header), header.metadata.get
    template = said("tokenizer.chat_template")
    return LightTokenizer(
        backend,
        special,
        template if isinstance(template, str) else None,
        begins=bool(said("tokenizer.ggml.add_bos_token", begins)) and "bos_token" in special,
        ends=bool(said("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special,
    )


def of_directory(directory: Path) -> LightTokenizer | None:
    """The tokenizer of a Hugging Face directory; None where it has no tokenizer.json. Raises ModelError."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ModelError(f"{file} cannot be read: {error}", "Download it again") from None
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            settings |= read_json(directory / name)
    special = {name: text for name in NAMES if (text := _text(settings.get(name)))}
    return LightTokenizer(backend, special, _template(directory, settings))


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """In a file of its own, else among the settings; of several the one that is called default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None
