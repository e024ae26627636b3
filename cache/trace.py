"""A routing trace: which experts every layer chose for every token; one .npz file, never a pickle."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.policies.base import Ints

# What np.load meets in a broken file; MemoryError: a header that claims an absurd shape.
BROKEN = (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Trace:
    """Decoded tokens of one or more sequences, with their prompts beside them; ValueError unless sound."""

    experts: Ints  # [tokens, layers, k] uint8 or uint16, distinct, in the router's order
    offsets: Ints  # [sequences + 1] where each sequence starts, the last one: tokens
    meta: dict[str, Any]  # at least model, layers, experts, top_k
    probs: NDArray[np.float16] | None = None  # [tokens, layers, k] router weights
    prefill: Ints | None = None  # [prompt tokens, layers, k], as experts; unknown: all k the type's highest
    prefill_offsets: Ints | None = None  # [sequences + 1]; None: one sequence, or no prefill

    def __post_init__(self) -> None:
        check_meta(self.meta)
        self._check_ids("experts", self.experts)
        check_offsets("offsets", self.offsets, len(self.experts))
        if (np.diff(self.offsets) == 0).any():
            raise ValueError("a sequence is empty: offsets must rise")
        if self.probs is not None and (
            self.probs.dtype != np.float16
            or self.probs.shape != self.experts.shape
            or not np.isfinite(self.probs).all()
        ):
            raise ValueError(f"probs must be finite float16 {list(self.experts.shape)}, found {describe(self.probs)}")
        if self.prefill is not None:
            self._check_ids("prefill", self.prefill)
            check_offsets("prefill_offsets", self.prompts, len(self.prefill))
            if len(self.prompts) != len(self.offsets):
                raise ValueError(f"{len(self.prompts) - 1} prompts of {len(self.offsets) - 1} sequences")

    @property
    def prompts(self) -> Ints:
        """[sequences + 1] where each sequence's prompt starts in `prefill`."""
        if self.prefill_offsets is not None:
            return self.prefill_offsets
        return np.array([0, 0 if self.prefill is None else len(self.prefill)])

    @property
    def records(self) -> int:
        """How many there are to choose from, over all layers."""
        return int(self.meta["layers"] * self.meta["experts"])

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace; ValueError, one line, for a file that is missing, broken or no trace."""
        try:
            with zipfile.ZipFile(path):  # np.load takes other files for pickles and says so
                pass
            with np.load(path, allow_pickle=False) as file:
                check_names(file.files)
                arrays = {name: file[name] for name in file.files}
            return cls(**{**arrays, "meta": json.loads(str(arrays["meta"]))})
        except BROKEN as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is no routing trace: {reason}") from None

    def save(self, path: str | Path) -> None:
        """Write it whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        arrays["meta"] = np.array(json.dumps(self.meta))
        part = Path(f"{path}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _check_ids(self, name: str, ids: Ints) -> None:
        layers, experts, k = (self.meta[key] for key in ("layers", "experts", "top_k"))
        if ids.dtype not in (np.uint8, np.uint16) or ids.shape[1:] != (layers, k) or not len(ids):
            raise ValueError(f"{name} must be uint8 or uint16 [tokens, {layers}, {k}], found {describe(ids)}")
        # A prompt's event may be unknown: runtimes skip the last layer for all but the last prompt token.
        known = (ids < np.iinfo(ids.dtype).max).any(axis=-1) | (name == "experts")  # [tokens, layers]
        ordered = np.sort(ids, axis=-1)
        for what, wrong in (
            (f"an id above {experts - 1}", ordered[..., -1] >= experts),
            ("one expert twice", (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)),
        ):
            for token, layer in np.argwhere(wrong & known)[:1]:
                raise ValueError(f"{name} holds {what} at token {token}, layer {layer}")


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


def describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
