"""A conversation in the terminal, or a filter: where input or output is no terminal, lines in and answers out.

Answers go to `stdout` and nothing else does; notes go to `console`. As a filter it is one conversation too: each line
is the next message, commands work as at a prompt, and an error ends it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from lorafit.data.example import Message
from lorafit.data.mask import encode_prompt
from lorafit.errors import ConfigError, DataError, LorafitError, ModelError, did_you_mean, listed
from lorafit.infer.generate import Pieces, context_tokens, stream
from lorafit.methods import table
from lorafit.units import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "> "


@dataclass
class Session:
    """A conversation and what can be changed in it.

    scale: of the adapter, which is set on the model already. system: None leaves it to the template, which may have a
    system message of its own. temperature: 0 takes the likeliest token. max_new_tokens: of an answer.
    history: what was said, user and assistant in turn, without the system message.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_adapter: bool
    scale: float
    system: str | None
    temperature: float
    max_new_tokens: int
    seed: int
    history: list[Message] = field(default_factory=list)


def chat(session: Session, stdin: TextIO, stdout: TextIO, console: Console) -> None:
    """Talk until /quit, the end of input, or Ctrl-C at the prompt. Ctrl-C during an answer stops the answer.

    As a filter, errors and Ctrl-C end the conversation: raises LorafitError, KeyboardInterrupt. Raises ModelError for
    a model without a chat template.
    """
    if not session.tokenizer.chat_template:
        raise ModelError(
            "this model has no chat template, so it knows no conversations",
            "Use a chat model (often named -Instruct or -Chat)",
        )
    talk = _Talk(session, stdin, stdout, console)
    if talk.interactive:
        console.print("/help lists the commands, Ctrl-D ends", style="dim", highlight=False)
    while talk.goes_on:
        try:
            talk.take(talk.read_line())
        except LorafitError as error:
            if not talk.interactive:
                raise
            console.print(str(error), style="yellow", highlight=False, markup=False)


