"""Command `offmoe chat`: what its options begin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from offmoe.app.attachments import read_attachment
from offmoe.app.chat import Chat
from offmoe.app.chat_store import ChatStore, KeptChat, chats_directory, kept_chats, last_chat
from offmoe.app.commands import continue_chat
from offmoe.app.conversation import load_conversation
from offmoe.app.options import parse_options
from offmoe.app.profile import apply_profile
from offmoe.app.prompt import choose_ui
from offmoe.app.report import chats_table
from offmoe.app.signals import ChatSignals
from offmoe.app.terminal import UI, console
from offmoe.checkpoint.find_model import find_model
from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from offmoe.engine import Engine


def list_chats() -> None:
    """Print a table of the kept chats."""
    console().print(chats_table(list(kept_chats())))


def start_chat(
    load: Callable[..., Engine],
    model: str | None,
    again: bool,
    no_keep: bool,
    commands: bool,
    files: tuple[str, ...],
    plain: bool,
    no_profile: bool,
    system: str | None,
    think: str | None,
    reasoning: str,
    stats: str,
    **chosen: Any,
) -> None:
    """Load MODEL, or that of the last chat, and chat until the user leaves."""
    settings, sampling = parse_options(chosen)
    last = last_chat() if again else None
    name = model if model is not None else last.model if last else "demo"
    path = find_model(name)
    settings, profile_note = (settings, None) if no_profile else apply_profile(path, settings)
    attachments = [read_attachment(file) for file in files]
    signals = ChatSignals()
    ui = choose_ui(signals, commands, plain, keep=not no_keep)
    full_name = str(path.resolve())
    with load(path, settings, think) as engine, signals if ui.interactive else nullcontext():
        for line in (f"{name} · {engine.plan.summary()}", *filter(None, [profile_note]), *engine.notes):
            ui.note(line)
        keeps = not no_keep and (ui.interactive or again)
        store = open_store(ui, full_name) if keeps else None
        chat = Chat(engine, ui, full_name, sampling, system, reasoning, think, stats, store)
        chat.attachments = attachments
        if last:
            resume(chat, last, system)
        chat.loop()


def open_store(ui: UI, model: str) -> ChatStore | None:
    """Return the store of chats, or None, with a note, if they cannot be kept."""
    try:
        return ChatStore(chats_directory(), model)
    except OffmoeError as error:
        ui.note(f"this chat is not kept: {error}")
        return None


def resume(chat: Chat, last: KeptChat, system: str | None) -> None:
    """Go on with a kept chat; `system` replaces its system prompt."""
    conversation, model = load_conversation(last.path, chat.model, chat.engine.config.vocab)
    if system is not None:
        conversation.system = system
    continue_chat(chat, conversation, model, last.path)
