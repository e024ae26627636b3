"""GGUF: our reader agrees with the gguf package; every damaged file gives a one-line error."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import gguf_bytes, gguf_string, u32, write_gguf

from offmoe.checkpoint.base import ByteRange, Checkpoint
from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML


def error_line(path: Path) -> str:
    """Return the one-line error of opening `path`."""
    with pytest.raises(OffmoeError) as caught:
        open_checkpoint(path).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_demo_model_reads_as_gguf_reads_it() -> None:
    reader = gguf.GGUFReader(DEMO)
    with open_checkpoint(DEMO) as checkpoint:
        assert checkpoint.kind == "gguf"
        assert list(checkpoint.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            info = checkpoint.tensors[t.name]
            assert info.range == ByteRange(0, t.data_offset, t.n_bytes)
            assert (info.shape, info.format) == (tuple(reversed(t.shape.tolist())), t.tensor_type.name)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                assert checkpoint.metadata[key] == field.contents(), key
        t = reader.tensors[10]
        want = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type))
        assert torch.equal(checkpoint.tensor(t.name), want)
        assert checkpoint.json("config.json") is None


def test_every_number_type_and_arrays(tmp_path: Path) -> None:
    values = {
        0: 200,
        1: -5,
        2: 60000,
        3: -6000,
        4: 2**31,
        5: -7,
        6: 0.5,
        7: True,
        10: 2**63,
        11: -(2**40),
        12: 0.1,
    }
    codes = dict(zip(values, "BbHhIif?Qqd", strict=True))
    pairs = [(f"k{kind}", kind, struct.pack("<" + codes[kind], value)) for kind, value in values.items()]
    pairs.append(("words", 9, u32(8) + struct.pack("<Q", 2) + gguf_string("é") + gguf_string("")))
    pairs.append(("numbers", 9, u32(3) + struct.pack("<Q3h", 3, 1, -2, 3)))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs, version=2))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {f"k{kind}": value for kind, value in values.items()} | {
            "words": ["é", ""],
            "numbers": [1, -2, 3],
        }


def test_a_large_vocabulary_crosses_the_pieces_in_which_a_header_is_read(tmp_path: Path) -> None:
    words = [f"token number {i} é" for i in range(150_000)]
    path = write_gguf(tmp_path / "m.gguf", {"a": np.ones((2, 4), np.float32)}, tokens=words)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["tokens"] == words
        assert torch.equal(checkpoint.tensor("a"), torch.ones(2, 4))


A, B = ("a", [4, 2], 0, 0), ("b", [32], 2, 32)
BIG = 1 << 62
DAMAGED = {
    "empty": (b"", "is not a GGUF file: it is empty: download it again"),
    "text": (b"hello world, hello", "is not a GGUF file: it is a text of 18 bytes ('hello world, hello')"),
    "unknown": (b"\x01\x02\x03\x04", "is not a GGUF file: it starts with b'\\x01\\x02\\x03\\x04'"),
    "zip": (b"PK\x03\x04" + bytes(40), "it is a zip archive: unpack it first"),
    "torch's zip": (
        b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(40),
        "it is a pickle, which is never loaded",
    ),
    "pickle": (b"\x80\x02}q\x00." + bytes(40), "it is a pickle, which is never loaded"),
    "magic only": (b"GGUF", "its header runs to byte 8 and the file ends at 4"),
    "version 1": (gguf_bytes(version=1), "is a GGUF of version 1: expected 2 or 3"),
    "version 0": (gguf_bytes(version=0), "is a GGUF of version 0"),
    "version 9": (gguf_bytes(version=9), "is a GGUF of version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF"),
    "tensor count": (gguf_bytes(tensors=BIG), f"it claims {BIG} tensors"),
    "key count": (gguf_bytes(keys=BIG), f"it claims {BIG} metadata keys"),
    "one tensor too many": (gguf_bytes(tensors=3, data=0), "its header runs to byte 167 and the file ends at 160"),
    "string length": (gguf_bytes([("k", 8, struct.pack("<Q", BIG))]), "its header runs to byte 461168601842"),
    "array length": (
        gguf_bytes([("k", 9, u32(4) + struct.pack("<Q", BIG))]),
        "claims 4611686018427387904 array",
    ),
    "array within the limit": (
        gguf_bytes([("k", 9, u32(4) + struct.pack("<Q", 1 << 22))]),
        "runs to byte 16777",
    ),
    "arrays nested without end": (
        gguf_bytes([("k", 9, (u32(9) + struct.pack("<Q", 1)) * 20)]),
        "'k' nests more than 8 arrays",
    ),
    "value type": (gguf_bytes([("k", 13, b"")]), "a metadata value has the unknown type 13"),
    "key twice": (
        gguf_bytes([("general.alignment", 4, u32(32)), ("general.alignment", 4, u32(64))]),
        "the key 'general.alignment' appears twice with different values",
    ),
    "template that is no UTF-8": (
        gguf_bytes([("tokenizer.chat_template", 8, gguf_string(b"\xff\xfe"))]),
        "tokenizer.chat_template is not UTF-8",
    ),
    "token that is no UTF-8": (
        gguf_bytes(
            [("tokenizer.ggml.tokens", 9, u32(8) + struct.pack("<Q", 2) + gguf_string("a") + gguf_string(b"\xe9"))]
        ),
        r"tokenizer.ggml.tokens[1] is not UTF-8 (b'\xe9')",
    ),
    "alignment 0": (
        gguf_bytes([("general.alignment", 4, u32(0))]),
        "general.alignment is 0, not a power of two",
    ),
    "alignment 48": (
        gguf_bytes([("general.alignment", 4, u32(48))]),
        "general.alignment is 48, not a power of two",
    ),
    "alignment text": (gguf_bytes([("general.alignment", 8, gguf_string("x"))]), "general.alignment is 'x'"),
    "tensor twice": (gguf_bytes(entries=[A, A]), "the tensor 'a' appears twice"),
    "a name of two lines": (gguf_bytes(entries=[("x\ny", [4], 0, 1)]), r"tensor 'x\ny' starts at 1"),
    "nine dimensions": (gguf_bytes(entries=[("a", [1] * 9, 0, 0)]), "has 9 dimensions, expected at most 8"),
    "overflowing product": (
        gguf_bytes(entries=[("a", [BIG] * 4, 0, 0)]),
        "is truncated or damaged: tensor 'a' ends",
    ),
    "unknown type outside": (gguf_bytes(entries=[("a", [256], 999, 1 << 40)]), "tensor 'a' ends at byte 1099511627"),
    "unaligned offset": (gguf_bytes(entries=[("a", [4], 0, 8)]), "tensor 'a' starts at 8, not a multiple of 32"),
    "offset outside": (gguf_bytes(entries=[("a", [4], 0, 1 << 40)]), "tensor 'a' ends at byte 1099511627"),
    "last byte missing": (gguf_bytes()[:-15], "tensor 'b' ends at byte"),
    "overlap": (gguf_bytes(entries=[A, ("b", [32], 2, 0)]), "tensors 'b' and 'a' overlap"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    error = error_line(path)
    assert message in error
    assert str(path) in error


UNREAD = [kind for kind in gguf.GGMLQuantizationType if kind.name not in GGML]


@pytest.mark.parametrize("kind", UNREAD, ids=lambda kind: kind.name)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(entries=[("a", [256], int(kind), 0)]))
    message = f"'a' has the format {kind.name}: expected one of F32, F16"
    with open_checkpoint(path) as checkpoint, pytest.raises(OffmoeError, match=message):
        checkpoint.read("a")


def test_half_a_block_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(entries=[("a", [48], 2, 0)]))
    message = "'a' is Q4_0 and has rows of 48 weights: expected a multiple of 32"
    with open_checkpoint(path) as checkpoint, pytest.raises(OffmoeError, match=message):
        checkpoint.read("a")


def test_the_undamaged_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes()[:-14])  # b ends 14 bytes before the end of the data
    with open_checkpoint(path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (2, 4), "b": (32,)}
        assert checkpoint.read("b")[0] == 32


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert "does not exist" in error_line(tmp_path / "absent.gguf")
    assert "has no model: expected model.safetensors" in error_line(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "it holds pickle files, which are never loaded (pytorch_model.bin)" in error_line(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a regular file" in error_line(tmp_path / "pipe.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is not a safetensors file: it is empty" in error_line(tmp_path / "model.safetensors")


def test_a_directory_of_one_gguf_opens_and_of_two_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes())
    open_checkpoint(tmp_path).close()
    (tmp_path / "b.gguf").write_bytes(gguf_bytes())
    assert "has 2 GGUF models: give one of a.gguf, b.gguf" in error_line(tmp_path)


def test_a_file_that_shrinks_and_one_that_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 30)
    assert checkpoint.read("a").numel() == 32
    with pytest.raises(OffmoeError, match=r"m\.gguf shrank while in use"):
        checkpoint.read("b")
    with pytest.raises(OffmoeError, match="has no tensor 'c'"):
        checkpoint.read("c")
    checkpoint.close()
    with pytest.raises(OffmoeError, match="cannot read"):
        checkpoint.read("a")


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors=BIG))
    before = os.listdir("/proc/self/fd")
    error_line(path)
    assert os.listdir("/proc/self/fd") == before


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: whole(fd, [parts[0][:5]], at))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("a").tolist() == list(range(32))


class TestSplit:
    """A model in parts, as written by llama.cpp's gguf-split."""

    def write(self, folder: Path) -> list[Path]:
        paths = [folder / f"m-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
        for number, path in enumerate(paths):
            self.part(path, number, f"t{number}")
        return paths

    def part(self, path: Path, number: int, tensor: str, count: int = 3, total: int = 3) -> None:
        split = {"split.no": number, "split.count": count, "split.tensors.count": total}
        write_gguf(path, {tensor: np.full((1, 4), number, np.float32)}, **split)

    def check(self, checkpoint: Checkpoint, paths: list[Path]) -> None:
        with checkpoint:
            assert checkpoint.files == paths
            assert [checkpoint.tensor(f"t{number}")[0, 0].item() for number in range(3)] == [0, 1, 2]
            assert checkpoint.metadata["split.no"] == 0

    def test_any_part_opens_all(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path)
        for path in (*paths, tmp_path):
            self.check(open_checkpoint(path), paths)

    def test_missing_parts_are_listed(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path)
        paths[0].unlink()
        paths[2].unlink()
        assert "its directory lacks m-00001-of-00003.gguf, m-00003-of-00003.gguf" in error_line(paths[1])

    def test_names_and_parts_that_disagree(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path)
        renamed = tmp_path / "m.gguf"
        renamed.write_bytes(paths[0].read_bytes())
        assert "is one of 3 parts: expected a name such as" in error_line(renamed)
        self.part(paths[1], 2, "t1")
        assert "another part number in its header than in its name" in error_line(paths[0])
        self.part(paths[1], 1, "t0")
        assert "has the same tensors as another part: 't0'" in error_line(paths[0])
        self.part(paths[1], 1, "t1")
        self.part(paths[0], 0, "t0", total=4)
        assert "its parts have 3 tensors, not the number in its header" in error_line(paths[2])

    def test_an_absurd_count(self, tmp_path: Path) -> None:
        path = tmp_path / "m-00001-of-99999.gguf"
        self.part(path, 0, "t0", count=99999)
        assert "and 99994 more" in error_line(path)
