"""Kind of a file that is not the one expected, by its first bytes: pointers, web pages, archives, other formats."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from offmoe.settings import format_size

PEEK = 4096  # bytes that tell what a file is
AGAIN = "download it again"
LFS_POINTER = re.compile(rb"version https?://(?:git-lfs|hawser)\.\S+\n(?:.*\n)*?size (\d+)")
WEB_PAGE = re.compile(rb"\s*(?:<!--.*?-->\s*)?<(?:!doctype html|html|head|body)", re.IGNORECASE | re.DOTALL)
UNFINISHED = re.compile(
    r".*\.(?:part|partial|crdownload|incomplete|download|opdownload|aria2|tmp|!ut|!qb)", re.IGNORECASE
)
PIECE_NAME = re.compile(
    r"(?P<whole>.+?)(?P<mark>\.part-?|-split-|\.split-|\.gguf\.|\.safetensors\.)(?P<number>\d{1,3}|[a-z]{1,2})"
    r"(?:[-_]?of[-_]?\d+)?",
    re.IGNORECASE,
)
MAGICS: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, what the file is and what to do
    (0, b"lmgg", "it is a GGML file of before GGUF: get the model as GGUF, or convert the original again"),
    (0, b"fmgg", "it is a GGMF file of before GGUF: get the model as GGUF, or convert the original again"),
    (0, b"tjgg", "it is a GGJT file of before GGUF: get the model as GGUF, or convert the original again"),
    (0, b"algg", "it is a LoRA adapter of before GGUF, not a model: give the base model as GGUF"),
    (0, b"\x1f\x8b", "it is compressed by gzip: unpack it first (gunzip)"),
    (0, b"BZh", "it is compressed by bzip2: unpack it first (bunzip2)"),
    (0, b"\xfd7zXZ\x00", "it is compressed by xz: unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "it is compressed by zstd: unpack it first (unzstd)"),
    (0, b"\x04\x22\x4d\x18", "it is compressed by lz4: unpack it first (unlz4)"),
    (0, b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it first"),
    (0, b"Rar!\x1a\x07", "it is a RAR archive: unpack it first"),
    (257, b"ustar", "it is a tar archive: unpack it first"),
    (0, b"\x89HDF\r\n\x1a\n", "it is an HDF5 file (Keras): get the model as safetensors or GGUF"),
    (0, b"\x93NUMPY", "it is a NumPy array: get the model as safetensors or GGUF"),
    (4, b"TFL3", "it is a TensorFlow Lite model: get the model as safetensors or GGUF"),
    (0, b"MZqFpD", "it is a llamafile: take the .gguf out of it (unzip)"),
    (0, b"\x7fELF", "it is a program: give a model"),
    (0, b"%PDF", "it is a PDF document: give a model"),
    (0, b"\x89PNG", "it is an image: give a model"),
    (0, b"\xff\xd8\xff", "it is an image: give a model"),
    (8, b"blk.", "it is an importance matrix (imatrix), which helps to quantise a model: give the model itself"),
)


def starts_gguf(start: bytes) -> bool:
    return start[:4] == b"GGUF"


def starts_safetensors(start: bytes, size: int) -> bool:
    """Return whether the file begins as safetensors do: the length of a JSON object, then the object."""
    return size > 8 and start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8


def found_instead(start: bytes, size: int) -> str:
    """Return what a file of `size` bytes is that begins with `start` and what to do, "it is …: …", or "" if unknown."""
    if size == 0:
        return f"it is empty: {AGAIN}"
    if starts_gguf(start):
        return "it is a GGUF file: give it by itself"
    for told in (lfs_pointer, web_page, pickle, json_text, short_text):
        if found := told(start, size):
            return found
    if not any(start):
        return f"it begins with zeros, like a download under way or broken off: finish it, or {AGAIN}"
    if starts_safetensors(start, size):
        return "it is a safetensors file: name it model.safetensors, next to its config.json, and give the directory"
    return next((what for offset, magic, what in MAGICS if start[offset : offset + len(magic)] == magic), "")


def lfs_pointer(start: bytes, size: int) -> str:
    match = LFS_POINTER.match(start)
    whole = f" (of {format_size(int(match[1][:18]))})" if match else ""
    pointer = f"it is a pointer of Git LFS, not the file itself{whole}: run git lfs pull, or {AGAIN}"
    return pointer if start.startswith((b"version https://git-lfs", b"version https://hawser")) else ""


def web_page(start: bytes, size: int) -> str:
    if WEB_PAGE.match(start):
        return f"it is a web page (HTML) in place of the file: {AGAIN}, logged in if the model asks for it"
    return f"it is XML, such as a server's error: {AGAIN}" if start.lstrip().startswith(b"<?xml") else ""


def pickle(start: bytes, size: int) -> str:
    """Recognise pickles, among them torch's zip files, which hold a data.pkl."""
    is_pickle = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[1:2] != b""
    if is_pickle or (start[:2] == b"PK" and (b"data.pkl" in start or b"/version" in start)):
        return "it is a pickle, which is never loaded: get the model as safetensors or GGUF"
    if start[:2] == b"PK":
        return f"it is a zip archive{' of NumPy arrays' if b'.npy' in start else ''}: unpack it first"
    return ""


