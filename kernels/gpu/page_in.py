"""Copies of records into slots by the GPU itself, which reads pinned host memory (or VRAM) through raw addresses.

A few programs saturate the link: bytes in flight count, not threads. Formats whose blocks are aligned are copied in
16-byte words. For other formats a program stages its chunk in VRAM and gathers the planes from there (L1 and L2), so
that the link sees whole lines only. In the decode graph the first programs of `expert_gate_up` are the movers, which
multiply what they copy, a few rows at a time; `page_in` is a launch of its own.

Triton reads 16 bytes at once only where it can prove two things: the pointer is a multiple of 16 (a cast loses this, so
it is stated after the cast), and the mask is constant over four words (so masks compare words with a multiple of 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.planes import PLANES, Run, SlotLayout

CHUNK, WARPS = 1024, 8  # bytes that a warp has under way, 32 a lane; warps of a program
# Of a launch of its own. A PCIe 5 link needs 256 KiB under way while others read VRAM. Half as many programs with twice
# the bytes share a record of 2.65 MB less evenly, in 11 rounds, the last for two of them: 60 µs where these take 55.
PROGRAMS = 33
UNDER_WAY = PROGRAMS * WARPS * CHUNK
# Fields of a run in the flat tuple RUNS that kernels take (`described`): run r begins at AT = 1 + r · FIELDS. Flat,
# because Triton 3.6 takes an element out of a constexpr tuple, but not an element of an element.
FIRST_CHUNK, CHUNKS = tl.constexpr(0), tl.constexpr(1)  # the run's chunks, counted over all runs
SOURCE = tl.constexpr(2)  # byte of the record at which the run begins
BLOCKS, BLOCK_BYTES, CHUNK_BLOCKS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)  # CHUNK_BLOCKS: blocks per chunk
# Of each of up to four planes: its bytes in a block (0: no such plane), and the byte of the slot at which it begins.
PLANE_BYTES, PLANE_START, PLANE_FIELDS = tl.constexpr(6), tl.constexpr(7), tl.constexpr(2)
FIELDS = tl.constexpr(14)


@dataclass(frozen=True)
class Copies:
    """Copies of the first `count` [1] records, at addresses `sources` [n] int64, into `slots` [n]; others are int32.

    Without `sources`, record i is at base + records[i] · stride. Records are in the file's layout and are rearranged on
    the way. `scratch` must not be shared by concurrent launches.
    """

    count: Tensor
    slots: Tensor
    scratch: Tensor
    sources: Tensor | None = None
    records: Tensor | None = None
    base: int = 0
    stride: int = 0

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """Return the arguments of a kernel, in its order."""
        return self.sources, self.records, self.base, self.stride, self.count, self.slots, self.scratch


@triton.jit
def words_at(address):
    """Return an address that is a multiple of 16 as a pointer to 32-bit words."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)


@triton.jit
def whole(nbytes):
    """Return the words of `nbytes`, rounded up to 16 bytes: rows and planes are padded to them."""
    return tl.cdiv(nbytes, 16) * 4


