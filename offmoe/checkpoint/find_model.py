"""Find a model by the name a user gives: a file, a directory, the demo, or a Hugging Face name, which is downloaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from offmoe.errors import OffmoeError

DEMO = Path(__file__).parents[1] / "demo" / "smolmoe-demo-Q4_0.gguf"
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
# Never *.bin, *.pt or *.py, which are pickles and code. Top level only: subfolders hold copies of the weights.
SAFETENSORS_FILES = (".safetensors", ".json", ".jinja", "merges.txt", ".tiktoken", "tiktoken.model")
INDEX = "model.safetensors.index.json"


def find_model(name: str) -> Path:
    """Return the .gguf file or safetensors directory that `name` refers to, downloading it if needed."""
    if name == "demo":
        return DEMO
    path = Path(os.path.expanduser(name))  # Path.expanduser raises if there is no such user
    if name and path.exists():
        return path
    match = HUB_NAME.fullmatch(name)
    if match is None or (name.endswith(".gguf") and not match[2]):
        raise OffmoeError(
            f"no model at {name!r}: give a .gguf file, a directory of safetensors, "
            "a Hugging Face name (org/name or org/name:Q4_K_M), or demo"
        )
    return from_cache(match[1], match[2] or "") or from_hub(match[1], match[2] or "")


def from_cache(repo: str, selector: str) -> Path | None:
    """Return the model from the hub's local cache, or None if any of its files is missing."""
    from huggingface_hub import snapshot_download

    try:  # without patterns no file is requested: this returns the folder even if it is incomplete
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        files = select_files([str(path.relative_to(folder)) for path in folder.rglob("*")], selector, repo)
    except (OSError, OffmoeError):
        return None
    return model_path(folder, files) if is_complete(folder, files) else None


def from_hub(repo: str, selector: str) -> Path:
    """Download the model into the hub's cache, with progress bars on stderr."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Without a network model_info fails at once; other calls retry for half a minute.
        siblings = HfApi().model_info(repo, timeout=20).siblings or []
        files = select_files([file.rfilename for file in siblings], selector, repo)
        return model_path(Path(snapshot_download(repo, allow_patterns=files)), files)
    except OffmoeError:
        raise
    except Exception as error:  # not all of the HTTP client's errors are OSErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OffmoeError(
            f"{repo} is not a local path and cannot be downloaded from the hub ({reason}): check name and network"
        ) from error


def select_files(names: list[str], selector: str, repo: str) -> list[str]:
    """Select a repository's files to load: the parts of one GGUF, or the safetensors with their JSON files."""
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    if not selector and any(name.endswith(".safetensors") for name in top):
        return [name for name in top if name.endswith(SAFETENSORS_FILES)]
    ggufs = [name for name in names if name.endswith(".gguf") and "mmproj" not in name]  # vision projectors
    return choose_gguf(ggufs, selector, repo)


def choose_gguf(names: list[str], selector: str, repo: str) -> list[str]:
    """Return all parts of the one model whose file is named `selector` or has `selector` (Q4_K_M) in its name."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(PART.sub("", name), []).append(name)
    matches = [parts for model, parts in models.items() if not selector or matches_selector(selector, model, parts)]
    if len(matches) == 1:
        return matches[0]
    available = ", ".join(models) or "no .gguf and no .safetensors"
    if not matches:
        raise OffmoeError(f"{repo} has no GGUF named {selector or 'anything'!r}: it has {available}")
    raise OffmoeError(f"{repo} has several models: select one with {repo}:QUANT from {available}")


def matches_selector(selector: str, model: str, parts: list[str]) -> bool:
    """Return whether `selector` is the name of a part or a word in the model's name."""
    word = rf"(^|[-./]){re.escape(selector)}($|[-./])"
    return selector in parts or re.search(word, model, re.IGNORECASE) is not None


def is_complete(folder: Path, files: list[str]) -> bool:
    """Return whether an interrupted download left no file out: all parts, all shards of the index, the config."""
    if match := PART.search(files[0]):
        return len(files) == int(match[2])
    if files[0].endswith(".gguf"):
        return True
    try:
        index = json.loads((folder / INDEX).read_bytes()) if INDEX in files else {"weight_map": {}}
        shards = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return "config.json" in files and shards <= set(files)


def model_path(folder: Path, files: list[str]) -> Path:
    """Return the path that the loader opens: the first part of a GGUF, or the directory."""
    return folder / files[0] if files[0].endswith(".gguf") else folder
