"""Convert text and conversations to token ids and back; answers are decoded by `answer_parser.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from tokenizers.decoders import Decoder

from offmoe.errors import OffmoeError
from offmoe.text.answer_parser import AnswerParser, Detokenizer, StopStrings
from offmoe.text.byte_unicode import unicode_to_bytes
from offmoe.text.chat_template import ChatTemplate
from offmoe.text.control_tokens import ControlTokens, Span
from offmoe.text.directory_vocab import vocab_from_directory
from offmoe.text.gguf_vocab import vocab_from_gguf
from offmoe.text.messages import Message, check_unicode, text_messages
from offmoe.text.prompt_renderer import Kept, PromptRenderer
from offmoe.text.reasoning_parser import detect_format
from offmoe.text.thinking_switch import thinking_variables
from offmoe.text.vocab import Vocab

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
TAIL = 64  # tokens before a prompt's last marker, or its end, that are searched for the start of reasoning
ENDLESS = "nothing in the model's files says which token ends an answer: it goes on to --max-tokens or a full context"


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer of an open checkpoint. Raises OffmoeError if it has none or one of an unknown kind."""
    is_gguf = checkpoint.kind == "gguf"
    return Tokenizer(vocab_from_gguf(checkpoint.metadata) if is_gguf else vocab_from_directory(checkpoint))


