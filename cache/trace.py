"""A routing trace: which experts every layer chose for every token; one .npz file, never a pickle."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Ints
from offmoe.cache.files import whole_file

# What np.load meets in a broken file; MemoryError: a header that claims an absurd shape.
BROKEN = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of the decoded tokens of one or more sequences, and of their prompts. ValueError if inconsistent.

    Where a router chose fewer than top_k experts, an event's last ids are the type's highest value (`pad`).
    """

    experts: Ints  # [tokens, layers, k] uint8 or uint16, distinct, in the router's order
    offsets: Ints  # [sequences + 1] where each sequence starts, the last one: tokens
    meta: dict[str, Any]  # at least model, layers, experts, top_k
    probs: NDArray[np.float16] | None = None  # [tokens, layers, k] router weights
    prefill: Ints | None = None  # [prompt tokens, layers, k], as experts; unknown: all k padded
    prefill_offsets: Ints | None = None  # [sequences + 1]; None: one sequence, or no prefill
    prefill_probs: NDArray[np.float16] | None = None  # [prompt tokens, layers, k]
    tokens: Ints | None = None  # [tokens] the ids that were fed in
    prefill_tokens: Ints | None = None  # [prompt tokens]
    states: NDArray[np.float16] | None = None  # [tokens, layers, H] the residual stream before the router ÷ its RMS
    logits: NDArray[np.float16] | None = None  # [tokens, layers, experts] the router's
    gates: NDArray[np.float16] | None = None  # [layers, experts, H] router · norm's weight: logits = gates @ states

    def __post_init__(self) -> None:
        check_meta(self.meta)
        check_ids("experts", self.experts, self.meta)
        check_offsets("offsets", self.offsets, len(self.experts))
        if (np.diff(self.offsets) == 0).any():
            raise ValueError("a sequence is empty: offsets must rise")
        if self.prefill is not None:
            check_ids("prefill", self.prefill, self.meta)
            check_offsets("prefill_offsets", self.prompts, len(self.prefill))
            if len(self.prompts) != len(self.offsets):
                raise ValueError(f"{len(self.prompts) - 1} prompts of {len(self.offsets) - 1} sequences")
        classes = self.meta.get("classes")
        if classes is not None and not (
            isinstance(classes, list) and len(classes) == self.sequences and all(isinstance(c, str) for c in classes)
        ):
            raise ValueError(f"meta's classes must be a name a sequence, {self.sequences} in all")
        self._check_companions()

    def _check_companions(self) -> None:
        """Check that the arrays that accompany the ids have their shape."""
        tokens, layers, k = self.experts.shape
        prompt = 0 if self.prefill is None else len(self.prefill)
        experts = self.meta["experts"]
        hidden = self.states.shape[-1] if self.states is not None and self.states.ndim else 0
        check_floats("probs", self.probs, tokens, layers, k)
        check_floats("prefill_probs", self.prefill_probs, prompt, layers, k)
        check_floats("states", self.states, tokens, layers, hidden)
        check_floats("logits", self.logits, tokens, layers, experts)
        check_floats("gates", self.gates, layers, experts, hidden)
        check_tokens("tokens", self.tokens, tokens)
        check_tokens("prefill_tokens", self.prefill_tokens, prompt)

    def __eq__(self, other: object) -> bool:
        """The same arrays, types included, and the same meta."""
        if not isinstance(other, Trace):
            return NotImplemented
        return all(same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = None  # type: ignore[assignment]

    @property
    def pad(self) -> int:
        """The id in `experts` that stands for none."""
        return int(np.iinfo(self.experts.dtype).max)

    @property
    def padded(self) -> bool:
        """Whether some event has fewer than top_k experts."""
        return bool((self.experts[..., -1] == self.pad).any())

    @property
    def sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def prompts(self) -> Ints:
        """[sequences + 1] where each sequence's prompt starts in `prefill`."""
        if self.prefill_offsets is not None:
            return self.prefill_offsets
        return np.zeros_like(self.offsets) if self.prefill is None else np.array([0, len(self.prefill)])

    @property
    def records(self) -> int:
        """How many there are to choose from, over all layers."""
        return int(self.meta["layers"] * self.meta["experts"])

    def take(self, sequences: Iterable[int]) -> Trace:
        """These sequences alone, in this order; ValueError where there is none or one does not exist."""
        chosen = np.array(list(sequences), np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= self.sequences:
            raise ValueError(f"sequences {chosen.tolist()} are not all of 0 to {self.sequences - 1}")
        decoded, prompt = rows_of(self.offsets, chosen), rows_of(self.prompts, chosen)
        rows = dict.fromkeys(("experts", "probs", "tokens", "states", "logits"), decoded)
        rows |= dict.fromkeys(("prefill", "prefill_probs", "prefill_tokens"), prompt)
        changed = {name: getattr(self, name)[some] for name, some in rows.items() if getattr(self, name) is not None}
        if self.prefill is not None:
            changed["prefill_offsets"] = np.append(0, np.cumsum(np.diff(self.prompts)[chosen]))
        meta = dict(self.meta)
        if "classes" in meta:
            meta["classes"] = [meta["classes"][sequence] for sequence in chosen]
        return replace(self, offsets=np.append(0, np.cumsum(np.diff(self.offsets)[chosen])), meta=meta, **changed)

    def check_model(self, name: str, layers: int, experts: int, top_k: int) -> None:
        """ValueError where the trace cannot be of a model of this shape."""
        mine = shape_of(*(self.meta[key] for key in ("layers", "experts", "top_k")))
        if mine != (theirs := shape_of(layers, experts, top_k)):
            raise ValueError(f"the trace is of {self.meta['model']}, {mine}, and {name} has {theirs}")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace; ValueError, one line, for a file that is missing, broken or no trace."""
        try:
            arrays = read_arrays(path, check_names)
            return cls(**{**arrays, "meta": json.loads(str(arrays["meta"]))})
        except BROKEN as error:
            raise ValueError(f"{path} is no routing trace: {reason(error)}") from None

    def save(self, path: str | Path) -> None:
        """Write it whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        arrays["meta"] = np.array(json.dumps(self.meta))
        with whole_file(path) as file:
            np.savez_compressed(file, **arrays)


def check_ids(name: str, ids: Ints, meta: dict[str, Any]) -> None:
    layers, experts, k = (meta[key] for key in ("layers", "experts", "top_k"))
    if ids.dtype not in (np.uint8, np.uint16) or ids.shape[1:] != (layers, k) or not len(ids):
        raise ValueError(f"{name} must be uint8 or uint16 [tokens, {layers}, {k}], found {describe(ids)}")
    none = np.iinfo(ids.dtype).max
    if experts > none:
        raise ValueError(f"{name} is {ids.dtype}, whose {none} means no expert: {experts} experts need uint16")
    known = ids != none
    ordered = np.sort(ids, axis=-1)
    for what, wrong in (
        # A prompt's event may be unknown: runtimes skip the last layer for all but the last prompt token.
        ("no expert", ~known.any(axis=-1) & (name == "experts")),
        (f"an id above {experts - 1}", (known & (ids >= experts)).any(axis=-1)),
        ("one expert twice", ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != none)).any(axis=-1)),
        ("an id behind padding", (known[..., 1:] & ~known[..., :-1]).any(axis=-1)),
    ):
        for token, layer in np.argwhere(wrong)[:1]:
            raise ValueError(f"{name} holds {what} at token {token}, layer {layer}")


