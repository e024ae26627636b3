"""Find a model by the name a user gives: a file, a directory, the demo, or a Hugging Face name, which is downloaded."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from offmoe.checkpoint.file_names import PART, TEMPLATES, join_names
from offmoe.checkpoint.hub_cache import Snapshot, find_snapshot, remember_absent
from offmoe.errors import OffmoeError

DEMO = Path(__file__).parents[1] / "demo" / "smolmoe-demo-Q4_0.gguf"
log = logging.getLogger(__name__)
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
# Never *.bin, *.pt or *.py, which are pickles and code. Top level only: subfolders hold copies of the weights.
SAFETENSORS_FILES = (".safetensors", ".json", ".jinja", "merges.txt", ".tiktoken", "tiktoken.model")


def find_model(name: str) -> Path:
    """Return the path of the model that `name` refers to, downloading what the hub's cache lacks of it."""
    if name == "demo":
        return DEMO
    path = Path(os.path.expanduser(name))  # Path.expanduser raises if there is no such user
    if name and path.exists():
        return path
    if name and path.is_symlink():
        raise OffmoeError(f"{path} is a link to {os.readlink(path)}, which is not there: download the model again")
    match = HUB_NAME.fullmatch(name)
    if match is None or (name.endswith(".gguf") and not match[2]):
        raise OffmoeError(
            f"no model at {name!r}: give a .gguf file, a directory of safetensors, "
            "a Hugging Face name (org/name or org/name:Q4_K_M), or demo"
        )
    return from_cache_or_hub(match[1], match[2] or "")


def from_cache_or_hub(repo: str, selector: str) -> Path:
    """Return the model in the hub's cache, completed from the hub. Raises OffmoeError if that cannot be."""
    cached = find_snapshot(repo, lambda names: select_files(names, selector, repo))
    if cached and not cached.lacks and not cached.unsure:
        return model_path(cached.folder, cached.files)
    try:
        return from_hub(repo, selector, cached)
    except UnreachableError as error:
        if cached is None:
            raise
        if cached.problem:
            raise OffmoeError(f"{cached.problem} (in the cache; the hub cannot be asked: {error.reason})") from error
        if cached.lacks:
            broken = f" (of {cached.unfinished} files the download was broken off)" if cached.unfinished else ""
            raise OffmoeError(
                f"{repo}: the cached copy lacks {join_names(cached.lacks)}{broken}: fetch it with a network, "
                f"as by: hf download {repo} ({error.reason})"
            ) from error
        log.warning("%s: the cached copy may lack %s, and the hub cannot be asked", repo, join_names(cached.unsure))
        return model_path(cached.folder, cached.files)


def from_hub(repo: str, selector: str, cached: Snapshot | None = None) -> Path:
    """Download the model into the hub's cache, of a cached copy what it lacks, with progress bars on stderr."""
    from huggingface_hub import HfApi, snapshot_download

    revision = cached.commit if cached else None  # a newer one would be downloaded whole
    patience = 5 if cached and not cached.lacks else 20
    try:
        # Without a network model_info fails at once; other calls retry for half a minute.
        siblings = HfApi().model_info(repo, revision=revision, timeout=patience).siblings or []
        names = [file.rfilename for file in siblings]
        files = select_files(names, selector, repo)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except OffmoeError:
        raise
    except Exception as error:  # not all of the HTTP client's errors are OSErrors
        raise UnreachableError(repo, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
    remember_absent(folder, names)
    return model_path(folder, files)


class UnreachableError(OffmoeError):
    """A repository that the hub does not give, for want of a network, a name or a permission."""

    def __init__(self, repo: str, reason: str) -> None:
        super().__init__(
            f"{repo} is not a local path and cannot be downloaded from the hub ({reason}): check name and network"
        )
        self.reason = reason


def select_files(names: list[str], selector: str, repo: str) -> list[str]:
    """Select a repository's files to load: the parts of one GGUF, or the safetensors with their JSON files."""
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    if not selector and any(name.endswith(".safetensors") for name in top):
        templates = [name for name in names if name.startswith(TEMPLATES) and name.endswith(".jinja")]
        return [*(name for name in top if name.endswith(SAFETENSORS_FILES)), *templates]
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


def model_path(folder: Path, files: list[str]) -> Path:
    """Return the path that the loader opens: the first part of a GGUF, or the directory."""
    return folder / files[0] if files[0].endswith(".gguf") else folder
