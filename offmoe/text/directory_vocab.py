"""Vocabulary of a safetensors directory, from its tokenizer and JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from offmoe.errors import OffmoeError
from offmoe.text.tiktoken_file import open_tiktoken
from offmoe.text.vocab import NAMES, Vocab, converting_errors, end_of_turn_ids, one_line

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint


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
