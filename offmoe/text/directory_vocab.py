"""Vocabulary of a safetensors directory, from its tokenizer and JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from offmoe.errors import OffmoeError
from offmoe.text.named_tokens import complete_tokens, read_object
from offmoe.text.template_files import directory_template
from offmoe.text.tiktoken_file import open_tiktoken
from offmoe.text.vocab import Vocab, converting_errors, end_of_turn_ids

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

END_NAMES = ("eos_token", "eot_token", "eom_token")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def vocab_from_directory(checkpoint: Checkpoint) -> Vocab:
    """Read `tokenizer.json` or a tiktoken file, and all that the directory's other files say about its tokens."""
    config = read_object(checkpoint, "tokenizer_config.json")
    tokenizer = open_tokenizer(checkpoint.path, config)
    with converting_errors(f"{checkpoint.path}: its added tokens cannot be read"):
        names, notes = complete_tokens(checkpoint, tokenizer)
    bos = tokenizer.token_to_id(names["bos_token"]) if "bos_token" in names else None
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    ends = end_of_turn_ids(added, named_ends(checkpoint, tokenizer, names))
    template, template_notes = directory_template(checkpoint, config)
    add_bos = config.get("add_bos_token")
    return Vocab(
        tokenizer,
        names,
        bos,
        ends,
        bos is not None and (adds_bos(tokenizer, bos) if add_bos is None else bool(add_bos)),
        template,
        (*notes, *template_notes),
    )


def named_ends(checkpoint: Checkpoint, tokenizer: Tokenizer, names: Mapping[str, str]) -> Iterator[int]:
    """Yield the ids that end an answer, from every file that may name them: an id or a list of ids."""
    texts = [names[name] for name in END_NAMES if name in names]
    for id in map(tokenizer.token_to_id, texts):
        if id is not None:
            yield id
    config = read_object(checkpoint, "config.json")
    nested = [config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)]
    for table in (
        read_object(checkpoint, "generation_config.json"),
        config,
        *nested,
        read_object(checkpoint, "tokenizer_config.json"),
    ):
        listed = table.get("eos_token_id")
        for id in listed if isinstance(listed, list) else [listed]:
            if isinstance(id, int) and not isinstance(id, bool):
                yield id


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
