"""Records into slots, by the GPU itself: pinned host memory (or VRAM) is read through raw addresses.

A few programs saturate the link: what counts is bytes under way, not threads. Formats whose blocks are aligned are
copied in 16-byte words; of the others a program stages its chunk in VRAM, then gathers the planes from there (L1 and
L2), so that the link sees whole lines only.

Triton reads 16 bytes at once where it can prove two things: that the pointer is a multiple of 16, which a cast forgets
and has to be said of what comes out of it, and that a mask holds for four words at once, so that masks compare words
with a multiple of 4.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.formats import FORMATS
from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.planes import PLANES, Run, SlotLayout

CHUNK = 16384  # bytes that a program has under way
PROGRAMS = 16
RUNS = 3


@triton.jit
def words_at(address):
    """An address that is a multiple of 16, as a pointer to words."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)


@triton.jit
def whole(nbytes):
    """Words of so many bytes, up to the next 16: rows and planes have room for them."""
    return tl.cdiv(nbytes, 16) * 4


@triton.jit
def copy_words(source, target, chunk, nbytes, CHUNK: tl.constexpr):
    """One chunk of an aligned run; addresses are those of the run."""
    word = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    inside = word < whole(nbytes)
    tl.store(words_at(target) + word, tl.load(words_at(source) + word, mask=inside, other=0), mask=inside)


@triton.jit
def gather_plane(stage, skip, target, count, BYTES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
                 BLOCKS: tl.constexpr):  # fmt: skip
    """Bytes FIRST … FIRST + SIZE of `count` staged blocks, one block's after another's, at `target`."""
    WORDS: tl.constexpr = BLOCKS * SIZE // 4
    STEP: tl.constexpr = 1024
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
        tl.store(words_at(target) + word, value.to(tl.uint32), mask=inside)


