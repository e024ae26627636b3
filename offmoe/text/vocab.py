"""Vocabulary, special tokens and chat template, read from a safetensors directory or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from offmoe.errors import OffmoeError
from offmoe.text.pretokenizers import PreTokenizerKind, build_pre_tokenizer, find_kind
from offmoe.text.tiktoken_file import open_tiktoken

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; 1 is normal, 5 unused
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
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


def read_vocab(checkpoint: Checkpoint) -> Vocab:
    """Read the vocabulary of an open checkpoint. Raises OffmoeError if it has none or one of an unknown kind."""
    return vocab_from_gguf(checkpoint.metadata) if checkpoint.kind == "gguf" else vocab_from_directory(checkpoint)


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


# Safetensors directories.


def vocab_from_directory(checkpoint: Checkpoint) -> Vocab:
    """Read `tokenizer.json` or a tiktoken file, and the special tokens named in the directory's other JSON files."""
    config = checkpoint.json("tokenizer_config.json") or {}
    tokenizer = open_tokenizer(checkpoint.path, config)
    names = {key: text for key in NAMES.values() if (text := token_text(config.get(key))) is not None}
    bos = tokenizer.token_to_id(names["bos_token"]) if "bos_token" in names else None
    eos = [tokenizer.token_to_id(names["eos_token"])] if "eos_token" in names else []
    for file in ("generation_config.json", "config.json"):
        listed = (checkpoint.json(file) or {}).get("eos_token_id")
        eos += listed if isinstance(listed, list) else [listed]
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    add_bos = config.get("add_bos_token")
    return Vocab(
        tokenizer,
        names,
        bos,
        end_of_turn_ids(added, (id for id in eos if isinstance(id, int))),
        bos is not None and (adds_bos(tokenizer, bos) if add_bos is None else bool(add_bos)),
        find_chat_template(checkpoint.path, config),
    )


def open_tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Open a directory's `tokenizer.json` or tiktoken file. Raises OffmoeError if it has neither."""
    file = path / "tokenizer.json"
    if not file.is_file():
        with converting_errors(f"{path}: its tiktoken file is damaged"):
            ranked = open_tiktoken(path, config)
        if ranked:
            return ranked
        raise OffmoeError(
            f"{path} has no tokenizer.json: put the model's tokenizer files into the same directory as its weights"
        )
    with converting_errors(f"{file} cannot be read by the tokenizers library"):
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def adds_bos(tokenizer: Tokenizer, bos: int) -> bool:
    """Return whether tokenizer.json's own post-processor puts bos before a text."""
    return list(tokenizer.encode("").ids[:1]) == [bos]


def token_text(value: Any) -> str | None:
    """Return the text of a special token in tokenizer_config.json: a string, or an object with a `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def find_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template: `chat_template.jinja`, else tokenizer_config.json's, and of several named ones
    `default`.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OffmoeError(f"{file} is not UTF-8: {one_line(error)}") from None


# GGUF.


@dataclass(frozen=True)
class GgufVocab:
    """Metadata `tokenizer.ggml.*`, validated: one type for each token, and no duplicate tokens."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        return {text: id for id, text in enumerate(self.tokens)}

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def kind(self) -> PreTokenizerKind:
        """Return the pre-tokenizer's kind; the tokenizer model gemma4 has one of its own."""
        return find_kind("gemma4" if self.get("model") == "gemma4" else self.get("pre", "default"))

    def id(self, name: str, default: int | None = None) -> int | None:
        """Return `tokenizer.ggml.<name>_token_id`, or None if it is outside the vocabulary."""
        value = self.get(f"{name}_token_id", default)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def strings(self, key: str) -> list[str]:
        """Return a list of strings. Raises OffmoeError if the key is missing or holds anything else."""
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise OffmoeError(
                f"tokenizer.ggml.{key} is missing or not a list of strings: the file has no usable tokenizer"
            )
        return values


def vocab_from_gguf(metadata: Mapping[str, Any]) -> Vocab:
    """Read a BPE vocabulary with merges ("gpt2", "gemma4") or with sentencepiece scores ("llama")."""
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "no_vocab", "none"):
        raise OffmoeError("the file has no tokenizer (no vocabulary in it): use a GGUF that has one, or pass token ids")
    if model not in ("gpt2", "gemma4", "llama"):
        raise OffmoeError(f"the file's tokenizer model {model!r} is not supported: expected gpt2, gemma4 or llama")
    vocab = read_gguf_tokens(metadata)
    sentencepiece = model == "llama"
    with converting_errors("the file's tokenizer is damaged"):
        tokenizer = sentencepiece_bpe(vocab) if sentencepiece else bpe_with_merges(vocab)
    return build_vocab(vocab, tokenizer, sentencepiece)


