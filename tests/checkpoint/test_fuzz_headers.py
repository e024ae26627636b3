"""Mutated headers of both formats give an OffmoeError of one line, or a checkpoint that can be read."""

import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from checkpoint_files import entry, gguf_bytes, gguf_string, safetensors_bytes, u32
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError

MARGIN = 2 << 20  # memory beyond the file's size: the piece in which a header is read, and Python's objects
GGUF = gguf_bytes(
    [
        ("general.architecture", 8, gguf_string("llama")),
        ("general.alignment", 4, u32(32)),
        ("words", 9, u32(8) + (3).to_bytes(8, "little") + gguf_string("a") * 3),
        ("numbers", 9, u32(4) + (2).to_bytes(8, "little") + bytes(8)),
    ]
)
SAFETENSORS = safetensors_bytes({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", [2], [64, 68])}, 68)
INTERESTING = [bytes(n) for n in (1, 4, 8)] + [b"\xff" * n for n in (1, 4, 8)]
INTERESTING += [(1 << shift).to_bytes(8, "little") for shift in (1, 16, 22, 31, 32, 40, 62, 63)]
INTERESTING += [b"[" * 5000, b'{"a":', b"-1", b"1e999", b"NaN", b'"\\ud800"', b"\n", b",", b"}", b"0" * 30]


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw `good` with a few bytes overwritten or inserted, and perhaps truncated."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=8))
        data[at : at + draw(st.sampled_from([0, len(new)]))] = new
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)


def open_and_read(path: Path, size: int) -> None:
    """Open the file and read every tensor; anything but an OffmoeError, or too much memory, fails."""
    message = ""
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert checkpoint.tensor(name).shape == info.shape
                assert info.range.nbytes <= size  # torch's memory is not traced
    except OffmoeError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= size + MARGIN
    assert "\n" not in message
    assert len(message) < 600


@settings(max_examples=400, deadline=5000)
@given(mutated(GGUF))
def test_gguf(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        open_and_read(path, len(data))


@settings(max_examples=400, deadline=5000)
@given(mutated(SAFETENSORS))
def test_safetensors(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(data)
        open_and_read(Path(folder), len(data))


INDEX_TEXT = b'{"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}'


@settings(max_examples=200, deadline=5000)
@given(mutated(INDEX_TEXT))
def test_index(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "one.safetensors").write_bytes(SAFETENSORS)
        (Path(folder) / "model.safetensors.index.json").write_bytes(data)
        open_and_read(Path(folder), len(data) + len(SAFETENSORS))


HUGE = {
    "strings": ("m.gguf", gguf_bytes([("k", 9, u32(8) + (1 << 22).to_bytes(8, "little"))], data=0)),
    "bytes": ("m.gguf", gguf_bytes([("k", 9, u32(0) + (1 << 40).to_bytes(8, "little"))], data=0)),
    "tensors": ("m.gguf", gguf_bytes(tensors=1 << 16, data=0)),
    "header": ("model.safetensors", safetensors_bytes(b"{", length=1 << 39)),
}
LIMITED = """
import resource, sys
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (768 << 20), resource.RLIM_INFINITY))
try:
    open_checkpoint(sys.argv[1])
except OffmoeError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "data"), HUGE.values(), ids=HUGE)
def test_sparse_files_as_large_as_they_claim(tmp_path: Path, name: str, data: bytes) -> None:
    """A terabyte of zeros, so that no claimed range ends outside the file; 768 MiB of address space."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(data)
        file.truncate(1 << 40)
    target = path if name.endswith("gguf") else tmp_path
    command = [sys.executable, "-c", LIMITED, target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert done.stdout.count("\n") == 1
