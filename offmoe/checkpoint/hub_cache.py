"""Snapshots in the local cache of the Hugging Face hub, and what they lack: a download may have been broken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offmoe.checkpoint.file_names import INDEX, PART, SHARD_NAME, SINGLE, TEMPLATES
from offmoe.errors import OffmoeError

TOKENIZERS = ("tokenizer.json", "tiktoken.model", ".tiktoken")
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")  # a repository may have none
KNOWN_ABSENT = ".no_exist"  # the hub's own folder of files that a repository does not have


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository in the cache."""

    folder: Path
    files: list[str]  # of the model, as they are there
    lacks: tuple[str, ...]  # files without which it does not run, or answers wrongly
    unsure: tuple[str, ...]  # files that it may lack, if the repository has them
    unfinished: int = 0  # files whose download was broken off
    problem: str = ""  # why none of the models there is the one asked for

    @property
    def commit(self) -> str:
        return self.folder.name


def find_snapshot(repo: str, select: Callable[[list[str]], list[str]]) -> Snapshot | None:
    """Return the cached copy of a repository; `select` selects the files of the model among all."""
    from huggingface_hub import snapshot_download

    try:  # without patterns no file is requested: this returns the folder even if it is incomplete
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        found = sorted(path for path in folder.rglob("*") if path.is_file())  # links to nothing are none
        unfinished = len(list((folder.parents[1] / "blobs").glob("*.incomplete")))
    except OSError:
        return None
    names = [str(path.relative_to(folder)) for path in found]
    try:
        files = select(names)
    except OffmoeError as error:
        problem = str(error) if any(name.endswith((".gguf", ".safetensors")) for name in names) else ""
        return Snapshot(folder, [], ("its weights",), (), unfinished, problem)
    if files[0].endswith(".gguf"):
        return Snapshot(folder, files, missing_parts(files), (), unfinished)
    absent = absent_files(folder)
    lacks = [name for name in needed_files(folder, files) if name not in absent]
    unsure = [name for name in optional_files(folder, files) if name not in absent]
    return Snapshot(folder, files, tuple(lacks), tuple(unsure), unfinished)


def missing_parts(files: list[str]) -> tuple[str, ...]:
    """Return the parts that a split GGUF lacks."""
    match = PART.search(files[0])
    if match is None:
        return ()
    names = [PART.sub(f"-{part:05}-of-{match[2]}", files[0]) for part in range(1, int(match[2]) + 1)]
    return tuple(name for name in names if name not in files)


def needed_files(folder: Path, files: list[str]) -> list[str]:
    """Return the files that a copy of safetensors lacks: config, shards, tokenizer."""
    lacks = [] if "config.json" in files else ["config.json"]
    lacks += sorted(name for name in shard_names(folder, files) if name not in files)
    return lacks if any(name.endswith(TOKENIZERS) for name in files) else [*lacks, "tokenizer.json"]


def shard_names(folder: Path, files: list[str]) -> set[str]:
    """Return the names of all shards, by the index or by their numbers; none if the weights are one file."""
    if SINGLE in files:
        return set()
    if INDEX in files:
        try:
            weights = json.loads((folder / INDEX).read_bytes())["weight_map"]
            return {str(name) for name in weights.values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return {INDEX + " (as it is damaged)"}
    numbered = [match for match in map(SHARD_NAME.fullmatch, files) if match]
    return {
        f"{match[1]}-{number:0{len(match[2])}}-of-{match[3]}.safetensors"
        for match in numbered[:1]
        for number in range(1, int(match[3]) + 1)
    }


def optional_files(folder: Path, files: list[str]) -> list[str]:
    """Return the files that a copy of safetensors may lack."""
    optional = [name for name in OPTIONAL if name not in files]
    has_template = "chat_template.json" in files or any(name.startswith(TEMPLATES) for name in files)
    if has_template and "chat_template.jinja" in optional:
        optional.remove("chat_template.jinja")
    if "tokenizer_config.json" in files and "chat_template.jinja" in optional:
        with suppress(OSError):
            if b'"chat_template"' in (folder / "tokenizer_config.json").read_bytes():
                optional.remove("chat_template.jinja")
    sharded = any(SHARD_NAME.fullmatch(name) for name in files)
    return [*optional, INDEX] if sharded and INDEX not in files and SINGLE not in files else optional


def absent_files(folder: Path) -> set[str]:
    """Return the files that the repository is known not to have at the snapshot's commit."""
    known = folder.parents[1] / KNOWN_ABSENT / folder.name
    return {path.name for path in known.iterdir()} if known.is_dir() else set()


def remember_absent(folder: Path, names: list[str]) -> None:
    """Note which files a repository of files `names` does not have, as the hub's client does: it is not asked again."""
    known = folder.parents[1] / KNOWN_ABSENT / folder.name
    with suppress(OSError):  # a cache that cannot be written is asked for again
        for name in (*OPTIONAL, "tokenizer.json", "config.json"):
            if name not in names:
                known.mkdir(parents=True, exist_ok=True)
                (known / name).touch()
