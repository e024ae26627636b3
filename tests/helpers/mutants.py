"""Damaged copies of files, from a seed: bytes overwritten, moved or cut, values of JSON and GGUF of other types."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

from checkpoint_files import gguf_string, u32

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    1 << 63,
)
PIECES = [
    b"\0" * 8,
    b"\xff" * 8,
    b"[" * 3000,
    b"{" * 3000,
    b'{"a":',
    b"-1",
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"\n",
    b",",
    b"}",
]
PIECES += [b"9" * 5000, b"\xe9", b"\xf0\x9f", b"GGUF", b"null", b"true", b'""', b"[]", b"<html>", b"\xef\xbb\xbf"]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 1 << 24, 1 << 31, 1 << 63, -(1 << 63), 0.5, 1e308, -1e-308]
VALUES += [float("nan"), float("inf"), "", "x", "32", "\ud800", "é" * 500, [], {}, [[]], [None], [1, "a", {}], {"a": 1}]
VALUES += [{"type": "BPE"}, {"type": "Sequence", "pretokenizers": []}, {"rope_type": "yarn", "factor": "x"}, [0] * 1000]


def mutated_bytes(random: random.Random, data: bytes, header: int) -> bytes:
    """Return `data` after one to three changes, most of them within the first `header` bytes."""
    found = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(max(1, min(header, len(found)) if random.random() < 0.8 else len(found)))
        nbytes = random.choice((1, 2, 4, 8, 64, 1000))
        match random.randrange(8):
            case 0:
                found[at : at + 1] = bytes((random.randrange(256),))
            case 1:
                size = random.choice((4, 8))
                found[at : at + size] = (random.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            case 2:
                piece = random.choice(PIECES)
                found[at : at + random.choice((0, len(piece)))] = piece
            case 3:
                del found[at : at + nbytes]
            case 4:
                found[at:at] = found[at : at + nbytes]
            case 5:
                found[at : at + nbytes] = bytes(nbytes)
            case 6:
                del found[at:]
            case 7:
                other = random.randrange(max(1, len(found)))
                found[at : at + nbytes], found[other : other + nbytes] = (
                    found[other : other + nbytes],
                    found[at : at + nbytes],
                )
    return bytes(found)


def mutated_json(random: random.Random, data: bytes) -> bytes:
    """Return a JSON text after one to three changes of its values; one in five is changed as bytes instead."""
    if random.random() < 0.2:
        return mutated_bytes(random, data, len(data))
    value = json.loads(data)
    for _ in range(random.randint(1, 3)):
        if places := list(containers(value)):
            change(random, random.choice(places))
    return json.dumps(value).encode()


def containers(value: Any) -> list[Any]:
    """Return all lists and objects in a value that have members."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value] if isinstance(value, list | dict) and value else []
    return found + [place for member in inner for place in containers(member)]


def change(random: random.Random, place: Any) -> None:
    """Change a member of a list or an object."""
    key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
    match random.randrange(6):
        case 0 | 1 | 2:
            place[key] = copy.deepcopy(random.choice(VALUES))
        case 3:
            del place[key]
        case 4:
            other = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
            place[key], place[other] = place[other], place[key]
        case 5 if isinstance(place, dict):
            place[random.choice(("x", key.upper(), key + "_", ""))] = place.pop(key)
        case _:
            place[key] = [place[key]] * random.choice((0, 1, 2, 50))


def mutated_gguf(random: random.Random, data: bytes, header: int, keys: list[str]) -> bytes:
    """Return a GGUF with a key's value of another type, or changed as bytes."""
    if random.random() < 0.6:
        return mutated_bytes(random, data, header)
    key = gguf_string(random.choice(keys))
    at = data.index(key) + len(key)
    number = random.choice(NUMBERS)
    new = random.choice(
        (
            u32(8) + gguf_string(random.choice((b"", b"x", b"\xe9", b"default", b"9" * 4000))),
            u32(4) + u32(number % (1 << 32)),
            u32(10) + struct.pack("<Q", number),
            u32(5) + struct.pack("<i", -1),
            u32(6) + struct.pack("<f", random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))),
            u32(7) + b"\1",
            u32(9) + u32(random.choice((4, 8, 9, 6, 13))) + struct.pack("<Q", number),
            u32(9) + u32(8) + struct.pack("<Q", 2) + gguf_string("a") * 2,
            u32(9) + u32(4) + struct.pack("<Q", 2) + u32(1) * 2,
            u32(number % 300),
        )
    )
    (kind,) = struct.unpack_from("<I", data, at)
    old = 4 + {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 0)
    if kind == 8:
        old = 12 + struct.unpack_from("<Q", data, at + 4)[0]
    changed = bytearray(data)
    changed[at : at + old] = new  # an array's old elements stay behind, and are read as what they are not
    return bytes(changed)
