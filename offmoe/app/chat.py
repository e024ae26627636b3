"""The chat's loop: a message in, an answer out while it is made, commands in between."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.app.answer_printer import DIM, MODES, Answer
from offmoe.app.conversation import Conversation
from offmoe.app.report import stats_line, stats_table
from offmoe.app.terminal import UI, interruptible, one_line
from offmoe.errors import ContextFull, OffmoeError
from offmoe.settings import Sampling
from offmoe.stats.stats import Stats

if TYPE_CHECKING:
    from offmoe.engine import Engine
    from offmoe.text.tokenizer import Message

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # a message may begin with /usr/bin


class Leave(Exception):
    """/exit"""


class Chat:
    """One conversation with `engine`, kept until /reset. `model`: where the answers' tokens are valid."""

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
        self.talk = Conversation(system)
        self.answers: list[Stats] = []
        self.thinking = thinking  # as the model was told
        self.mode = reasoning  # how reasoning is shown
        self.thoughts = ""  # the last answer's reasoning

    def loop(self) -> None:
        """Until the end of the input or /exit. In a pipe the first error ends it."""
        while (text := self.ui.ask()) is not None:
            try:
                self.handle(text)
            except Leave:
                return
            except OffmoeError as error:
                if not self.ui.interactive:
                    raise
                self.ui.note(f"offmoe: {one_line(str(error))}")

    def handle(self, text: str) -> None:
        if command := COMMAND.fullmatch(text.strip()):
            self.command(command[1], (command[2] or "").strip())
        elif text.strip():
            self.turn(text)

    def turn(self, text: str) -> None:
        """One message and its answer; where that fails, the conversation is as before."""
        before = list(self.talk.turns)
        try:
            self.talk.turns.append({"role": "user", "content": text})
            self.answer()
        except BaseException:
            self.talk.turns = before
            raise

    def answer(self) -> None:
        """Generate, and drop the oldest turns until they fit if that is what the person wants."""
        dropped = 0
        while True:
            try:
                self.stream()
                break
            except ContextFull as full:
                self.make_room(full, asked=dropped > 0)
                dropped += 1
        if dropped:
            self.ui.note(f"oldest turns dropped to fit the context: {dropped}")

    def make_room(self, full: ContextFull, asked: bool) -> None:
        question = f"{full.tokens} tokens do not fit in the context of {full.ctx}. Drop the oldest turns?"
        if not asked and len(self.talk.turns) > 1 and not self.ui.confirm(question):
            raise full
        if not self.talk.drop_oldest():
            raise OffmoeError(
                f"this message alone needs {full.tokens} tokens and the context holds {full.ctx}: "
                "shorten it, or start again with a larger --ctx"
            ) from full

    def stream(self) -> None:
        """Print the answer while it is made; Ctrl-C keeps what is there."""
        answer = Answer(self.ui, self.mode, " · /reasoning show" if self.ui.interactive else "")
        with interruptible(self.engine.cancel):
            for piece in self.engine.generate(self.talk.messages(), self.sampling):
                answer.take(piece)
        answer.end()
        self.answered(answer)

    def answered(self, answer: Answer) -> None:
        turn: Message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            turn["reasoning"] = answer.reasoning
        if self.engine.answer_is_plain:
            turn["tokens"] = list(self.engine.answer_tokens)
        self.talk.turns.append(turn)
        self.thoughts = answer.reasoning
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
            raise OffmoeError(f"/{name} is no command: /help lists them")
        COMMANDS[f"/{name}"](self, argument)

    def help(self, _: str) -> None:
        """what there is"""
        lines = (f"{name:<10} {method.__doc__}" for name, method in COMMANDS.items())
        keys = "Ctrl-C stops an answer, Ctrl-D leaves, Alt-Enter begins a new line"
        self.ui.show("\n".join((*lines, keys)))

    def stats(self, _: str) -> None:
        """what the last answer and all of them cost, and the plan"""
        if not self.answers:
            raise OffmoeError("nothing was answered yet")
        self.ui.show(stats_table(self.answers))
        self.ui.show(self.engine.plan.summary())

    def reset(self, _: str) -> None:
        """forget the conversation, keep the system prompt"""
        self.talk.turns.clear()
        self.engine.reset()

    def system(self, text: str) -> None:
        """[TEXT] show or set the system prompt; "none" removes it"""
        if text:
            self.talk.system = None if text == "none" else text
        self.ui.note(f"system prompt: {self.talk.system or 'none'}")

    def set(self, argument: str) -> None:
        """[NAME VALUE] show or set how tokens are chosen; "none": the model's own"""
        name, _, value = argument.partition(" ")
        if value.strip():
            self.sampling = changed(self.sampling, name, value.strip())
        chosen = self.sampling.merged(self.engine.sampling)
        shown = {name: field(name)} if name else vars(chosen)
        self.ui.note(", ".join(f"{name}={getattr(chosen, name)}" for name in shown))

    def think(self, value: str) -> None:
        """[on|off|WORD] show or set how much the model thinks; "none": as its template has it"""
        if value:
            chosen = None if value == "none" else value
            self.engine.think(chosen)
            self.thinking = chosen
        self.ui.note(f"thinking: {self.thinking or 'as the template has it'}")

    def reasoning(self, mode: str) -> None:
        """[dim|fold|hide|show] how reasoning is shown; show: that of the last answer"""
        if mode == "show":
            if not self.thoughts:
                raise OffmoeError("the last answer has no reasoning")
            self.ui.think(self.thoughts + "\n")
            return
        if mode and mode not in MODES:
            raise OffmoeError(f"reasoning is {mode!r}: expected {', '.join(MODES)} or show")
        self.mode = mode or self.mode
        self.ui.note(f"reasoning: {self.mode}")

    def save(self, argument: str) -> None:
        """FILE write the conversation"""
        self.talk.save(file_argument(argument), self.model)

    def load(self, argument: str) -> None:
        """FILE go on with a conversation that /save wrote"""
        self.talk = Conversation.load(file_argument(argument), self.model, self.engine.config.vocab)
        self.ui.note(f"{len(self.talk.turns) // 2} turns read")

    def exit(self, _: str) -> None:
        """leave"""
        raise Leave


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    f"/{method.__name__}": method
    for method in (
        Chat.help, Chat.stats, Chat.reset, Chat.system, Chat.set, Chat.think, Chat.reasoning, Chat.save, Chat.load,
        Chat.exit,
    )
}  # fmt: skip


def changed(sampling: Sampling, name: str, text: str) -> Sampling:
    """`sampling` with one field read from `text`."""
    kind = field(name)
    if name == "stop":
        return replace(sampling, stop=() if text == "none" else (text,))
    value: Any = None
    try:
        if text != "none":
            value = int(text) if kind.startswith("int") else float(text)
        return replace(sampling, **{name: value})
    except ValueError:
        raise OffmoeError(f"{name} is {text!r}: expected a number, or none") from None


def field(name: str) -> str:
    """The type of one of Sampling's fields, as it is written there."""
    kinds = {field.name: str(field.type) for field in fields(Sampling)}
    if name not in kinds:
        raise OffmoeError(f"/set knows no {name!r}: known are {', '.join(kinds)}")
    return kinds[name]


def file_argument(text: str) -> Path:
    if not text:
        raise OffmoeError("a file name is missing: write for example /save chat.json")
    return Path(os.path.expanduser(text))
