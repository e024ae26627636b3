"""Opening a checkpoint: a GGUF file or a directory, by what lies at a path."""

from __future__ import annotations

from pathlib import Path

from offmoe.checkpoint.base import Checkpoint, some
from offmoe.checkpoint.gguf import SPLIT_NAME, open_gguf
from offmoe.checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from offmoe.errors import OffmoeError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf (any part of a split one) or a directory of safetensors or of one GGUF; headers only.

    Raises OffmoeError, in one line, on anything that is missing, damaged or not supported.
    """
    path = Path(path)
    try:
        return open_path(path)
    except OSError as error:  # a directory without permission, a name too long
        raise OffmoeError(f"cannot read {path}: {error.strerror}") from error


def open_path(path: Path) -> Checkpoint:
    if not path.exists():
        raise OffmoeError(f"{path} does not exist: give a .gguf file or a directory of safetensors")
    if path.is_dir():
        return open_directory(path)
    if path.suffix == ".safetensors":
        raise OffmoeError(f"{path} is one file of a model: give its directory, {path.parent}")
    return open_gguf(path)


def open_directory(path: Path) -> Checkpoint:
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return open_safetensors(path)
    models = sorted(file for file in path.glob("*.gguf") if first_part(file))
    if len(models) == 1:
        return open_gguf(models[0])
    if models:
        raise OffmoeError(f"{path} holds {len(models)} GGUF models: give one of {some(f.name for f in models)}")
    pickles = [file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}")]
    hint = f"; pickle files are never loaded ({some(pickles, 1)})" if pickles else ""
    raise OffmoeError(f"{path} holds no model: expected {SINGLE}, {INDEX} or a .gguf{hint}")


def first_part(file: Path) -> bool:
    match = SPLIT_NAME.fullmatch(file.name)
    return match is None or int(match[2]) == 1
