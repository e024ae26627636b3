"""Contents of a directory that is no model, or holds one in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offmoe.checkpoint.base import join_names, listed, read_json
from offmoe.checkpoint.file_names import INDEX, SINGLE
from offmoe.checkpoint.first_bytes import UNFINISHED
from offmoe.checkpoint.kinds import adapter_kind
from offmoe.errors import OffmoeError

ADAPTER, PIPELINE = "adapter_config.json", "model_index.json"
MOST_FOLDERS = 1000
OTHER_FORMATS = {
    "pickle files, which are never loaded": ("bin", "pt", "pth", "ckpt", "pkl"),
    "Keras or TensorFlow files": ("h5", "keras", "pb", "tflite"),
    "Flax files": ("msgpack",),
    "ONNX files": ("onnx",),
    "NumPy files (old MLX)": ("npz",),
    "archives, which have to be unpacked": ("zip", "tar", "tgz", "gz", "7z", "zst"),
}


def check_no_adapter(path: Path) -> None:
    """Raise OffmoeError if a directory is an adapter."""
    if (path / ADAPTER).exists():
        raise OffmoeError(f"{path} is {adapter_kind(read_json(path / ADAPTER))}")


def check_no_pipeline(path: Path) -> None:
    """Raise OffmoeError if a directory is a diffusers pipeline."""
    if (path / PIPELINE).exists():
        kind = str(read_json(path / PIPELINE).get("_class_name"))[:60]
        raise OffmoeError(f"{path} is a diffusers pipeline ({kind}), which makes images: give a language model")


def folders_with_models(path: Path) -> list[Path]:
    """Return the folders within a directory that hold a model; of a repository in the hub's cache, the current one."""
    current = path / "refs" / "main"
    if (path / "snapshots").is_dir() and current.is_file():
        snapshot = path / "snapshots" / current.read_text(errors="replace").strip()[:80]
        if snapshot.is_dir():
            return [snapshot]
    folders = [path / name for name in listed(path)[:MOST_FOLDERS] if (path / name).is_dir()]
    return [folder for folder in folders if holds_model(folder)]


def holds_model(folder: Path) -> bool:
    names = listed(folder)
    sharded = "config.json" in names and any(name.lower().endswith(".safetensors") for name in names)
    return sharded or any(name in (SINGLE, INDEX) or name.lower().endswith(".gguf") for name in names)


def no_model(path: Path) -> OffmoeError:
    """Return the error for a directory without a model, which says what it holds."""
    names = [name for name in listed(path) if not name.startswith(".")]
    found = next((text for look in LOOKS if (text := look(path, names))), "")
    return OffmoeError(f"{path} has no model: expected {SINGLE}, {INDEX} or a .gguf{found}")


def dangling(path: Path, names: list[str]) -> str:
    links = [name for name in names if (path / name).is_symlink() and not (path / name).exists()]
    return f"; {join_names(links)} is a link to a file that is not there: download it again" if links else ""


def under_way(path: Path, names: list[str]) -> str:
    parts = [name for name in names if UNFINISHED.fullmatch(name)]
    return f"; the download of {join_names(parts)} is under way or was broken off: finish it" if parts else ""


def mistral(path: Path, names: list[str]) -> str:
    own = [name for name in names if name.startswith("consolidated") and name.endswith(".safetensors")]
    return f"; {join_names(own, 1)} is in Mistral's own format: get the model in Hugging Face's" if own else ""


def another_format(path: Path, names: list[str]) -> str:
    for what, endings in OTHER_FORMATS.items():
        if files := [name for name in names if name.lower().rpartition(".")[2] in endings]:
            return f"; it holds {what} ({join_names(files, 1)}): get the model as safetensors or GGUF"
    return ""


def only_config(path: Path, names: list[str]) -> str:
    return "; it holds config.json without weights: download them" if "config.json" in names else ""


def rest(path: Path, names: list[str]) -> str:
    return f"; it holds {join_names(names)}" if names else "; it is empty"


LOOKS: tuple[Callable[[Path, list[str]], str], ...] = (
    dangling,
    under_way,
    mistral,
    another_format,
    only_config,
    rest,
)
