"""What in a GGUF file decides the token ids of a conversation: chat template, bos, and the end of a turn.

llama.cpp renders the template, takes one bos off the text if it would add one itself, and cuts it into tokens, special
ones included. So its ids are those of training where it adds bos only if the template writes it.
"""

from __future__ import annotations

import re
from typing import Any

from lorafit.data.example import Message
from lorafit.data.mask import stop_ids
from lorafit.data.template import render
from lorafit.errors import DataError

CHAT_KEYS = ("tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id")
# transformers' own tags, which mark replies for training and write nothing; older readers stumble over them.
MARKS = {
    re.compile(r"\{%(-?)\s*generation\s*(-?)%\}"): r"{%\1 if true \2%}",
    re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}"): r"{%\1 endif \2%}",
}


def write_chat(writer: Any, tokenizer: Any) -> None:
    """The keys in CHAT_KEYS, of the tokenizer that the model was trained with."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": plain(text)} for name, text in template.items()])
    elif template:
        writer.add_chat_template(plain(template))
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    others = sorted(stop_ids(tokenizer) - {tokenizer.eos_token_id})
    if others:
        writer.add_uint32("tokenizer.ggml.eot_token_id", others[0])


def plain(template: str) -> str:
    """The template without transformers' marks of what was generated; it writes the same."""
    for mark, instead in MARKS.items():
        template = mark.sub(instead, template)
    return template


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp is to put bos in front: if the tokenizer does so, unless conversations are without one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[:1] != [bos]:
        return False
    return not tokenizer.chat_template or writes_bos(tokenizer)


def chat_remarks(tokenizer: Any) -> list[str]:
    """Lines for the user: where llama.cpp will not do with a text what training did."""
    if not tokenizer.chat_template:
        return ["the model has no chat template: llama.cpp would write conversations in ChatML"]
    remarks = []
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and not begins_with_bos(tokenizer):
        remarks.append(
            "the chat template writes no beginning-of-sequence token, so the file asks for none, also for text without "
            "a conversation, where training had one"
        )
    if not _takes_system(tokenizer):
        remarks.append("the chat template has no place for system messages: llama.cpp puts one into the first question")
    return remarks


def _takes_system(tokenizer: Any) -> bool:
    mark = "ZqsystemqZ"
    asked: list[Message] = [{"role": "system", "content": mark}, {"role": "user", "content": "a"}]
    try:
        return mark in render(tokenizer, asked, add_generation_prompt=True)
    except DataError:
        return False


def writes_bos(tokenizer: Any) -> bool:
    """Whether the template itself begins with bos."""
    asked: list[Message] = [{"role": "user", "content": "a"}]
    try:
        text = render(tokenizer, asked, add_generation_prompt=True)
    except DataError:  # a template that wants more than a question; nothing is known, so the tokenizer decides
        return True
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
