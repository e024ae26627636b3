"""Text to token ids and back: prompts and conversations; an answer comes back through `answer_parser.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from tokenizers.decoders import Decoder

from offmoe.errors import OffmoeError
from offmoe.text.answer_parser import Detokenizer, Speech, StopStrings
from offmoe.text.byte_unicode import letters_to_bytes
from offmoe.text.chat_template import REASONING_KEYS, ChatTemplate
from offmoe.text.reasoning_parser import find_format
from offmoe.text.thinking_switch import thinking_variables
from offmoe.text.vocab import Vocab, read_vocab

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


TAIL = 64  # tokens at the end of a prompt in which it may have begun the answer's reasoning
KEYS = {"role", "content", "reasoning", "tokens"}


class Message(TypedDict):
    """One turn. `tokens`: the ids that the model generated for this content; they are kept verbatim.

    `reasoning`: what led to it; the template decides what becomes of that.
    """

    role: str
    content: str
    reasoning: NotRequired[str]
    tokens: NotRequired[Sequence[int]]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of an open checkpoint; OffmoeError when it has none."""
    return Tokenizer(read_vocab(checkpoint))


class Tokenizer:
    """A model's vocabulary and chat format. `close()` ends the template's process."""

    def __init__(self, vocab: Vocab) -> None:
        self.bos = vocab.bos
        self.eos = vocab.eos
        self.chat_template = vocab.chat_template
        self._bpe = vocab.tokenizer
        self._add_bos = vocab.add_bos
        self._template = ChatTemplate(vocab.chat_template, vocab.names) if vocab.chat_template else None
        self._added = self._bpe.get_added_tokens_decoder()
        added = {token.content: id for id, token in self._added.items()}
        special = [token.content for token in self._added.values() if token.special]
        self.reasoning = find_format(vocab.chat_template or "", added, special)
        self._byte_level, self.starts_with_space = decoder_kind(self._bpe.decoder)
        self._pieces: dict[int, bytes] = {}
        self.vocab_size: int = self._bpe.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, after bos where the model asks for it. Special tokens in it are recognised."""
        ids = self._encode(text)
        return [self.bos, *ids] if self._add_bos and self.bos is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens hidden; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self) -> Detokenizer:
        return Detokenizer(self.piece, self.starts_with_space)

    def speech(self, prompt: Sequence[int], stops: Iterable[str] = ()) -> Speech:
        """What takes the answer to `prompt` apart, a token at a time."""
        marks = self.reasoning.marks
        tail = [marks.get(id) or self.piece(id).decode("utf-8", "replace") for id in prompt[-TAIL:]]
        return Speech(self.stream(), marks, self.reasoning.splitter("".join(tail)), StopStrings(stops))

    def piece(self, id: int) -> bytes:
        """The bytes that an id stands for; none for special tokens and ids outside the vocabulary."""
        piece = self._pieces.get(id)
        if piece is None:
            piece = self._pieces[id] = self._piece(id)
        return piece

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's own format, without a further bos.

        The `tokens` of a message stand verbatim wherever the template leaves its content as it is.
        """
        if self._template is None:
            raise OffmoeError("the model has no chat template: give it plain text instead of messages")
        check_messages(messages)
        given = [self._with_reasoning(self._template, message) for message in messages]
        text, marks = self._template.render_marked(given, add_generation_prompt)
        if not marks:
            return self._encode(text)
        first, *rest = re.split(f"({'|'.join(marks)})", text)
        ids = self._encode(first)
        for mark, piece in zip(rest[::2], rest[1::2], strict=True):
            ids += [*marks[mark]["tokens"], *self._encode_after(piece)]
        return ids

    def think(self, value: str | None) -> None:
        """From now on in conversations: on, off, or a word such as low or high; None: what the template does alone.

        Raises OffmoeError where the template knows no such thing.
        """
        if self._template is None:
            raise OffmoeError("the model has no chat template: nothing tells it how much to think")
        self._template.chosen = thinking_variables(value, self._template.variables)

    def _with_reasoning(self, template: ChatTemplate, message: Message) -> Mapping[str, Any]:
        """`message` as the template wants it: reasoning apart where it looks for that, else within the content."""
        reasoning = message.get("reasoning")
        given = {key: value for key, value in message.items() if key != "reasoning"}
        if not reasoning:
            return given
        given.pop("tokens", None)
        if template.reads_reasoning:
            return given | dict.fromkeys(REASONING_KEYS, reasoning)
        return given | {"content": self.reasoning.whole(reasoning, message["content"])}

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def _encode(self, text: str) -> list[int]:
        check_unicode(text)
        (encoding,) = self._bpe.encode_batch_fast([text], add_special_tokens=False)  # without offsets: a third faster
        return list(encoding.ids)

    def _encode_after(self, text: str) -> list[int]:
        """Ids of text that follows other ids: without the space that some models put before a text."""
        if not self.starts_with_space:
            return self._encode(text)
        newline, ids = self._encode("\n"), self._encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._encode(text)

    def _piece(self, id: int) -> bytes:
        added = self._added.get(id)
        if id in self.eos or (added is not None and added.special):
            return b""
        text = self._bpe.id_to_token(id) or ""
        if self._byte_level:
            return text.encode() if added else letters_to_bytes(text)
        byte = BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


def check_messages(messages: Sequence[Message]) -> None:
    """Roles, contents and reasoning must be strings: images and tools are not supported."""
    for i, message in enumerate(messages, start=1):
        if unknown := message.keys() - KEYS:
            raise OffmoeError(f"message {i} has {sorted(unknown)[0]!r}: give role and content, no images or tools")
        if message.get("role") == "tool":
            raise OffmoeError(f"message {i} has the role 'tool': give text of user and assistant, no images or tools")
        for key in ("role", "content", "reasoning"):
            value = message.get(key, "" if key == "reasoning" else None)
            if not isinstance(value, str):
                kind = type(value).__name__
                raise OffmoeError(f"message {i} has a {key} of type {kind}: give text, no images or tools")
            check_unicode(value)


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OffmoeError(
            f"the text has a lone surrogate (character {error.start}), which is no Unicode: remove it"
        ) from None


def decoder_kind(decoder: Decoder | None) -> tuple[bool, bool]:
    """(bytes are written as letters, a text's leading space is dropped), from the tokenizer's decoder."""
    steps = re.findall(r'"type":\s*"(\w+)"', decoder.__getstate__().decode()) if decoder is not None else []
    if "ByteLevel" in steps:
        return True, False
    if "ByteFallback" in steps or "Metaspace" in steps:
        return False, "Strip" in steps or "Metaspace" in steps
    raise OffmoeError(
        f"the tokenizer's decoder {steps} is not supported: known are byte-level BPE and sentencepiece BPE"
    )
