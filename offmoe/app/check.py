"""Check of a model's files, each read whole: what is damaged, what nothing reads, and what was guessed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from offmoe.app.guesses import guesses
from offmoe.checkpoint.base import Checkpoint, DataFile, TensorInfo, join_names, quote, read_json
from offmoe.checkpoint.open import open_checkpoint
from offmoe.checkpoint.scan import SCALES, TensorScan, expected_digest, scan_file
from offmoe.errors import OffmoeError
from offmoe.models.model import Model, described
from offmoe.models.parameters import trunk_tensors
from offmoe.models.rope import GGUF_FACTORS
from offmoe.settings import format_size
from offmoe.text.tokenizer import load_tokenizer

DAMAGED, REFUSED, UNREAD, GUESSED = "damaged", "cannot run", "unread", "guessed"
SPARSE = re.compile(r"embed|wte|lm_head|(^|\.)output\.weight|bias|zero|mask|rotary|cache")  # may hold many zeros
BIASES = ("gate_bias", "up_bias", "gate_up_bias", "down_bias")  # of experts
STRUCTURE = 4  # runs of zeros of the same place and length are padding, not holes
NO_TEMPLATE = "the files have no chat template: a chat is not possible, only run --raw"
Progress = Callable[[str, int, int], None]  # (file, bytes done, bytes in all)


@dataclass(frozen=True)
class Finding:
    """One line: what was found, and of which kind."""

    kind: str
    text: str


@dataclass(frozen=True)
class Report:
    """Contents of `offmoe info --check`."""

    path: str
    files: int
    bytes: int  # that were read
    findings: tuple[Finding, ...]

    @property
    def is_damaged(self) -> bool:
        return any(finding.kind == DAMAGED for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield a line of each finding, and a summary."""
        yield from (f"{finding.kind}: {finding.text}" for finding in self.findings)
        verdict = "damaged" if self.is_damaged else "nothing damaged"
        files = "1 file" if self.files == 1 else f"{self.files} files"
        yield f"{self.path}: {verdict}, {files} read, {format_size(self.bytes)}"


def check(path: Path, progress: Progress) -> Report:
    """Read a model's files whole. Raises OffmoeError only if there is nothing to read."""
    try:
        checkpoint = open_checkpoint(path)
    except OffmoeError as error:
        if not path.exists():
            raise
        return Report(str(path), 0, 0, (Finding(DAMAGED, str(error)),))
    with checkpoint:
        raw = dict(checkpoint.tensors)  # as the files have them: quantised matrices are combined from parts below
        model, notes = model_of(checkpoint)
        used = used_ranges(model) if model else None
        scans, broken = read_files(checkpoint, raw.values(), progress)
        findings = [
            *(Finding(DAMAGED, text) for text in broken),
            *(Finding(DAMAGED, text) for text in side_files(checkpoint)),
            *(Finding(DAMAGED, text) for text in damages(checkpoint, scans, used)),
            *notes,
            *(Finding(UNREAD, text) for text in (unread(raw.values(), used) if used is not None else ())),
            *(Finding(GUESSED, text) for text in (guesses(model) if model else ())),
        ]
        sizes = [file.stat().st_size for file in checkpoint.files]
        return Report(str(path), len(sizes), sum(sizes), tuple(findings))


def model_of(checkpoint: Checkpoint) -> tuple[Model | None, list[Finding]]:
    """Return the model, None if offmoe cannot run it, and what speaks against it or its tokenizer."""
    try:
        model = described(checkpoint)
    except OffmoeError as error:
        return None, [Finding(REFUSED, str(error))]
    try:
        tokenizer = load_tokenizer(checkpoint)
    except OffmoeError as error:
        return model, [Finding(REFUSED, str(error))]
    try:
        notes = [*tokenizer.notes, *([] if tokenizer.chat_template else [NO_TEMPLATE])]
        return model, [Finding(GUESSED, note) for note in notes]
    finally:
        tokenizer.close()


def used_ranges(model: Model) -> set[tuple[int, int]]:
    """Return file and offset of every tensor that the model uses."""
    infos = list(trunk_tensors(model))
    for moe_layer, layer in enumerate(model.config.routed):
        for expert in range(model.config.experts):
            infos += model.parts(moe_layer, expert)
            infos += [info for role in BIASES if (info := model.find(role, layer, expert))]
    infos += [info for name in (GGUF_FACTORS,) if (info := model.checkpoint.tensors.get(name))]
    return {(r.file, r.offset) for info in infos for r in (*info.scales, info.range)}


