"""From what a person calls a model to a path on this machine: file, directory, demo, or Hugging Face name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from offmoe.errors import OffmoeError

DEMO = Path(__file__).parents[1] / "demo" / "smolmoe-demo-Q4_0.gguf"
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
# Never *.bin, *.pt or *.py: pickles and code. Only the top level: folders hold second copies of the weights.
SAFETENSORS_FILES = (".safetensors", ".json", ".jinja", "merges.txt", ".tiktoken", "tiktoken.model")
INDEX = "model.safetensors.index.json"


def find_model(name: str) -> Path:
    """The .gguf file or safetensors directory that `name` means, downloaded if it has to be."""
    if name == "demo":
        return DEMO
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
    if name and path.exists():
        return path
    match = HUB_NAME.fullmatch(name)
    if match is None or (name.endswith(".gguf") and not match[2]):
        raise OffmoeError(
            f"no model at {name!r}: give a .gguf file, a directory of safetensors, "
            "a Hugging Face name (org/name or org/name:Q4_K_M), or demo"
        )
    return from_cache(match[1], match[2] or "") or from_hub(match[1], match[2] or "")


def from_cache(repo: str, pick: str) -> Path | None:
    """The model in the hub's local cache, if all of its files are there."""
    from huggingface_hub import snapshot_download

    try:  # no pattern, no file asked for: only the folder, complete or not
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        files = wanted([str(path.relative_to(folder)) for path in folder.rglob("*")], pick, repo)
    except (OSError, OffmoeError):
        return None
    return entry(folder, files) if complete(folder, files) else None


def from_hub(repo: str, pick: str) -> Path:
    """Download into the hub's cache, with its progress bars on stderr."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # model_info fails at once without a network; the other calls retry for half a minute.
        siblings = HfApi().model_info(repo, timeout=20).siblings or []
        files = wanted([file.rfilename for file in siblings], pick, repo)
        return entry(Path(snapshot_download(repo, allow_patterns=files)), files)
    except OffmoeError:
        raise
    except Exception as error:  # the HTTP client's errors share no base with OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OffmoeError(
            f"{repo} is no path here and cannot be had from the hub ({reason}): check name and network"
        ) from error


def wanted(names: list[str], pick: str, repo: str) -> list[str]:
    """Of a repository's files those to load: one GGUF's parts, or safetensors and what goes with them."""
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    if not pick and any(name.endswith(".safetensors") for name in top):
        return [name for name in top if name.endswith(SAFETENSORS_FILES)]
    ggufs = [name for name in names if name.endswith(".gguf") and "mmproj" not in name]  # vision projectors
    return choose_gguf(ggufs, pick, repo)


def choose_gguf(names: list[str], pick: str, repo: str) -> list[str]:
    """All parts of the one model whose file is called `pick` or has `pick` (Q4_K_M) as a part of its name."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(PART.sub("", name), []).append(name)
    found = [parts for model, parts in models.items() if not pick or named(pick, model, parts)]
    if len(found) == 1:
        return found[0]
    have = ", ".join(models) or "no .gguf and no .safetensors"
    if not found:
        raise OffmoeError(f"{repo} has no GGUF called {pick or 'anything'!r}: it holds {have}")
    raise OffmoeError(f"{repo} holds several models: choose one as {repo}:QUANT from {have}")


def named(pick: str, model: str, parts: list[str]) -> bool:
    word = rf"(^|[-./]){re.escape(pick)}($|[-./])"
    return pick in parts or re.search(word, model, re.IGNORECASE) is not None


def complete(folder: Path, files: list[str]) -> bool:
    """Whether an interrupted download left nothing out: all parts, all shards of the index, the config."""
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


def entry(folder: Path, files: list[str]) -> Path:
    """What the loader opens: the first part of a GGUF, or the directory."""
    return folder / files[0] if files[0].endswith(".gguf") else folder
