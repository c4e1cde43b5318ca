"""Messages -> text, by a chat template: one function for training, evaluation and chat.

A template is a program that came with a model. It runs in transformers' sandbox, which keeps it from files and modules,
and here under a time limit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorafit.data.deadline import OutOfTime, deadline
from lorafit.data.example import Chat, Completion, Message, Tool
from lorafit.errors import ConfigError, DataError, ModelError, did_you_mean, listed
from lorafit.model.light_tokenizer import LightTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = {"role", "content"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
T = TypeVar("T")
SECONDS = 10.0  # for one conversation; usual ones take a thousandth of one
BUILT_IN = Path(__file__).parent / "templates"


def built_in() -> list[str]:
    """Names of the templates that come with lorafit, for models that have none of their own."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jinja"))


def read_template(chosen: str) -> str:
    """A template by its name in `built_in`, or from a file. Raises ConfigError where it is neither."""
    path = BUILT_IN / f"{chosen}.jinja" if chosen in built_in() else Path(chosen)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = did_you_mean(chosen, built_in()) or f"Give a file, or one of {listed(built_in())}"
        raise ConfigError(f"--template {chosen!r} cannot be read: {error}", hint) from None


def use_template(tokenizer: PreTrainedTokenizerBase, chosen: str) -> None:
    """Let the tokenizer render with another template. chosen: as for `read_template`.

    Raises ConfigError where there is none, ModelError where it cannot render a question and its answer.
    """
    tokenizer.chat_template = read_template(chosen)
    probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        render(tokenizer, probe, add_generation_prompt=False)
    except DataError as error:
        raise ModelError(f"--template {chosen!r} cannot be used: {error.what}", "Correct the template") from None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    origin: str = "",
    tools: Sequence[Tool] = (),
) -> str:
    """The text that the model sees for `messages`; add_generation_prompt: and then what starts a reply.

    Special tokens are in the text. transformers keeps the compiled template. Raises DataError if there is no template
    or it refuses these messages; `origin` is named in the error.
    """
    return _guarded(
        tokenizer, origin, lambda: _rendered(tokenizer, list(messages), add_generation_prompt, list(tools) or None)
    )


def marked_as_generated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], origin: str = "", tools: Sequence[Tool] = ()
) -> list[tuple[int, int]] | None:
    """(first character, one past the last) of what the template puts between {% generation %} and {% endgeneration %}.

    Of the text that `render` gives without a generation prompt; None where the template has no such tag, and from a
    tokenizer that a plan counts with.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not GENERATION.search(template) or isinstance(tokenizer, LightTokenizer):
        return None

    def marked() -> list[tuple[int, int]]:
        from transformers.utils import chat_template_utils

        render_marked: Any = chat_template_utils.render_jinja_template
        named = tokenizer.special_tokens_map
        _, marks = render_marked(
            [list(messages)], tools=[*tools] or None, chat_template=template, return_assistant_tokens_mask=True, **named
        )
        return [(int(first), int(end)) for first, end in marks[0]]

    return _guarded(tokenizer, origin, marked)


def _guarded(tokenizer: PreTrainedTokenizerBase, origin: str, call: Callable[[], T]) -> T:
    """What `call` makes of the template, within the time limit. Raises DataError as `render` does."""
    at = f"{origin}: " if origin else ""
    if not tokenizer.chat_template:
        raise DataError(
            f"{at}the rows are conversations and this model has no chat template",
            f"Choose one with --template FILE or --template {' or '.join(built_in())}, or give rows of text",
        )
    try:
        with deadline(SECONDS):
            return call()
    except OutOfTime:
        raise DataError(
            f"{at}the chat template runs for more than {SECONDS:g} s", "Use another with --template"
        ) from None
    except Exception as error:  # it may raise anything
        raise DataError(
            f"{at}the model's chat template refuses the conversation: {error}",
            "Change the row to what the template takes, such as no system message or turns that alternate",
        ) from None


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool, tools: list[Tool] | None
) -> str:
    """What `apply_chat_template` gives.

    Messages of a role and a text alone go to the compiled template directly: what transformers does for all others
    (copying them, looking for methods, giving reasoning its other names) takes longer than the template.
    """
    own = tokenizer.chat_template
    compiled = _compiled(own) if isinstance(own, str) and not isinstance(tokenizer, LightTokenizer) else None
    if compiled is None or tools or any(message.keys() != PLAIN for message in messages):
        return str(
            tokenizer.apply_chat_template(
                messages, tools=[*tools] if tools else None, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    named = tokenizer.special_tokens_map
    rendered = compiled.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **named
    )
    return str(rendered)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """The template in transformers' sandbox, as `apply_chat_template` compiles it; None where that has moved."""
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    return compile_template(template) if compile_template else None


def writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a place for the functions that may be called."""
    return _writes_tools(str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _writes_tools(template: str) -> bool:
    # By its text: whether it shows them may depend on the conversation. Each row's own rendering is looked at too.
    return "tools" in template


def as_chat(completion: Completion) -> Chat:
    """Prompt and completion strings as a user's and an assistant's message: what a chat model will see in use."""
    messages: tuple[Message, ...] = (
        {"role": "user", "content": completion.prompt},
        {"role": "assistant", "content": completion.completion},
    )
    return Chat(messages, completion.origin, context=1)
