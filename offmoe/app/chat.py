"""Chat loop: read a message, print its answer while it is generated, run commands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.app.answer_printer import DIM, REASONING_MODES, AnswerPrinter
from offmoe.app.conversation import Conversation
from offmoe.app.report import stats_line, stats_table
from offmoe.app.terminal import UI, interruptible, one_line
from offmoe.errors import ContextFull, OffmoeError
from offmoe.settings import Sampling
from offmoe.stats.stats import Stats

if TYPE_CHECKING:
    from offmoe.engine import Engine
    from offmoe.text.messages import Message

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # not /usr/bin, with which a message may begin


class ExitChat(Exception):
    """Raised by /exit."""


class Chat:
    """One conversation with `engine`. `model` is saved with it: the answers' tokens are valid only for this model."""

    def __init__(
        self,
        engine: Engine,
        ui: UI,
        model: str,
        sampling: Sampling,
        system: str | None = None,
        reasoning: str = DIM,
        thinking: str | None = None,
    ) -> None:
        self.engine = engine
        self.ui = ui
        self.model = model
        self.sampling = sampling
        self.conversation = Conversation(system)
        self.answers: list[Stats] = []
        self.thinking = thinking  # value of --think or /think
        self.reasoning_mode = reasoning  # one of REASONING_MODES
        self.last_reasoning = ""

    def loop(self) -> None:
        """Run until the end of the input or /exit. Without a terminal, the first error ends the loop."""
        while (text := self.ui.ask()) is not None:
            try:
                self.handle(text)
            except ExitChat:
                return
            except OffmoeError as error:
                if not self.ui.interactive:
                    raise
                self.ui.note(f"offmoe: {one_line(str(error))}")

    def handle(self, text: str) -> None:
        """Run a command, or send a message."""
        if command := COMMAND.fullmatch(text.strip()):
            self.command(command[1], (command[2] or "").strip())
        elif text.strip():
            self.send(text)

    def send(self, text: str) -> None:
        """Send a message and print the answer; if that fails, restore the conversation."""
        before = list(self.conversation.turns)
        try:
            self.conversation.turns.append({"role": "user", "content": text})
            self.answer()
        except BaseException:
            self.conversation.turns = before
            raise

    def answer(self) -> None:
        """Generate an answer; if the context is too small and the user agrees, drop the oldest turns until it fits."""
        dropped = 0
        while True:
            try:
                self.stream_answer()
                break
            except ContextFull as overflow:
                self.make_room(overflow, already_asked=dropped > 0)
                dropped += 1
        if dropped:
            self.ui.note(f"oldest turns dropped to fit the context: {dropped}")

    def make_room(self, overflow: ContextFull, already_asked: bool) -> None:
        """Drop the oldest turn, after asking once. Raises OffmoeError if that is refused or impossible."""
        question = f"{overflow.tokens} tokens do not fit in the context of {overflow.ctx}. Drop the oldest turns?"
        if not already_asked and len(self.conversation.turns) > 1 and not self.ui.confirm(question):
            raise overflow
        if not self.conversation.drop_oldest():
            raise OffmoeError(
                f"this message alone needs {overflow.tokens} tokens and the context holds {overflow.ctx}: "
                "shorten it, or start again with a larger --ctx"
            ) from overflow

    def stream_answer(self) -> None:
        """Print the answer while it is generated; Ctrl-C ends it and keeps the text so far."""
        answer = AnswerPrinter(self.ui, self.reasoning_mode, " · /reasoning show" if self.ui.interactive else "")
        with interruptible(self.engine.cancel):
            for piece in self.engine.generate(self.conversation.messages(), self.sampling):
                answer.add(piece)
        answer.finish()
        self.record_answer(answer)

    def record_answer(self, answer: AnswerPrinter) -> None:
        """Add the answer to the conversation and print its statistics."""
        turn: Message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            turn["reasoning"] = answer.reasoning
        if self.engine.answer_is_plain:
            turn["tokens"] = list(self.engine.answer_tokens)
        self.conversation.turns.append(turn)
        self.last_reasoning = answer.reasoning
        stats = self.engine.stats()
        self.answers.append(stats)
        self.ui.note(stats_line(stats))
        if loading := self.engine.loading():
            self.ui.note(loading)
        if stats.finish_reason == "context":
            self.ui.note("the context is full: the answer ends here; the next message makes room, or /reset")
        if stats.finish_reason == "cancelled" and not self.ui.interactive:
            raise KeyboardInterrupt

    def command(self, name: str, argument: str) -> None:
        if f"/{name}" not in COMMANDS:
            raise OffmoeError(f"/{name} is not a command: /help lists them all")
        COMMANDS[f"/{name}"](self, argument)

    def help(self, _: str) -> None:
        """list the commands"""
        lines = (f"{name:<10} {method.__doc__}" for name, method in COMMANDS.items())
        keys = "Ctrl-C stops an answer, Ctrl-D exits, Alt-Enter inserts a new line"
        self.ui.show("\n".join((*lines, keys)))

    def stats(self, _: str) -> None:
        """show statistics of the last answer and of all answers, and the placement"""
        if not self.answers:
            raise OffmoeError("there is no answer yet: send a message first")
        self.ui.show(stats_table(self.answers))
        self.ui.show(self.engine.plan.summary())

    def reset(self, _: str) -> None:
        """clear the conversation; the system prompt is kept"""
        self.conversation.turns.clear()
        self.engine.reset()

    def system(self, text: str) -> None:
        """[TEXT] show or set the system prompt; "none" removes it"""
        if text:
            self.conversation.system = None if text == "none" else text
        self.ui.note(f"system prompt: {self.conversation.system or 'none'}")

    def set(self, argument: str) -> None:
        """[NAME VALUE] show or set a sampling option; "none" restores the model's default"""
        name, _, value = argument.partition(" ")
        if value.strip():
            self.sampling = with_value(self.sampling, name, value.strip())
        chosen = self.sampling.merged(self.engine.sampling)
        names = {name: field_type(name)} if name else vars(chosen)
        self.ui.note(", ".join(f"{name}={getattr(chosen, name)}" for name in names))

    def think(self, value: str) -> None:
        """[on|off|WORD] show or set how much the model thinks; "none" restores its template's default"""
        if value:
            chosen = None if value == "none" else value
            self.engine.think(chosen)
            self.thinking = chosen
        self.ui.note(f"thinking: {self.thinking or 'default of the template'}")

    def reasoning(self, mode: str) -> None:
        """[dim|fold|hide|show] set how reasoning is displayed; "show" prints that of the last answer"""
        if mode == "show":
            if not self.last_reasoning:
                raise OffmoeError("the last answer has no reasoning")
            self.ui.write_reasoning(self.last_reasoning + "\n")
            return
        if mode and mode not in REASONING_MODES:
            raise OffmoeError(f"reasoning is {mode!r}: expected {', '.join(REASONING_MODES)} or show")
        self.reasoning_mode = mode or self.reasoning_mode
        self.ui.note(f"reasoning: {self.reasoning_mode}")

    def save(self, argument: str) -> None:
        """FILE save the conversation"""
        self.conversation.save(file_argument(argument), self.model)

    def load(self, argument: str) -> None:
        """FILE continue a conversation that /save wrote"""
        self.conversation = Conversation.load(file_argument(argument), self.model, self.engine.config.vocab)
        self.ui.note(f"{len(self.conversation.turns) // 2} turns loaded")

    def exit(self, _: str) -> None:
        """exit the chat"""
        raise ExitChat


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    f"/{method.__name__}": method
    for method in (
        Chat.help,
        Chat.stats,
        Chat.reset,
        Chat.system,
        Chat.set,
        Chat.think,
        Chat.reasoning,
        Chat.save,
        Chat.load,
        Chat.exit,
    )
}


def with_value(sampling: Sampling, name: str, text: str) -> Sampling:
    """Return `sampling` with the field `name` parsed from `text`."""
    kind = field_type(name)
    if name == "stop":
        return replace(sampling, stop=() if text == "none" else (text,))
    value: Any = None
    try:
        if text != "none":
            value = int(text) if kind.startswith("int") else float(text)
        return replace(sampling, **{name: value})
    except ValueError:
        raise OffmoeError(f"{name} is {text!r}: expected a number, or none") from None


def field_type(name: str) -> str:
    """Return the annotation of one of Sampling's fields, as written there."""
    kinds = {field.name: str(field.type) for field in fields(Sampling)}
    if name not in kinds:
        raise OffmoeError(f"/set has no option {name!r}: expected {', '.join(kinds)}")
    return kinds[name]


def file_argument(text: str) -> Path:
    if not text:
        raise OffmoeError("the file name is missing: give one, as in /save chat.json")
    return Path(os.path.expanduser(text))
