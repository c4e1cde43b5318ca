"""Messages -> text, by the model's own chat template: one function for training, evaluation and chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.data.formats import Chat, Completion, Message
from lorafit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool, origin: str = ""
) -> str:
    """The text that the model sees for `messages`; add_generation_prompt: and then what starts a reply.

    Special tokens are in the text. transformers keeps the compiled template. Raises DataError if there is no template
    or it refuses these messages; `origin` is named in the error.
    """
    at = f"{origin}: " if origin else ""
    if not tokenizer.chat_template:
        raise DataError(
            f"{at}the rows are conversations and this model has no chat template",
            "Use a chat model (often named -Instruct or -Chat), or rows of prompt/completion strings or text",
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise DataError(
            f"{at}the model's chat template refuses the conversation: {error}",
            "Change the row to what the template takes, such as no system message or turns that alternate",
        ) from None
    return str(text)


def as_chat(completion: Completion) -> Chat:
    """Prompt and completion strings as a user's and an assistant's message: what a chat model will see in use."""
    messages: tuple[Message, ...] = (
        {"role": "user", "content": completion.prompt},
        {"role": "assistant", "content": completion.completion},
    )
    return Chat(messages, completion.origin, context=1)