def read_gguf_tokens(metadata: Mapping[str, Any]) -> GgufVocab:
    """Read the token list and the types. Raises OffmoeError if their lengths differ or a token appears twice."""
    tokens = GgufVocab(metadata, [], []).strings("tokens")
    tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(tokens)]  # named as in llama.cpp
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise OffmoeError(f"tokenizer.ggml.token_type does not match the {len(tokens)} tokens: the file is damaged")
    if len(set(tokens)) != len(tokens):
        raise OffmoeError("tokenizer.ggml.tokens has the same token twice: the file is damaged")
    return GgufVocab(metadata, tokens, types)


def build_vocab(vocab: GgufVocab, tokenizer: Tokenizer, sentencepiece: bool) -> Vocab:
    """Add the special ids and the template to the tokenizer; defaults follow llama.cpp for each kind."""
    bos = vocab.id("bos", 1 if sentencepiece else None)
    eos = vocab.id("eos", 2 if sentencepiece else None)
    ends = end_of_turn_ids(vocab.ids(), (id for id in (eos, vocab.id("eot"), vocab.id("eom")) if id is not None))
    mark_special(tokenizer, vocab, ends)
    ids = {"bos": bos, "eos": eos, "unknown": vocab.id("unknown"), "padding": vocab.id("padding")}
    add_bos = vocab.get("add_bos_token", sentencepiece or vocab.kind().add_bos)
    template = vocab.metadata.get("tokenizer.chat_template")
    return Vocab(
        tokenizer,
        {NAMES[name]: vocab.tokens[id] for name, id in ids.items() if id is not None},
        bos,
        ends,
        bos is not None and bool(add_bos),
        template if isinstance(template, str) else None,
    )


def mark_special(tokenizer: Tokenizer, vocab: GgufVocab, ends: frozenset[int]) -> None:
    """Add the tokens that are matched in text before it is split: control tokens are hidden, user-defined ones
    visible.
    """
    added = []
    for id, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or id in ends:
            added.append(AddedToken(text, special=kind != USER_DEFINED or id in ends, normalized=False))
    tokenizer.add_tokens(added)


def bpe_with_merges(vocab: GgufVocab) -> Tokenizer:
    """Return a BPE over GPT-2's byte characters or over Unicode characters. GGUF stores a merge as `left right`."""
    kind = vocab.kind()
    ids, merges = vocab.ids(), []
    for merge in vocab.strings("merges"):
        space = merge.find(" ", 1)  # a token may begin with a space
        left, right = merge[:space], merge[space + 1 :]
        if not (left in ids and right in ids and left + right in ids):
            raise OffmoeError(f"the merge {merge!r} contains an unknown token: the file's tokenizer is damaged")
        merges.append((left, right))
    if kind.byte_level:
        ignore = bool(vocab.get("ignore_merges", kind.ignore_merges))
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=ignore))
        tokenizer.decoder = decoders.ByteLevel()
        if vocab.get("normalizer") == "nfc":  # a key that `offmoe pack` writes, as ignore_merges
            tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer = character_bpe(vocab, merges, bool(vocab.get("add_space_prefix", False)))
    tokenizer.pre_tokenizer = build_pre_tokenizer(kind)
    return tokenizer


def sentencepiece_bpe(vocab: GgufVocab) -> Tokenizer:
    """Return a BPE whose merges follow from the tokens' scores."""
    return character_bpe(vocab, merges_from_scores(vocab), bool(vocab.get("add_space_prefix", True)))


def character_bpe(vocab: GgufVocab, merges: list[tuple[str, str]], add_prefix: bool) -> Tokenizer:
    """Return a BPE with `▁` for spaces and byte tokens for characters that are not in the vocabulary.

    `add_prefix`: put a space before each text.
    """
    unknown = vocab.id("unknown", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab.ids(),
            merges=merges,
            unk_token=None if unknown is None else vocab.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begin = [normalizers.Prepend("▁")] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(vocab: GgufVocab) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a third one, by descending score of the merged token."""
    scores = vocab.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocab.tokens):
        raise OffmoeError(f"tokenizer.ggml.scores does not match the {len(vocab.tokens)} tokens: the file is damaged")
    parts = {text for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind not in (CONTROL, BYTE, UNKNOWN)}
    merges = [
        (score, text[:cut], text[cut:])
        for text, score in zip(vocab.tokens, scores, strict=True)
        if text in parts
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]
