"""Small checkpoints, byte by byte, so that a test can make each of them lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Pair = tuple[str, int, bytes]  # key, value type, encoded value
Entry = tuple[str, list[int], int, int]  # name, dims as in the file, ggml type, offset


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


PAIRS: tuple[Pair, ...] = (("general.architecture", 8, gguf_string("llama")),)
ENTRIES: tuple[Entry, ...] = (("a", [4, 2], 0, 0), ("b", [32], 2, 32))


def gguf_bytes(
    pairs: Sequence[Pair] = PAIRS,
    entries: Sequence[Entry] = ENTRIES,
    data: int = 64,
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF of these key/values and tensors, with `data` bytes of weights; counts may lie."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(entries) if tensors is None else tensors,
                                len(pairs) if keys is None else keys)  # fmt: skip
    for key, kind, value in pairs:
        out += gguf_string(key) + u32(kind) + value
    for name, dims, kind, offset in entries:
        out += gguf_string(name) + u32(len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % alignment) + bytes(i % 251 for i in range(data))


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "F32", **metadata: Any) -> Path:
    """A GGUF by gguf's own writer. Metadata: int, str or list."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    quant = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(value, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def safetensors_bytes(header: Any, data: int = 64, length: int | None = None) -> bytes:
    """A safetensors file of this header (an object, or its text) and `data` bytes of weights."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
