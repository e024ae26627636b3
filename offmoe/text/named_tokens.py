"""Special and added tokens of a directory, from all files that may hold them, with the precedence of transformers.

`tokenizer.json` has a vocabulary and added tokens. `tokenizer_config.json` names tokens (`bos_token`, `image_token`),
lists more (`extra_special_tokens`, formerly `additional_special_tokens`) and may define all added ones
(`added_tokens_decoder`). Directories without the latter have `special_tokens_map.json`, which then wins, and
`added_tokens.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from json import JSONDecoder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRAS = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
ENDOFTEXT = "<|endoftext|>"
CLASS_DEFAULTS = {  # names that a tokenizer class gives where tokenizer_config.json has no such key
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), ENDOFTEXT),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), ENDOFTEXT),
    "GPTNeoXTokenizer": {
        "unk_token": ENDOFTEXT,
        "bos_token": ENDOFTEXT,
        "eos_token": ENDOFTEXT,
        "pad_token": "<|padding|>",
    },
    "CohereTokenizer": {
        "unk_token": "<UNK>",
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
}
CLASS_DEFAULTS["Qwen3_5Tokenizer"] = CLASS_DEFAULTS["Qwen2Tokenizer"]


def complete_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[dict[str, str], list[str]]:
    """Add the tokens that stand outside of tokenizer.json to `tokenizer`; return (named tokens, notes).

    The names are those that a chat template may read: `bos_token`, `eos_token`, `image_token` and so on.
    """
    config = read_object(checkpoint, "tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    entries = dict(config)
    if isinstance(listed, dict):
        tokens = [(int(id), added_token(entry)) for id, entry in listed.items() if id.isdecimal()]
    else:
        entries |= read_object(checkpoint, "special_tokens_map.json")
        numbered = read_object(checkpoint, "added_tokens.json")
        special = {text for text in (*named(entries).values(), *extras(entries)) if text is not None}
        tokens = [
            (id, AddedToken(text, normalized=text not in special, special=text in special))
            for text, id in numbered.items()
            if isinstance(id, int)
        ]
    names = with_defaults(named(entries), config, tokenizer)
    wanted = [token for _, token in sorted(tokens, key=lambda pair: pair[0]) if token is not None]
    wanted += [flagged(entries.get(name), text) for name, text in names.items()]
    wanted += [AddedToken(text, special=True) for text in extras(entries)]
    add_missing(tokenizer, wanted, set(names.values()))
    return names, moved(tokenizer, [*tokens, *listed_in_file(checkpoint.path / "tokenizer.json")])


def read_object(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """Return the JSON object in `file`; empty if there is no such file. Raises OffmoeError for anything else."""
    value = checkpoint.json(file)
    if value is not None and not isinstance(value, dict):
        raise OffmoeError(f"{checkpoint.path}/{file} holds a {type(value).__name__}: expected an object")
    return value or {}


def named(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return the named tokens: `bos_token` and its like, those of the model's own, and a table of extra ones."""
    own = [key for key in entries if key.endswith("_token") and not isinstance(entries[key], bool)]
    table: dict[str, Any] = next((entries[key] for key in EXTRAS if isinstance(entries.get(key), dict)), {})
    texts = {key: token_text(entries[key]) for key in own} | {key: token_text(value) for key, value in table.items()}
    return {key: text for key, text in texts.items() if text is not None}


def extras(entries: Mapping[str, Any]) -> list[str]:
    """Return the special tokens that have no name."""
    listed = next((entries[key] for key in EXTRAS if entries.get(key)), None)
    return [text for value in listed if (text := token_text(value))] if isinstance(listed, list) else []


def token_text(value: Any) -> str | None:
    """Return the text of a token: a string, or an object with a `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def added_token(entry: Any) -> AddedToken | None:
    """Return the token that an object describes, or None if it has no text."""
    text = token_text(entry) if isinstance(entry, dict) else None
    return None if text is None else AddedToken(text, **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})


def flagged(entry: Any, text: str) -> AddedToken:
    """Return a named token, with the flags of `entry` if it is an object."""
    token = added_token(entry) if isinstance(entry, dict) else None
    return token or AddedToken(text, special=True)


def with_defaults(names: dict[str, str], config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names, completed by the tokenizer class where it has the token and the config does not say."""
    kind = config.get("tokenizer_class")
    defaults = CLASS_DEFAULTS.get(kind.removesuffix("Fast"), {}) if isinstance(kind, str) else {}
    own = {key: text for key, text in defaults.items() if key not in config and tokenizer.token_to_id(text) is not None}
    return own | names


def add_missing(tokenizer: Tokenizer, tokens: list[AddedToken], special: set[str]) -> None:
    """Add the tokens that `tokenizer` does not match yet; those in `special` are hidden in answers."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    fresh: dict[str, AddedToken] = {}
    for token in tokens:
        token.special = token.special or token.content in special
        if token.content and token.content not in known:
            fresh.setdefault(token.content, token)
    tokenizer.add_tokens(list(fresh.values()))


def moved(tokenizer: Tokenizer, tokens: Iterable[tuple[Any, AddedToken | None]]) -> list[str]:
    """Return a note if an added token has another id than its file says: ids of added tokens leave no gaps."""
    found = [(token.content, id, tokenizer.token_to_id(token.content)) for id, token in tokens if token is not None]
    return [
        f"the token {text!r} has the id {got} and not {id}, as in transformers: its file leaves a gap before it"
        for text, id, got in found
        if got != id and text
    ][:1]


def listed_in_file(file: Path) -> list[tuple[Any, AddedToken | None]]:
    """Return ids and added tokens as a tokenizer.json lists them, without parsing the rest of it, or [] on damage."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    try:
        entries, _ = JSONDecoder().raw_decode(text, text.index("[", text.index('"added_tokens"')))
    except ValueError:
        return []
    return [(entry.get("id"), added_token(entry)) for entry in entries if isinstance(entry, dict)]
