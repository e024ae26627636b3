"""Chat templates of a checkpoint, from all places that may hold one; of several named ones the default is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offmoe.text.read_text import read_text

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

GGUF_KEY = "tokenizer.chat_template"


def directory_template(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return (the template, notes), with the precedence of transformers.

    `chat_template.jinja` and `additional_chat_templates/`, then tokenizer_config.json (`config`), then
    `chat_template.json`, which processors of images have.
    """
    path = checkpoint.path
    files = {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja"))}
    if (default := path / "chat_template.jinja").is_file():
        files["default"] = default
    processor = checkpoint.json("chat_template.json")
    for found in (
        {name: read_text(file) for name, file in files.items()},
        named_templates(config.get("chat_template")),
        named_templates(processor.get("chat_template", processor) if isinstance(processor, dict) else processor),
    ):
        if found:
            return choose(found)
    return None, []


def gguf_template(metadata: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return (the template, notes) of a GGUF: `tokenizer.chat_template`, else one with a name after it."""
    named = {
        key.removeprefix(f"{GGUF_KEY}."): text
        for key, text in metadata.items()
        if key.startswith(f"{GGUF_KEY}.") and isinstance(text, str)
    }
    default = metadata.get(GGUF_KEY)
    return choose(named | ({"default": default} if isinstance(default, str) else {}))


def named_templates(value: Any) -> dict[str, str]:
    """Return the templates in a JSON value by name: a string, a table, or a list of objects with name and template."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if not isinstance(value, dict):
        return {}
    return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}


def choose(named: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Return the default template, or the first with a note that says so."""
    if "default" in named or not named:
        return named.get("default"), []
    first = next(iter(named))
    return named[first], [f"of the chat templates {', '.join(named)} none is called default: {first} is used"]