class _Talk:
    """A session and the three streams it is held on."""

    def __init__(self, session: Session, stdin: TextIO, stdout: TextIO, console: Console) -> None:
        self.session = session
        self.interactive = stdin.isatty() and stdout.isatty()
        self.goes_on = True
        self._stdin, self._stdout, self._console = stdin, stdout, console

    # --- the loop -----------------------------------------------------------------------------------------------

    def read_line(self) -> str:
        """The next line, line break included; empty at the end and for Ctrl-C at a prompt. Raises DataError."""
        try:
            line = self._prompted_line() if self.interactive else self._stdin.readline()
            line.encode()  # bytes that are no UTF-8 may have been read as halves of surrogate pairs
        except UnicodeError:
            raise DataError("the input is not UTF-8", "Convert it first, for example with iconv") from None
        return line

    def _prompted_line(self) -> str:
        try:
            if self._stdin is sys.stdin:
                import readline  # noqa: F401  # gives input() line editing and history

                return input(PROMPT) + "\n"
            self._write(PROMPT)
            return self._stdin.readline()
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
            return ""

    def take(self, line: str) -> None:
        """Do what a line asks for."""
        text = line.strip()
        if not line:
            self.goes_on = False
        elif line.startswith("/"):
            name, _, rest = text.partition(" ")
            self._command(name, rest.strip())
        elif text:
            self._turn(text)

    def _command(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or f"There are {listed(COMMANDS)}."
            raise ConfigError(f"{name!r} is no command", f"{hint} To send it as a message, put a space in front")
        COMMANDS[name].do(self, rest)

    # --- answers ------------------------------------------------------------------------------------------------

    def _turn(self, text: str) -> None:
        """Answer a message. What is left out, cut or stopped stays so in the history; an error leaves it as it was."""
        messages = [*self.session.history, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        answer = self._say(prompt)
        self.session.history = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation; its oldest turns are taken out of `messages` until an answer finds room."""
        session, context = self.session, context_tokens(self.session.model)
        start: list[Message] = [] if session.system is None else [{"role": "system", "content": session.system}]
        prompt = encode_prompt([*start, *messages], session.tokenizer)
        if context is None:
            return prompt
        before = len(messages)
        while len(prompt) > context - min(session.max_new_tokens, context // 2) and len(messages) > 1:
            del messages[:2]
            prompt = encode_prompt([*start, *messages], session.tokenizer)
        if len(messages) < before:
            left_out = f"{(before - len(messages)) // 2} of {before // 2}"
            self._note(f"the oldest turns ({left_out}) are left out from here on: the model reads {context} tokens")
        return prompt

    def _say(self, prompt: list[int]) -> str:
        """Write an answer as it comes. Returns its text, as far as it came before Ctrl-C."""
        session, pieces, text = self.session, Pieces(self.session.tokenizer), ""
        tokens, stopped, started = 0, False, time.perf_counter()
        try:
            for token in stream(
                session.model,
                session.tokenizer,
                prompt,
                max_new_tokens=session.max_new_tokens,
                temperature=session.temperature,
                seed=session.seed,
            ):
                tokens += 1
                text += self._write(pieces.push(token))
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        seconds = time.perf_counter() - started
        text += self._write(pieces.rest())
        self._write("\n")
        self._report(tokens, seconds, stopped, len(prompt))
        return text.strip()

    def _report(self, tokens: int, seconds: float, stopped: bool, prompt_tokens: int) -> None:
        context = context_tokens(self.session.model) or tokens + prompt_tokens + 1
        cut = tokens == self.session.max_new_tokens or tokens + prompt_tokens == context
        end = ", stopped" if stopped else f", cut at {format_count(tokens)} tokens" if cut else ""
        if self.interactive:
            speed = f"{tokens / seconds:.1f} tokens/s" if seconds else ""
            self._console.print(f"{format_count(tokens)} tokens, {speed}{end}", style="dim", highlight=False)
        elif cut:
            self._note(f"an answer was cut at {format_count(tokens)} tokens")

    def _write(self, text: str) -> str:
        if text:
            self._stdout.write(text)
            self._stdout.flush()
        return text

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    # --- commands -----------------------------------------------------------------------------------------------

    def scale(self, rest: str) -> None:
        """Set or show the adapter's strength."""
        self._need_adapter("/scale")
        if rest:
            try:
                scale = float(rest)
            except ValueError:
                raise ConfigError(f"/scale {rest!r} is no number", "Give one, such as /scale 0.5") from None
            table.of(self.session.model).set_scale(self.session.model, scale)
            self.session.scale = scale
        self._note(f"scale {self.session.scale:g}")

    def base(self, rest: str) -> None:
        """Answer the last message again, by the base model and by the tuned one. The history stays as it is."""
        self._need_adapter("/base")
        if rest or not self.session.history:
            raise ConfigError("/base answers the last message again", "Say something first, then /base alone")
        prompt = self._prompt(self.session.history[:-1])
        tuned = self.session.scale or 1.0
        try:
            for label, scale in (("base", 0.0), (f"tuned, scale {tuned:g}", tuned)):
                table.of(self.session.model).set_scale(self.session.model, scale)
                self._write(f"[{label}] ")
                self._say(prompt)
        finally:
            table.of(self.session.model).set_scale(self.session.model, self.session.scale)

    def reset(self, rest: str) -> None:
        """Forget what was said."""
        self.session.history = []
        self._note("the conversation starts anew")

    def system(self, rest: str) -> None:
        """Set the system message, or leave it to the template."""
        self.session.system = rest or None
        self._note("system message set" if rest else "no system message but the template's own, if it has one")

    def help(self, rest: str) -> None:
        """List the commands."""
        for name, command in COMMANDS.items():
            self._note(f"{f'{name} {command.argument}':<15} {command.help}")

    def quit(self, rest: str) -> None:
        """End the conversation."""
        self.goes_on = False

    def _need_adapter(self, name: str) -> None:
        if not self.session.has_adapter:
            raise ConfigError(f"{name} needs an adapter, and this is a model without one", "Chat with a run directory")


@dataclass(frozen=True)
class _Command:
    argument: str
    help: str
    do: Callable[[Any, str], None]


COMMANDS = {
    "/scale": _Command("X", "strength of the update: 0 the base, 1 tuned, above 1 emphasised", _Talk.scale),
    "/base": _Command("", "answer the last message by the base model and by the tuned one", _Talk.base),
    "/system": _Command("TEXT", "set the system message; without TEXT the template's own", _Talk.system),
    "/reset": _Command("", "forget what was said", _Talk.reset),
    "/help": _Command("", "list the commands", _Talk.help),
    "/quit": _Command("", "end, as Ctrl-D does; Ctrl-C stops an answer", _Talk.quit),
}