def read_files(
    checkpoint: Checkpoint, tensors: Iterable[TensorInfo], progress: Progress
) -> tuple[list[TensorScan], list[str]]:
    """Read all files. Return what was found in the tensors, and a line for every file that is not what it should be."""
    total, done, scans, broken = (
        sum(file.stat().st_size for file in checkpoint.files),
        0,
        list[TensorScan](),
        list[str](),
    )
    for number, path in enumerate(checkpoint.files):

        def advance(nbytes: int, name: str = path.name) -> None:
            nonlocal done
            done += nbytes
            progress(name, done, total)

        digest = expected_digest(path)
        try:
            with DataFile(path) as file:
                found, same = scan_file(file, [info for info in tensors if info.range.file == number], digest, advance)
        except OffmoeError as error:
            broken.append(str(error))
            continue
        scans += found
        if not same:
            broken.append(f"{path} has not the SHA-256 {digest} that it should have: download it again")
    return scans, broken


def side_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line for every JSON file of a directory that cannot be read, or is not what the hub has."""
    folder = checkpoint.path if checkpoint.kind == "safetensors" else None
    for path in sorted(folder.glob("*.json")) if folder else ():
        try:
            if path.stat().st_size < 64 << 20:
                read_json(path)
                sha = path.resolve().name
                data = path.read_bytes()
                found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
                if re.fullmatch(r"[0-9a-f]{40}", sha) and sha != found:
                    yield f"{path} is not the file of the hub's cache that its link says: download it again"
        except OSError as error:
            yield f"cannot read {path}: {error.strerror}"
        except OffmoeError as error:
            yield str(error)


def damages(checkpoint: Checkpoint, scans: list[TensorScan], used: set[tuple[int, int]] | None) -> Iterator[str]:
    """Yield a line for every tensor with values that are no numbers, or with a hole of zeros."""
    alike = Counter((scan.info.shape, scan.info.format, run) for scan in scans for run in scan.holes())
    for scan in scans:
        info, extent = scan.info, scan.info.range
        name = f"{checkpoint.files[extent.file]}: tensor {quote(info.name)}"
        if scan.not_numbers and (used is None or (extent.file, extent.offset) in used):
            what = "scales" if info.format in SCALES else "values"
            yield f"{name} has {scan.not_numbers} {what} that are NaN or infinite: download it again"
        for first, end in holes(scan):
            if alike[info.shape, info.format, (first, end)] < STRUCTURE:
                yield (
                    f"{name} is zeros from byte {extent.offset + first} to {extent.offset + end} of the file "
                    f"({format_size(end - first)}), as a broken off download leaves it: download it again"
                )


def holes(scan: TensorScan) -> list[tuple[int, int]]:
    """Return the runs of zeros that no weights explain: not of vectors, embeddings or padding."""
    info, runs = scan.info, scan.holes()
    if len([size for size in info.shape if size > 1]) < 2 or info.format in ("BOOL", "I64"):
        return []
    row = max(1, info.range.nbytes // max(1, prod(info.shape[:-1])))
    places = Counter((end - first, first % row) for first, end in runs)
    runs = [run for run in runs if places[run[1] - run[0], run[0] % row] < STRUCTURE]
    if SPARSE.search(info.name):
        return [(first, end) for first, end in runs if not is_rows(first, end, row) or (first, end) == (0, info.nbytes)]
    return runs


def is_rows(first: int, end: int, row: int) -> bool:
    """Return whether a run of zeros is whole rows, but for zeros that happen to stand next to them."""
    return min(first % row, -first % row) <= 16 and min(end % row, -end % row) <= 16


def unread(tensors: Iterable[TensorInfo], used: set[tuple[int, int]]) -> Iterator[str]:
    """Yield a line for every group of tensors that nothing reads, with their number and bytes."""
    tensors = list(tensors)
    read = [info.name for info in tensors if (info.range.file, info.range.offset) in used]
    roots = {name[:at] for name in read for at in range(len(name)) if name[at] == "."}
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        if (info.range.file, info.range.offset) not in used:
            groups.setdefault(group_of(info.name, roots), []).append(info)
    for name, infos in sorted(groups.items(), key=lambda item: -sum(info.nbytes for info in item[1])):
        formats = join_names(sorted({info.format for info in infos}))
        count = "1 tensor" if len(infos) == 1 else f"{len(infos)} tensors"
        yield f"{name}: {count} ({formats}), {format_size(sum(info.nbytes for info in infos))}"


def group_of(name: str, roots: set[str]) -> str:
    """Return the shortest beginning of `name` that no tensor in use has, with * for numbers."""
    ends = [at for at in range(len(name)) if name[at] == "."]
    prefix = next((f"{name[:at]}.*" for at in ends if name[:at] not in roots), name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", prefix)
