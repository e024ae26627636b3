"""Vocabulary, special tokens and chat template of a model: what `directory_vocab.py` and `gguf_vocab.py` read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Tokenizer

from offmoe.errors import OffmoeError

NAMES = {  # tokenizer.ggml.<key>_token_id → name in chat templates
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",  # as llama.cpp spells it
    "cls": "cls_token",
    "mask": "mask_token",
}
# Tokens that end a turn in some family, as listed in llama.cpp (src/llama-vocab.cpp). </s> is left out: it is an
# ordinary token in Qwen's vocabulary, and other files name it as their eos.
END_OF_TURN = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_utterance>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        "<｜end▁of▁sentence｜>",
    }
)


@dataclass(frozen=True)
class Vocab:
    """Tokenizer, special tokens and chat template of a checkpoint."""

    tokenizer: Tokenizer
    names: dict[str, str]  # bos_token, eos_token, … as chat templates read them
    bos: int | None
    eos: frozenset[int]  # all ids that end a turn
    add_bos: bool  # whether plain text starts with bos; chat templates write their own
    chat_template: str | None
    notes: tuple[str, ...] = ()  # remarks on what was guessed, to be shown to the user


def end_of_turn_ids(ids: Mapping[str, int], known: Iterable[int]) -> frozenset[int]:
    """Return `known` and every id whose text ends a turn.

    In OpenAI's harmony format <|end|> ends a message, not a turn.
    """
    found = {ids[text] for text in END_OF_TURN & ids.keys()} | set(known)
    if "<|end|>" in ids and ({"<|return|>", "<|call|>"} <= ids.keys() or {"<|calls|>", "<|flush|>"} <= ids.keys()):
        found.discard(ids["<|end|>"])
    return frozenset(found)


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def converting_errors(what: str) -> Iterator[None]:
    """Turn everything that the tokenizers library raises into OffmoeError.

    It raises bare Exception, and BaseException when its Rust code panics.
    """
    try:
        yield
    except (OffmoeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise OffmoeError(f"{what}: {one_line(error)}") from None