def check_floats(name: str, values: NDArray[Any] | None, *shape: int) -> None:
    if values is not None and (values.dtype != np.float16 or values.shape != shape or not np.isfinite(values).all()):
        raise ValueError(f"{name} must be finite float16 {list(shape)}, found {describe(values)}")


def check_tokens(name: str, values: NDArray[Any] | None, count: int) -> None:
    if values is not None and (not np.issubdtype(values.dtype, np.integer) or values.shape != (count,)):
        raise ValueError(f"{name} must be whole numbers [{count}], found {describe(values)}")


def read_arrays(path: str | Path, check: Callable[[list[str]], None] = lambda _: None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; raises one of BROKEN. Their names, which `check` is told, and the sizes that their
    headers claim are looked at before memory is taken for them."""
    with zipfile.ZipFile(path) as archive:  # np.load takes other files for pickles and says so
        check([info.filename.removesuffix(".npy") for info in archive.infolist()])
        for info in archive.infolist():
            with archive.open(info) as member:
                read = HEADERS[np.lib.format.read_magic(member)]
                shape, _, dtype = read(member)
                claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
            if claimed != held and not dtype.hasobject:
                raise ValueError(f"{info.filename} claims {dtype} {list(shape)} and holds {held} bytes")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def reason(error: BaseException) -> str:
    """Its first line; zipfile puts whole files into some."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def check_names(names: list[str]) -> None:
    known = [field.name for field in fields(Trace)]
    for name in known[:3]:
        if name not in names:
            raise ValueError(f"{name} is missing: expected {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"{name[:40]!r} is unknown: expected {', '.join(known)}")


def check_meta(meta: Any) -> None:
    if not isinstance(meta, dict) or not isinstance(meta.get("model"), str):
        raise ValueError("meta must be a JSON object that names its model")
    for name, high in (("layers", 2**16), ("experts", 2**16), ("top_k", meta.get("experts", 0))):
        value = meta.get(name)
        if type(value) is not int or not 0 < value <= high:
            raise ValueError(f"meta's {name} is {value!r}: expected a whole number from 1 to {high}")


def check_offsets(name: str, offsets: Ints, end: int) -> None:
    if not (
        np.issubdtype(offsets.dtype, np.integer)
        and offsets.ndim == 1
        and len(offsets) > 1
        and offsets[0] == 0
        and offsets[-1] == end
        and (offsets[1:] >= offsets[:-1]).all()
    ):
        raise ValueError(f"{name} must be whole numbers that rise from 0 to {end}, found {describe(offsets)}")


def same(mine: Any, other: Any) -> bool:
    if isinstance(mine, np.ndarray) and isinstance(other, np.ndarray):
        return mine.dtype == other.dtype and np.array_equal(mine, other)
    return type(mine) is type(other) and bool(mine == other)


def rows_of(offsets: Ints, sequences: Ints) -> Ints:
    """Indices of the rows of these sequences."""
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in sequences])


def shape_of(layers: int, experts: int, top_k: int) -> str:
    return f"{layers} layers of {experts} experts, top {top_k}"


def describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
