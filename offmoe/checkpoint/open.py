"""Open a checkpoint, either a GGUF file or a directory."""

from __future__ import annotations

from pathlib import Path

from offmoe.checkpoint.base import Checkpoint, join_names
from offmoe.checkpoint.gguf import SPLIT_NAME, open_gguf
from offmoe.checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from offmoe.errors import OffmoeError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file (any part of a split one), or a directory of safetensors or of one GGUF; only headers are
    read.

    Raises OffmoeError, in one line, if anything is missing, damaged or not supported.
    """
    path = Path(path)
    try:
        return open_path(path)
    except OSError as error:  # for example no permission, or a name that is too long
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from error


def open_path(path: Path) -> Checkpoint:
    if not path.exists():
        raise OffmoeError(f"{path} does not exist: give a .gguf file or a directory of safetensors")
    if path.is_dir():
        return open_directory(path)
    if path.suffix == ".safetensors":
        raise OffmoeError(f"{path} is only one file of a model: give its directory, {path.parent}")
    return open_gguf(path)


def open_directory(path: Path) -> Checkpoint:
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return open_safetensors(path)
    models = sorted(file for file in path.glob("*.gguf") if is_first_part(file))
    if len(models) == 1:
        return open_gguf(models[0])
    if models:
        raise OffmoeError(f"{path} has {len(models)} GGUF models: give one of {join_names(f.name for f in models)}")
    pickles = [file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}")]
    hint = f"; pickle files are never loaded ({join_names(pickles, 1)})" if pickles else ""
    raise OffmoeError(f"{path} has no model: expected {SINGLE}, {INDEX} or a .gguf{hint}")


def is_first_part(file: Path) -> bool:
    """Return whether the file is a whole model or the first part of one."""
    match = SPLIT_NAME.fullmatch(file.name)
    return match is None or int(match[2]) == 1