class Tokenizer:
    """Vocabulary and chat format of a model. `close()` ends the chat template's process."""

    def __init__(self, vocab: Vocab) -> None:
        self.bos = vocab.bos
        self.eos = vocab.eos
        self.chat_template = vocab.chat_template
        self._bpe = vocab.tokenizer
        self._add_bos = vocab.add_bos
        self._control = ControlTokens(self._bpe, self.eos)
        self._template = ChatTemplate(vocab.chat_template, vocab.names) if vocab.chat_template else None
        self._added = self._bpe.get_added_tokens_decoder()
        added = {token.content: id for id, token in self._added.items()}
        special = [token.content for token in self._added.values() if token.special]
        self.reasoning = detect_format(vocab.chat_template or "", added, special)
        self._renderer = PromptRenderer(self._template, self._control, self.reasoning) if self._template else None
        self._byte_level, self.strips_leading_space = decoder_kind(self._bpe.decoder)
        self._notes = [*vocab.notes, *([] if self.eos else [ENDLESS])]
        self._bytes_cache: dict[int, bytes] = {}
        self.vocab_size: int = self._bpe.get_vocab_size(with_added_tokens=True)

    @property
    def notes(self) -> list[str]:
        """Remarks on loading, to be shown to the user: what was guessed, and what is missing."""
        return [*self._notes, *(self._template.empty_variables() if self._template else [])]

    @property
    def prompt_notes(self) -> list[str]:
        """Remarks on the last conversation: messages that the chat template left out."""
        return self._renderer.notes if self._renderer else []

    def encode(self, text: str, control_tokens: bool = True) -> list[int]:
        """Return the ids of text without a template, after bos if the model uses one.

        `control_tokens`: recognise them in the text, as in a prompt that was formatted by hand. Without, `<|im_end|>`
        and the like are ordinary text.
        """
        ids = self._encode(text, control_tokens)
        return [self.bos, *ids] if self._add_bos and self.bos is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(id) for id in ids]) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """Return a new incremental detokenizer."""
        return Detokenizer(self.token_bytes, self.strips_leading_space)

    def answer_parser(self, prompt: Sequence[int], stops: Iterable[str] = (), continues: bool = False) -> AnswerParser:
        """Return a parser that turns the tokens of the answer to `prompt` into reasoning and answer text.

        `continues`: the prompt ends inside the answer, whose next token may begin with a space.
        """
        detokenizer = Detokenizer(self.token_bytes, self.strips_leading_space and not continues)
        reasoning = self.reasoning.parser(self._prompt_tail(prompt))
        return AnswerParser(detokenizer, self.reasoning.markers, reasoning, StopStrings(stops))

    def _prompt_tail(self, prompt: Sequence[int]) -> str:
        """Return the text of the last tokens, from some tokens before the last marker on: markers as surrogates, other
        hidden tokens as NUL.
        """
        markers = self.reasoning.markers
        last = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] in markers), len(prompt))
        tail = prompt[max(0, last - TAIL) :]
        return "".join([markers.get(id) or self.token_bytes(id).decode("utf-8", "replace") or "\0" for id in tail])

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; empty for special tokens and ids outside the vocabulary."""
        token_bytes = self._bytes_cache.get(id)
        if token_bytes is None:
            token_bytes = self._bytes_cache[id] = self._compute_token_bytes(id)
        return token_bytes

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation in the model's own format.

        With `add_generation_prompt` they end where the answer begins; if the last message is the assistant's, the
        answer continues it. Only the template's own text makes control tokens: what spells one in a message is encoded
        as ordinary text. The `tokens` of a message are used verbatim wherever the template leaves its content
        unchanged. Raises OffmoeError if the model has no chat template, or if the template rejects the conversation or
        leaves out its last message.
        """
        if self._renderer is None:
            raise OffmoeError("the model has no chat template: use plain text instead of messages")
        ids: list[int] = []
        parts = self._renderer.render(text_messages(messages), add_generation_prompt)
        for is_text, group in groupby(parts, key=lambda part: isinstance(part, Span)):
            if is_text:
                ids += self._encode_after([part for part in group if isinstance(part, Span)], bool(ids))
            else:
                ids += [id for part in group if isinstance(part, Kept) for id in part.tokens]
        return ids

    def think(self, value: str | None) -> None:
        """Set how much the model thinks in later conversations: "on", "off", or a word such as "low" or "high".

        None restores the template's default. Raises OffmoeError if the template has no such variable.
        """
        if self._template is None:
            raise OffmoeError("the model has no chat template: its thinking cannot be set")
        self._template.extra_variables = thinking_variables(value, self._template.variables)

    def close(self) -> None:
        """End the chat template's process."""
        if self._template is not None:
            self._template.close()

    def _encode(self, text: str, control_tokens: bool = True) -> list[int]:
        return self._encode_spans([Span(text, not control_tokens)])

    def _encode_spans(self, spans: Sequence[Span]) -> list[int]:
        for span in spans:
            check_unicode(span.text)
        return self._control.encode(spans)

    def _encode_after(self, spans: Sequence[Span], follows: bool) -> list[int]:
        """Return the ids of text that may follow other tokens: then without the space that some models put before a
        text.
        """
        if not (follows and self.strips_leading_space):
            return self._encode_spans(spans)
        newline = Span("\n", False)
        before, ids = self._encode_spans([newline]), self._encode_spans([newline, *spans])
        return ids[len(before) :] if ids[: len(before)] == before else self._encode_spans(spans)

    def _compute_token_bytes(self, id: int) -> bytes:
        added = self._added.get(id)
        if id in self.eos or (added is not None and added.special):
            return b""
        text = self._bpe.id_to_token(id) or ""
        if self._byte_level:
            return text.encode() if added else unicode_to_bytes(text)
        byte = BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


def decoder_kind(decoder: Decoder | None) -> tuple[bool, bool]:
    """Return (bytes are stored as GPT-2's characters, a text's leading space is dropped), from the tokenizer's
    decoder.
    """
    steps = re.findall(r'"type":\s*"(\w+)"', decoder.__getstate__().decode()) if decoder is not None else []
    if "ByteLevel" in steps:
        return True, False
    if "ByteFallback" in steps or "Metaspace" in steps:
        return False, "Strip" in steps or "Metaspace" in steps
    raise OffmoeError(f"the tokenizer's decoder {steps} is not supported: expected byte-level BPE or sentencepiece BPE")