def json_text(start: bytes, size: int) -> str:
    """Recognise JSON: a server's error, an index of shards, a manifest of ollama, another file of the model."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] not in (b"{", b"["):
        return ""
    value = json_object(text) if size <= PEEK else {}
    if error := [value[key] for key in ("error", "detail", "message") if value.get(key)]:
        return f"it is an error of the server in place of the file ({quoted(error[0])}): {AGAIN}"
    if b'"weight_map"' in start:
        return "it is the index of a model's shards: give the directory"
    if b"vnd.ollama.image.model" in start:
        listed = value.get("layers")
        layers = [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []
        digests = [str(layer.get("digest")) for layer in layers if "image.model" in str(layer.get("mediaType"))]
        blob = digests[0].replace(":", "-")[:80] if digests else "the largest of its blobs"
        return f"it is a manifest of ollama: give the model's blob, {blob}"
    return "it is JSON, not weights: give the model's directory, or its .gguf file"


def json_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object that `text` is, or an empty one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def short_text(start: bytes, size: int) -> str:
    """Recognise text: short, it is what a server sends in place of a file."""
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # else a character that PEEK cut
            return ""
        text = start[: error.start].decode()
    if not text.strip() or any(ord(letter) < 32 and letter not in "\t\r\n\f" for letter in text):
        return ""
    if size <= 1024:
        return (
            f"it is a text of {size} bytes ({quoted(text.strip())}), such as a server sends in place of a file: {AGAIN}"
        )
    return f"it is a text that begins with {quoted(text.lstrip()[:40])}: give a model"


def quoted(text: object) -> str:
    line = " ".join(str(text).split())
    return repr(line if len(line) <= 60 else f"{line[:59]}…")


def unfinished(name: str, neighbours: Collection[str]) -> str:
    """Return why the file `name` may be incomplete, by its name and the names of its `neighbours`, or ""."""
    if match := PIECE_NAME.fullmatch(name):
        pieces = [other for other in map(PIECE_NAME.fullmatch, neighbours) if other and same_file(other, match)]
        names = " ".join(piece.string for piece in sorted(pieces, key=piece_number))
        return f"it is one piece of a file that was cut: join all pieces in order (cat {names} > {joined(match)})"
    if UNFINISHED.fullmatch(name):
        return "its name says that the download is under way or was broken off: finish it"
    marks = [
        name + ending for ending in (".aria2", ".part", ".crdownload", ".incomplete") if name + ending in neighbours
    ]
    return f"{marks[0]} lies next to it, so its download is under way or was broken off: finish it" if marks else ""


def same_file(one: re.Match[str], other: re.Match[str]) -> bool:
    return (one["whole"], one["mark"]) == (other["whole"], other["mark"])


def piece_number(piece: re.Match[str]) -> tuple[int, str]:
    """Return the piece's number as a key to sort by: 2 is before 10, a before aa."""
    number = piece["number"]
    return (int(number) if number.isdigit() else len(number)), number


def joined(match: re.Match[str]) -> str:
    """Return the name of the file that the pieces make."""
    mark = match["mark"].strip(".-")
    return f"{match['whole']}.{mark}" if mark.lower() in ("gguf", "safetensors") else match["whole"]
