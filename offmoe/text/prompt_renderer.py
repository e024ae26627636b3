"""Render a conversation and know whose text each part is: the template's own, or data from a message.

The template is rendered twice: with the messages' texts, and with a placeholder for each of them. Where both agree,
every text is located. A template that looks into the texts (for reasoning in them) gives other results; then at least
what spells a control token is located, for it is rendered under a stand-in in either case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.text.chat_template import ChatTemplate
from offmoe.text.control_tokens import ControlTokens, Span
from offmoe.text.drafts import Draft, Field, Located, align, cut_after, new_name
from offmoe.text.reasoning_parser import ReasoningFormat


@dataclass(frozen=True)
class Kept:
    """Token ids that a model generated, used verbatim."""

    tokens: Sequence[int]


class PromptRenderer:
    """Renders the conversations of one model."""

    def __init__(self, template: ChatTemplate, control: ControlTokens, reasoning: ReasoningFormat) -> None:
        self.notes: list[str] = []  # what the template left out of the last conversation
        self._template, self._control, self._reasoning = template, control, reasoning
        self._typed: frozenset[str] = frozenset()  # roles whose content the template reads as a list of parts
        self._stand_ins: dict[str, str] = {}  # stand-in → text that spells a control token

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[Span | Kept]:
        """Return the prompt. With `add_generation_prompt` it ends where the answer begins.

        If the last message is the assistant's, the answer continues it. Raises OffmoeError if the template rejects the
        conversation or leaves out the user's last message.
        """
        self._stand_ins = {}
        continues = add_generation_prompt and bool(messages) and messages[-1]["role"] == "assistant"
        if continues and not (messages[-1]["content"].strip() or messages[-1].get("reasoning")):
            messages, continues = messages[:-1], False
        prompt = add_generation_prompt and not continues
        drafts, text = self._drafts(messages, prompt)
        text, marked = self._give_parts(drafts, text, self._marked(drafts, prompt), prompt)
        self._report_losses(drafts, text, marked, prompt)
        fields = {field.name: field for draft in drafts for field in draft.fields if not field.is_blank}
        located = align(marked, text, fields) if marked is not None else None
        located = located or self._locate_tokens(drafts, text, prompt)
        return list(self._spans(cut_after(located, drafts[-1]) if continues else located, fields))

    def _drafts(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> tuple[list[Draft], str]:
        """Return the messages as drafts and their text.

        Reasoning at the start of an answer's content keeps its marks where the template reads them.
        """
        drafts = [self._draft(message) for message in messages]
        text = self._render_any(drafts, prompt)
        split = self._split_blocks(drafts, prompt)
        return (drafts, text) if split == drafts else (split, self._render(split, prompt))

    def _draft(self, message: Mapping[str, Any]) -> Draft:
        role, reasoning = message["role"], message.get("reasoning")
        if not reasoning:
            return Draft(role, (self._field(message["content"], message.get("tokens")),))
        fields = self._field(reasoning), self._field(message["content"])
        if self._template.reads_reasoning:
            return Draft(role, fields[1:], fields[0])
        before, between = self._reasoning.frame
        return Draft(role, (before, fields[0], between, fields[1]))

    def _field(self, text: str, tokens: Sequence[int] | None = None) -> Field:
        kept = None if tokens and any(id in self._control for id in tokens) else tokens  # a file may hold any ids
        return Field(text, self._control.replace(text, self._stand_in), kept)

    def _stand_in(self, text: str) -> str:
        name = new_name()
        self._stand_ins[name] = text
        return name

    def _split_blocks(self, drafts: Sequence[Draft], prompt: bool) -> list[Draft]:
        """Return the drafts; of answers that begin with reasoning, whose marks the template reads, as fields and marks.

        A template reads the marks if it does not print them as they are.
        """
        open, close = self._reasoning.open, self._reasoning.close
        block = re.compile(rf"(\s*{re.escape(open)})(.*?)({re.escape(close)})(.*)", re.DOTALL)
        found = {
            at: match
            for at, draft in enumerate(drafts)
            if draft.role == "assistant" and (match := block.fullmatch(getattr(draft.content[0], "text", "")))
        }
        if not found:
            return list(drafts)
        probes = {at: f"{open}{new_name()}{close}{new_name()}" for at in found}
        probed = [Draft(draft.role, (probes[at],)) if at in probes else draft for at, draft in enumerate(drafts)]
        rendered = self._marked(probed, prompt, ()) or ""
        split = list(drafts)
        for at, match in found.items():
            if probes[at] not in rendered:
                content = match[1], self._field(match[2]), match[3], self._field(match[4])
                split[at] = Draft(drafts[at].role, content)
        return split

    def _render(
        self, drafts: Sequence[Draft], prompt: bool, show: str = "hidden", only: Collection[str] | None = None
    ) -> str:
        """Return the text with each field as its attribute `show` has it; those not in `only` stay hidden."""
        messages = [
            draft.message(
                lambda field: getattr(field, show if only is None or field.name in only else "hidden"),
                draft.role in self._typed,
            )
            for draft in drafts
        ]
        return self._template.render(messages, prompt)

    def _render_any(self, drafts: Sequence[Draft], prompt: bool) -> str:
        """Return the text; a template that fails on contents as strings is given parts."""
        try:
            return self._render(drafts, prompt)
        except OffmoeError as error:
            before, self._typed = self._typed, frozenset(draft.role for draft in drafts)
            try:
                return self._render(drafts, prompt)
            except OffmoeError:
                self._typed = before
                raise error from None

    def _marked(self, drafts: Sequence[Draft], prompt: bool, only: Collection[str] | None = None) -> str | None:
        """Return the text with placeholders; None if the template rejects them, as one that validates contents may."""
        try:
            return self._render(drafts, prompt, "placeholder", only)
        except OffmoeError:
            return None

    def _give_parts(
        self, drafts: Sequence[Draft], text: str, marked: str | None, prompt: bool
    ) -> tuple[str, str | None]:
        """Return both texts. Roles of whose contents nothing is printed are given parts, if that helps."""
        lost = {draft.role for draft in drafts if marked is not None and draft.is_lost(text, marked)}
        before = self._typed
        for roles in (lost, *({role} for role in sorted(lost))) if lost - before else ():
            self._typed = before | roles
            try:
                typed, typed_marked = self._render(drafts, prompt), self._marked(drafts, prompt)
            except OffmoeError:
                continue
            still = {draft.role for draft in drafts if draft.is_lost(typed, typed_marked or "")}
            if not still & roles:
                return typed, typed_marked
        self._typed = before
        return text, marked

    def _report_losses(self, drafts: Sequence[Draft], text: str, marked: str | None, prompt: bool) -> None:
        """Set the notes. Raises OffmoeError if nothing in the prompt comes from the user's last message."""

        def is_lost(draft: Draft) -> bool:
            names = [field.name for field in draft.fields]
            return draft.is_lost(text, marked or text) and self._marked(drafts, prompt, names) == text

        lost = [draft for draft in drafts if marked is not None and is_lost(draft)]
        asked = [draft for draft in drafts if draft.role == "user"]
        if asked and asked[-1] in lost:
            raise OffmoeError("the chat template leaves out the last message: use plain text, or another template")
        roles = dict.fromkeys(draft.role for draft in lost)
        self.notes = [f"the chat template leaves out messages of the role {role!r}" for role in roles]

    def _locate_tokens(self, drafts: Sequence[Draft], text: str, prompt: bool) -> Located:
        """Return `text` in which only texts with tokens are located: those that the template leaves unchanged."""
        fields = {field.name: field for draft in drafts for field in draft.fields if field.tokens}

        def attempt(only: Mapping[str, Field]) -> Located | None:
            marked = self._marked(drafts, prompt, only) if only else None
            return align(marked, text, only) if marked is not None else None

        unchanged = {name: field for name, field in fields.items() if attempt({name: field}) is not None}
        return attempt(unchanged) or [(text, "")]

    def _spans(self, located: Located, fields: Mapping[str, Field]) -> Iterator[Span | Kept]:
        names = [name for _, name in located]
        for text, name in located:
            if name and fields[name].tokens and names.count(name) == 1:
                yield Kept(fields[name].tokens or ())
            elif name:
                yield Span(self._fill(text), True)
            else:
                for piece in re.split(f"({'|'.join(self._stand_ins)})", text) if self._stand_ins else [text]:
                    yield Span(self._stand_ins.get(piece, piece), piece in self._stand_ins)

    def _fill(self, text: str) -> str:
        """Return `text` with stand-ins replaced by what they stand for."""
        if not self._stand_ins:
            return text
        return re.sub("|".join(self._stand_ins), lambda match: self._stand_ins[match[0]], text)
