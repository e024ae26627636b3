"""One conversation with an engine: messages are sent, answers are displayed, counted and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offmoe.app.answer_printer import DIM, AnswerPrinter
from offmoe.app.attachments import Attachment, join, mentioned_files, read_attachment
from offmoe.app.conversation import Conversation
from offmoe.app.report import FULL, LINE, context_fill, cut_note, stats_line
from offmoe.app.signals import Terminated
from offmoe.errors import ContextFull, OffmoeError
from offmoe.settings import Sampling
from offmoe.stats.stats import Stats

if TYPE_CHECKING:
    from offmoe.app.chat_store import ChatStore
    from offmoe.app.terminal import UI
    from offmoe.engine import Engine
    from offmoe.text.messages import Message


class Session:
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
        stats: str = LINE,
        store: ChatStore | None = None,
    ) -> None:
        self.engine = engine
        self.ui = ui
        self.model = model
        self.sampling = sampling
        self.conversation = Conversation(system)
        self.answers: list[Stats] = []
        self.thinking = thinking  # value of --think or /think
        self.reasoning_mode = reasoning  # one of REASONING_MODES
        self.stats_mode = stats  # one of STATS_MODES
        self.store = store  # None: the chat is not kept
        self.saved = Conversation()  # the conversation as /save or /load left it in a file
        self.attachments: list[Attachment] = []  # files for the next message
        self.noted: set[str] = set()  # remarks on prompts that were displayed
        self.warned = False  # that the context is nearly full

    @property
    def last_reasoning(self) -> str:
        """Reasoning of the last answer; "" without one."""
        return self.conversation.turns[-1].get("reasoning", "") if self.conversation.turns else ""

    def send(self, text: str) -> None:
        """Send a message, with the files that go with it, and print the answer.

        If that fails, the conversation is as it was; what a signal ends is kept.
        """
        files = [read_attachment(name) for name in mentioned_files(text)] if self.ui.interactive else []
        for file in files:
            self.ui.note(f"attached: {file.summary}")
        self.reply_to(join(text, [*self.attachments, *files]))
        self.attachments = []

    def reply_to(self, message: str) -> None:
        """Answer a message, added to the conversation. It replaces a message that got no answer.

        Raises OffmoeError, with the conversation as it was before.
        """
        before = list(self.conversation.turns)
        try:
            if before and before[-1]["role"] == "user":
                self.conversation.turns.pop()
            self.conversation.turns.append({"role": "user", "content": message})
            self.keep()
            self.answer()
        except OffmoeError:
            self.conversation.turns = before
            self.keep()
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
            raise OffmoeError(
                f"the conversation needs {overflow.tokens} tokens and the context holds {overflow.ctx}: "
                "/clear begins a new one, or start again with a larger --ctx"
            ) from overflow
        if not self.conversation.drop_oldest():
            raise OffmoeError(
                f"this message alone needs {overflow.tokens} tokens and the context holds {overflow.ctx}: "
                "shorten it, or start again with a larger --ctx"
            ) from overflow

    def stream_answer(self) -> None:
        """Print the answer while it is generated; Ctrl-C ends it and keeps the text so far, as any signal does."""
        answer = AnswerPrinter(self.ui, self.reasoning_mode, " · /reasoning show" if self.ui.interactive else "")
        pieces = self.engine.generate(self.conversation.messages(), self.sampling)
        try:
            with self.ui.answering(self.engine.cancel, self.engine.paused):
                for piece in pieces:
                    answer.add(piece)
        except (KeyboardInterrupt, Terminated, OSError):  # OSError: the terminal is gone
            self.record(answer)
            raise
        self.record(answer)
        answer.finish()
        self.report(answer)

    def record(self, answer: AnswerPrinter) -> None:
        """Add the answer to the conversation, and keep it. An empty one leaves the message unanswered."""
        if not answer.text and not answer.reasoning:
            return
        turn: Message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            turn["reasoning"] = answer.reasoning
        if self.engine.answer_is_plain:
            turn["tokens"] = list(self.engine.answer_tokens)
        self.conversation.turns.append(turn)
        self.keep()

    def report(self, answer: AnswerPrinter) -> None:
        """Print an answer's statistics, and what else there is to know about it."""
        stats = self.engine.stats()
        self.answers.append(stats)
        if line := stats_line(stats, self.engine.plan.ctx, self.ui.width, self.stats_mode):
            self.ui.note(line)
        for note in self.engine.prompt_notes:
            if note not in self.noted:
                self.ui.note(note)
        self.noted.update(self.engine.prompt_notes)
        if loading := self.engine.loading():
            self.ui.note(loading)
        if cut := cut_note(stats, answer.text, answer.reasoning):
            self.ui.note(cut)
        if not answer.text and not answer.reasoning:
            self.ui.note("/retry answers the message again, another one replaces it")
        if stats.finish_reason == "context":
            self.ui.note("the context is full: the answer ends here; the next message makes room, or /clear")
        else:
            self.warn_of_overflow(stats)
        if stats.finish_reason == "cancelled" and not self.ui.interactive:
            raise KeyboardInterrupt

    def warn_of_overflow(self, stats: Stats) -> None:
        """Say once that the context is nearly full."""
        ctx = self.engine.plan.ctx
        nearly, used = context_fill(stats, ctx) >= FULL, stats.prompt_tokens + stats.tokens
        if nearly and not self.warned:
            self.ui.note(f"the context is nearly full ({used:,} of {ctx:,} tokens): /clear begins a new conversation")
        self.warned = nearly

    def keep(self) -> None:
        """Bring the kept chat up to date; if that fails, say so once and go on without."""
        if self.store is None:
            return
        try:
            self.store.sync(self.conversation)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self.ui.note(f"this chat is not kept: {self.store.path or 'its file'}: {reason}")
            self.store = None

    def may_leave(self) -> bool:
        """Ask before a conversation that is in no file is given up; return whether it may be."""
        turns = self.conversation.turns
        if not turns or self.store is not None or self.conversation == self.saved:
            return True
        return self.ui.confirm(f"The conversation so far ({len(turns)} messages) is not saved. Give it up?")