@triton.jit
def copy_words(source, target, start, nbytes, CHUNK: tl.constexpr):
    """Copy bytes start … start + nbytes of an aligned run; `source` and `target` are the run's addresses."""
    word = tl.arange(0, CHUNK // 4)
    at, inside = start // 4 + word, word < whole(nbytes)
    tl.store(words_at(target) + at, tl.load(words_at(source) + at, mask=inside, other=0), mask=inside)


@triton.constexpr_function
def plane_offset(runs, at, plane):
    """Byte of a block at which `plane` begins: the planes before it, in the order of the file."""
    return sum(runs[at + PLANE_BYTES + before * PLANE_FIELDS] for before in range(plane))


@triton.jit
def gather_plane(stage, skip, target, first, count, RUNS: tl.constexpr, AT: tl.constexpr, PLANE: tl.constexpr,
                 STEP: tl.constexpr):  # fmt: skip
    """Gather one plane of `count` staged blocks into the slot at `target`; `first` is the first block's index in the
    run.
    """
    BYTES: tl.constexpr = RUNS[AT + BLOCK_BYTES]
    SIZE: tl.constexpr = RUNS[AT + PLANE_BYTES + PLANE * PLANE_FIELDS]
    FIRST: tl.constexpr = plane_offset(RUNS, AT, PLANE)
    WORDS: tl.constexpr = RUNS[AT + CHUNK_BLOCKS] * SIZE // 4
    to = target + first * SIZE + RUNS[AT + PLANE_START + PLANE * PLANE_FIELDS]
    for start in tl.static_range(0, WORDS, STEP):
        word = start + tl.arange(0, STEP)
        inside = word < tl.minimum(whole(count * SIZE), WORDS)
        if SIZE % 4 == 0:  # a word of one block, out of the two that it lies across
            at = skip + word // (SIZE // 4) * BYTES + FIRST + word % (SIZE // 4) * 4
            two = stage.to(tl.pointer_type(tl.uint32)) + at // 4
            low = tl.load(two, mask=inside, other=0).to(tl.uint64)
            high = tl.load(two + 1, mask=inside, other=0).to(tl.uint64)
            value = (high << 32 | low) >> (at % 4 * 8).to(tl.uint64)
        else:
            value = tl.zeros((STEP,), tl.uint32)
            for b in tl.static_range(4):
                at = word * 4 + b
                spot = stage + skip + at // SIZE * BYTES + FIRST + at % SIZE
                value |= tl.load(spot, mask=inside, other=0).to(tl.uint32) << (8 * b)
        tl.store(words_at(to) + word, value.to(tl.uint32), mask=inside)


@triton.jit
def copy_blocks(source, target, stage, first, count, RUNS: tl.constexpr, AT: tl.constexpr, CHUNK: tl.constexpr):
    """Copy `count` blocks from block `first` of a run that is split into planes; `target` is the slot's address."""
    BYTES: tl.constexpr = RUNS[AT + BLOCK_BYTES]
    address = source + first * BYTES
    skip = (address % 16).to(tl.int32)
    word = tl.arange(0, CHUNK // 4)
    words = tl.load(words_at(address - skip) + word, mask=word < whole(skip + count * BYTES), other=0)
    tl.debug_barrier()  # the chunk before is gathered
    tl.store(words_at(stage) + word, words)
    tl.debug_barrier()
    for plane in tl.static_range(4):
        if RUNS[AT + PLANE_BYTES + plane * PLANE_FIELDS] > 0:
            gather_plane(stage, skip, target, first, count, RUNS, AT, plane, CHUNK // 16)


@triton.jit
def copy_part(source, target, stage, first, count, RUNS: tl.constexpr, AT: tl.constexpr, CHUNK: tl.constexpr):
    """Copy `count` blocks, at most one chunk, from block `first` of the run at AT: record at `source`, slot at
    `target`.
    """
    if RUNS[AT + PLANE_BYTES + PLANE_FIELDS] > 0:  # a second plane: blocks are taken apart
        copy_blocks(source + RUNS[AT + SOURCE], target, stage, first, count, RUNS, AT, CHUNK)
    else:
        at = source.to(tl.pointer_type(tl.uint8)) + RUNS[AT + SOURCE]
        copy_words(
            at, target + RUNS[AT + PLANE_START], first * RUNS[AT + BLOCK_BYTES], count * RUNS[AT + BLOCK_BYTES], CHUNK
        )


@triton.jit
def copy_chunk(source, target, stage, chunk, RUNS: tl.constexpr, AT: tl.constexpr, CHUNK: tl.constexpr):
    """Copy one chunk if it belongs to the run at AT."""
    mine = chunk - RUNS[AT + FIRST_CHUNK]
    if (mine >= 0) & (mine < RUNS[AT + CHUNKS]):
        first = mine * RUNS[AT + CHUNK_BLOCKS]
        copy_part(
            source,
            target,
            stage,
            first,
            tl.minimum(RUNS[AT + CHUNK_BLOCKS], RUNS[AT + BLOCKS] - first),
            RUNS,
            AT,
            CHUNK,
        )


@triton.jit
def source_of(sources, records, base, stride, i):
    """Return the address of the i-th record of the list."""
    source = base + tl.load(records + i).to(tl.int64) * stride if sources is None else tl.load(sources + i)
    return tl.multiple_of(source, 16)


@triton.jit
def bring(
    mover, movers, sources, records, base, stride, count, slots, scratch, target, target_stride, landed, progress,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, LANDED: tl.constexpr,
):  # fmt: skip
    """Copy records, chunk by chunk, in turn with the other movers. RUNS: see `described`."""
    chunks = RUNS[0]
    stage = scratch + mover * CHUNK
    for work in range(mover, tl.load(count).to(tl.int32) * chunks, movers):
        i, chunk = work // chunks, work % chunks
        slot, source = tl.load(slots + i).to(tl.int64), source_of(sources, records, base, stride, i)
        to = target + slot * target_stride
        for run in tl.static_range(len(RUNS) // FIELDS):
            copy_chunk(source, to, stage, chunk, RUNS, 1 + run * FIELDS, CHUNK)
        if LANDED:
            tl.debug_barrier()  # all threads' stores come before the count
            if tl.atomic_add(progress + slot, 1, sem="acq_rel") == chunks - 1:
                tl.store(progress + slot, 0)
                tl.atomic_xchg(landed + slot, 1, sem="release")


@triton.jit(do_not_specialize_on_alignment=["sources", "count", "slots"])
def _page_in(
    sources, records, base, stride, count, slots, scratch, target, target_stride, landed, progress,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, LANDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    bring(tl.program_id(0), tl.num_programs(0), sources, records, base, stride, count, slots, scratch, target,
          target_stride, landed, progress, RUNS, CHUNK, LANDED)  # fmt: skip


def page_in(
    copies: Copies, target: Tensor, layout: SlotLayout | None = None, *, landed: Tensor | None = None,
    progress: Tensor | None = None, programs: int = PROGRAMS, pdl: bool = False,
) -> None:  # fmt: skip
    """Execute `copies` into slots of target [S, stride] uint8; without a layout, records are copied as they are.

    `landed` [S] int32 is set to 1 once a slot is complete; `progress` [S] int32 is 0 before and after.
    """
    chunk = CHUNK * WARPS
    check(copies, target, programs, chunk)
    runs = layout.runs if layout else (Run("F32", 0, target.stride(0) // 4, (0,)),)
    _page_in[(programs,)](
        *copies.arguments, target, target.stride(0), landed, progress, RUNS=described(merged(runs), chunk),
        CHUNK=chunk, LANDED=landed is not None, num_warps=WARPS, **dependent(pdl),
    )  # fmt: skip


def check(copies: Copies, target: Tensor, programs: int, chunk: int) -> None:
    """Assert that the scratch is large enough and slots are aligned."""
    assert copies.scratch.numel() >= programs * chunk, f"{programs} programs stage {programs * chunk} bytes"
    assert target.stride(1) == 1
    assert target.stride(0) % 16 == 0, f"slots of {target.stride(0)} bytes are no whole number of 16"


@cache
def merged(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Return the runs with adjacent aligned runs merged."""
    kept: list[Run] = []
    for run in runs:
        last = kept[-1] if kept else None
        whole = last is not None and len(PLANES[run.format]) == len(PLANES[last.format]) == 1
        if last is not None and whole and run.format == last.format and run.planes[0] == last.planes[0] + last.nbytes:
            kept[-1] = Run(last.format, last.source, last.blocks + run.blocks, last.planes)
        else:
            kept.append(run)
    return tuple(kept)


@cache
def described(runs: tuple[Run, ...], chunk: int) -> tuple[int, ...]:
    """Return the constexpr RUNS of a launch: the number of chunks in all, then the FIELDS numbers of every run."""
    numbers, first = [], 0
    for run in runs:
        size, sizes = FORMATS[run.format].bytes, PLANES[run.format]
        assert len(sizes) > 1 or run.source % 16 == 0, f"{run.format} at byte {run.source} of a record is not aligned"
        blocks = room_of(run, chunk) // size // step_of(run) * step_of(run)
        chunks = -(-run.blocks // blocks)
        planes = [n for i in range(4) for n in ((sizes[i], run.planes[i]) if i < len(sizes) else (0, 0))]
        numbers += [first, chunks, run.source, run.blocks, size, blocks, *planes]
        first += chunks
    return (first, *numbers)


def room_of(run: Run, chunk: int) -> int:
    """Return the usable bytes of a chunk: a run that is split into planes may begin anywhere within 16 bytes."""
    return chunk - (16 if len(PLANES[run.format]) > 1 else 0)


def step_of(run: Run) -> int:
    """Return the number of blocks whose part of every plane is a multiple of 16 bytes."""
    return 16 // math.gcd(16, *PLANES[run.format])


def scratch_for(device: torch.device, nbytes: int = UNDER_WAY) -> Tensor:
    """Return the scratch in which a launch stages what it rearranges."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
