"""Open a checkpoint: a GGUF file, or a directory, in which the model is found by what the files are."""

from __future__ import annotations

from pathlib import Path

from offmoe.checkpoint.base import Checkpoint, DataFile, join_names, listed
from offmoe.checkpoint.file_names import ADAPTER, SPLIT_NAME
from offmoe.checkpoint.first_bytes import PEEK, starts_gguf, starts_safetensors
from offmoe.checkpoint.folder import check_no_adapter, check_no_pipeline, folders_with_models, no_model
from offmoe.checkpoint.gguf import open_gguf
from offmoe.checkpoint.kinds import gguf_kind
from offmoe.checkpoint.safetensors import files_with, model_files, open_safetensors
from offmoe.errors import OffmoeError

MOST_PEEKED = 256  # files of a directory whose first bytes are read


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file (any part of a split one), a directory that holds one model, or any weights file of it; only
    headers are read.

    Raises OffmoeError, in one line, if anything is missing, damaged or not supported.
    """
    path = Path(path)
    try:
        return open_path(path)
    except OSError as error:  # for example no permission, or a name that is too long
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from error


def open_path(path: Path) -> Checkpoint:
    if path.is_dir():
        return open_directory(path)
    if not path.exists() and not path.is_symlink():
        raise OffmoeError(f"{path} does not exist: give a .gguf file or a directory of safetensors")
    kind = weights_kind(path)
    if kind == "safetensors" or (kind is None and path.suffix.lower() == ".safetensors"):
        if path.name.startswith(ADAPTER):
            check_no_adapter(path.parent)
        return open_safetensors(path.parent, files_with(path.parent, path.name))
    return open_gguf(path)  # where it is none, this says what it is


def weights_kind(path: Path) -> str | None:
    """Return gguf or safetensors by the first bytes of a file, or None."""
    with DataFile(path) as file:
        start = file.read(0, min(file.size, PEEK)).numpy().tobytes()
        if starts_gguf(start):
            return "gguf"
        return "safetensors" if starts_safetensors(start, file.size) else None


def open_directory(path: Path) -> Checkpoint:
    """Open the one model of a directory, or of the only folder in it that holds one."""
    check_no_pipeline(path)
    names = listed(path)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if (shards := model_files(path)) and ("config.json" in names or not ggufs):
        return open_safetensors(path, shards)
    if ggufs:
        return open_gguf(choose_gguf(path, ggufs))
    check_no_adapter(path)
    if disguised := {name: kind for name in names[:MOST_PEEKED] if (kind := kind_or_none(path / name))}:
        if len(disguised) == 1:
            return open_path(path / next(iter(disguised)))
        raise OffmoeError(f"{path} has several files of weights: give one of {join_names(disguised)}")
    within = folders_with_models(path)
    if len(within) == 1:
        return open_directory(within[0])
    if within:
        raise OffmoeError(f"{path} has models in several folders: give one of {join_names(within)}")
    raise no_model(path)


def kind_or_none(path: Path) -> str | None:
    """Return the kind of a file of weights; None for anything else, also where it cannot be read."""
    try:
        return weights_kind(path) if path.is_file() else None
    except OffmoeError:
        return None


def choose_gguf(directory: Path, names: list[str]) -> Path:
    """Return the GGUF that is a model, the first part there of a split one. Raises OffmoeError if there are several."""
    files: dict[str, Path] = {}
    for name in sorted(names):
        files.setdefault(SPLIT_NAME.sub(r"\1-of-\3", name), directory / name)
    if len(files) == 1:
        return next(iter(files.values()))
    models = [file for file in files.values() if is_model(file)]
    if len(models) > 1:
        raise OffmoeError(
            f"{directory} has {len(models)} GGUF models: give one of {join_names(f.name for f in models)}"
        )
    return models[0] if models else next(iter(files.values()))


def is_model(file: Path) -> bool:
    """Return whether a GGUF is a model, as far as its header says; a damaged one is taken for one."""
    try:
        with open_gguf(file) as checkpoint:
            return not gguf_kind(checkpoint.metadata, checkpoint.tensors)
    except OffmoeError:
        return True