@triton.jit
def copy_blocks(source, target, stage, chunk, blocks, BYTES: tl.constexpr, BLOCKS: tl.constexpr,
                S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
                P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """One chunk of BLOCKS blocks of a run that is taken apart; `target` is the slot's address."""
    first = chunk * BLOCKS
    count = tl.minimum(BLOCKS, blocks - first)
    address = source + first.to(tl.int64) * BYTES
    skip = (address % 16).to(tl.int32)
    word = tl.arange(0, CHUNK // 4)
    words = tl.load(words_at(address - skip) + word, mask=word < whole(skip + count * BYTES), other=0)
    tl.debug_barrier()  # the chunk before is gathered
    tl.store(words_at(stage) + word, words)
    tl.debug_barrier()
    place = target + first.to(tl.int64) * S0 + P0
    gather_plane(stage, skip, place, count, BYTES, 0, S0, BLOCKS)
    gather_plane(stage, skip, target + first.to(tl.int64) * S1 + P1, count, BYTES, S0, S1, BLOCKS)
    if S2 > 0:
        gather_plane(stage, skip, target + first.to(tl.int64) * S2 + P2, count, BYTES, S0 + S1, S2, BLOCKS)
    if S3 > 0:
        gather_plane(stage, skip, target + first.to(tl.int64) * S3 + P3, count, BYTES, S0 + S1 + S2, S3, BLOCKS)


@triton.jit
def copy_chunk(source, target, stage, chunk, nbytes, blocks, SOURCE: tl.constexpr, BYTES: tl.constexpr,
               BLOCKS: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
               P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    if S1 > 0:
        copy_blocks(source + SOURCE, target, stage, chunk, blocks, BYTES, BLOCKS, S0, S1, S2, S3, P0, P1, P2, P3, CHUNK)
    else:
        copy_words(source + SOURCE, target + P0, chunk, nbytes, CHUNK)


@triton.jit
def _page_in(
    sources, records, base, stride, count, slots, target, target_stride, scratch, landed, progress,
    N0, B0, C0, N1, B1, C1, N2, B2, C2,
    X0: tl.constexpr, Y0: tl.constexpr, K0: tl.constexpr, S00: tl.constexpr, S01: tl.constexpr, S02: tl.constexpr,
    S03: tl.constexpr, P00: tl.constexpr, P01: tl.constexpr, P02: tl.constexpr, P03: tl.constexpr,
    X1: tl.constexpr, Y1: tl.constexpr, K1: tl.constexpr, S10: tl.constexpr, S11: tl.constexpr, S12: tl.constexpr,
    S13: tl.constexpr, P10: tl.constexpr, P11: tl.constexpr, P12: tl.constexpr, P13: tl.constexpr,
    X2: tl.constexpr, Y2: tl.constexpr, K2: tl.constexpr, S20: tl.constexpr, S21: tl.constexpr, S22: tl.constexpr,
    S23: tl.constexpr, P20: tl.constexpr, P21: tl.constexpr, P22: tl.constexpr, P23: tl.constexpr,
    CHUNK: tl.constexpr, LANDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs take chunks in turn, record by record. N: bytes, B: blocks, C: chunks, X: source byte, Y: block bytes,
    K: blocks a chunk, S: sizes and P: places of the planes, each of a run."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunks = C0 + C1 + C2
    stage = scratch + tl.program_id(0) * CHUNK
    for work in range(tl.program_id(0), tl.load(count).to(tl.int32) * chunks, tl.num_programs(0)):
        i, chunk = work // chunks, work % chunks
        slot = tl.load(slots + i).to(tl.int64)
        source = base + tl.load(records + i).to(tl.int64) * stride if sources is None else tl.load(sources + i)
        source = tl.multiple_of(source, 16)
        to = target + slot * target_stride
        if chunk < C0:
            copy_chunk(source.to(tl.pointer_type(tl.uint8)) if S01 == 0 else source, to, stage, chunk, N0, B0,
                       X0, Y0, K0, S00, S01, S02, S03, P00, P01, P02, P03, CHUNK)  # fmt: skip
        elif chunk < C0 + C1:
            copy_chunk(source.to(tl.pointer_type(tl.uint8)) if S11 == 0 else source, to, stage, chunk - C0, N1, B1,
                       X1, Y1, K1, S10, S11, S12, S13, P10, P11, P12, P13, CHUNK)  # fmt: skip
        else:
            copy_chunk(source.to(tl.pointer_type(tl.uint8)) if S21 == 0 else source, to, stage, chunk - C0 - C1,
                       N2, B2, X2, Y2, K2, S20, S21, S22, S23, P20, P21, P22, P23, CHUNK)  # fmt: skip
        if LANDED:
            tl.debug_barrier()  # all threads' stores come before the count
            if tl.atomic_add(progress + slot, 1, sem="acq_rel") == chunks - 1:
                tl.store(progress + slot, 0)
                tl.atomic_xchg(landed + slot, 1, sem="release")


def page_in(
    sources: Tensor | None, count: Tensor, slots: Tensor, target: Tensor, layout: SlotLayout, scratch: Tensor, *,
    records: Tensor | None = None, base: int = 0, stride: int = 0,
    landed: Tensor | None = None, progress: Tensor | None = None, programs: int = PROGRAMS, pdl: bool = False,
) -> None:  # fmt: skip
    """Copy the first `count` [1] of the records at addresses `sources` [n] int64 into slots [n] of target [S, stride].

    Without `sources` record i lies at base + records[i] · stride. Each lies as in the file and is rearranged on its
    way. scratch [programs · CHUNK] uint8 belongs to this launch alone. `landed` [S] int32: set to 1 once a slot is
    whole; `progress` [S] int32 is 0 before and after.
    """
    assert scratch.numel() >= programs * CHUNK, f"{programs} programs stage {programs * CHUNK} bytes"
    assert target.stride(1) == 1
    assert target.stride(0) % 16 == 0, f"slots of {target.stride(0)} bytes are no whole number of 16"
    settings: dict[str, int] = {}
    numbers: list[int] = []
    for i, run in enumerate(merged(layout.runs)):
        constants, n = described(run)
        settings |= {name[0] + str(i) + name[1:]: value for name, value in constants.items()}
        numbers += n
    _page_in[(programs,)](
        sources, records, base, stride, count, slots, target, target.stride(0), scratch, landed, progress, *numbers,
        **settings, CHUNK=CHUNK, LANDED=landed is not None, num_warps=8, **dependent(pdl),
    )  # fmt: skip


@cache
def merged(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Aligned neighbours as one run; padded with empty ones to three."""
    kept: list[Run] = []
    for run in runs:
        last = kept[-1] if kept else None
        whole = last is not None and len(PLANES[run.format]) == len(PLANES[last.format]) == 1
        if last is not None and whole and run.format == last.format and run.planes[0] == last.planes[0] + last.nbytes:
            kept[-1] = Run(last.format, last.source, last.blocks + run.blocks, last.planes)
        else:
            kept.append(run)
    return (*kept, *[Run("F32", 0, 0, (0,))] * (RUNS - len(kept)))


@cache
def described(run: Run) -> tuple[dict[str, int], list[int]]:
    """Constants of a run by their letter, and bytes, blocks and chunks."""
    size, parts = FORMATS[run.format].bytes, PLANES[run.format]
    if len(parts) == 1:
        assert run.source % 16 == 0, f"{run.format} at byte {run.source} of a record is not aligned"
        blocks, chunks, parts = 0, -(-run.nbytes // CHUNK), (*parts, 0)
    else:
        blocks = 1 << ((CHUNK - 16) // size).bit_length() - 1
        chunks = -(-run.blocks // blocks)
    constants = {"X": run.source, "Y": size, "K": blocks}
    constants |= {f"S{i}": value for i, value in enumerate((*parts, 0, 0, 0)[:4])}
    constants |= {f"P{i}": value for i, value in enumerate((*run.planes, 0, 0, 0)[:4])}
    return constants, [run.nbytes, run.blocks, chunks]


def scratch_for(device: torch.device, programs: int = PROGRAMS) -> Tensor:
    """Room in which a launch stages what it rearranges."""
    return torch.empty(programs * CHUNK, dtype=torch.uint8, device=device)
