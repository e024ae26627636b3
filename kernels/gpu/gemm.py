"""Products of many tokens with routed experts: a grouped GEMM that dequantises weights from slots as it reads them.

(token, choice) pairs are sorted by expert and cut into tiles of one expert each. Which experts are in a set, and where
their records are, changes no tile: a pair's result is bit for bit the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.gpu.experts import glu
from offmoe.kernels.gpu.formats.grids import grids_for
from offmoe.kernels.gpu.formats.unpack import tile
from offmoe.kernels.gpu.gemv import planes
from offmoe.kernels.planes import Matrix, SlotLayout


@dataclass(frozen=True)
class Tiles:
    """Tiles of pairs. `order` int32 [T · k]: pairs sorted by expert.

    Tile i has the sorted pairs starts[i] … min(starts[i] + block, ends[i]) of experts[i], int32 [n]; the last tiles may
    be empty (expert -1).
    """

    order: Tensor
    experts: Tensor
    starts: Tensor
    ends: Tensor
    block: int


@dataclass(frozen=True)
class Tuning:
    """Tile sizes: rows of a weight tile (the same number of gate and of up), warps, stages, registers per thread at
    most.

    swap: weights are the left operand, so that few tokens fill an MMA.
    """

    rows: int
    warps: int
    stages: int
    swap: bool
    registers: int | None = None


def blocks(dtype: torch.dtype) -> tuple[int, ...]:
    """Return the possible numbers of pairs per tile."""
    return (16,) if dtype == torch.float32 else (16, 32, 64, 128)


def block_of(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """Return the pairs per tile: 1.5 times an expert's average, since a second tile unpacks the weights again."""
    return min(triton.next_power_of_2(max(16, 3 * pairs // (2 * experts))), blocks(dtype)[-1])


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _plan_tiles(
    ids, order, tile_experts, starts, ends, pairs, experts, tiles,
    M: tl.constexpr, EP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grid (experts + 1): a program lists the pairs of one expert; the last one marks the empty tiles."""
    e, index = tl.program_id(0), tl.arange(0, EP)
    counts = tl.zeros((EP,), tl.int32)
    for start in range(0, pairs, B):
        at = start + tl.arange(0, B)
        expert = tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int32)
        counts += tl.histogram(tl.maximum(expert, 0), EP, mask=expert >= 0)
    mine, first = tl.sum(tl.where(index == e, counts, 0), 0), tl.sum(tl.where(index < e, counts, 0), 0)
    blocks = (counts + M - 1) // M
    tile = tl.sum(tl.where(index < e, blocks, 0), 0)
    for n in range((mine + M - 1) // M):
        tl.store(tile_experts + tile + n, e)
        tl.store(starts + tile + n, first + n * M)
        tl.store(ends + tile + n, first + mine)
    if e == experts:
        for start in range(tile, tiles, B):
            at = start + tl.arange(0, B)
            tl.store(tile_experts + at, -1, mask=at < tiles)
    else:
        for start in range(0, pairs, B):
            at = start + tl.arange(0, B)
            found = (tl.load(ids + at, mask=at < pairs, other=-1) == e).to(tl.int32)
            tl.store(order + first + tl.cumsum(found, 0) - 1, at, mask=found != 0)
            first += tl.sum(found, 0)


def plan_tiles(ids: Tensor, experts: int, dtype: torch.dtype, block: int | None = None) -> Tiles:
    """Return the tiles of ids int64 [T, k] (-1: none), as many as there can be at most. Nothing is read on the host."""
    pairs = ids.numel()
    block = block or block_of(pairs, experts, dtype)
    tiles = min(-(-pairs // block) + experts, pairs)
    order, listed, starts, ends = (ids.new_empty(n, dtype=torch.int32) for n in (pairs, tiles, tiles, tiles))
    _plan_tiles[(experts + 1,)](
        ids, order, listed, starts, ends, pairs, experts, tiles, M=block, EP=triton.next_power_of_2(experts), B=1024
    )
    return Tiles(order, listed, starts, ends, block)


@cache
def wgmma(device: torch.device) -> bool:
    """Return whether only the sums of an MMA are held in registers (sm_90)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def tuning_of(block: int, dtype: torch.dtype, device: torch.device, fmt: str, pair: bool) -> Tuning:
    """Return the tuning; `pair`: for gate and up.

    Compiled for sm_80 and sm_90, none takes more than 98 KiB of shared memory, and only down in Q6_K spills, 24 bytes.
    """
    if dtype == torch.float32:  # plain FMA: more outputs a thread spill
        return Tuning(16, 8, 1, False)
    stages = 2 if fmt == "F32" else 3
    if block < 64:
        return Tuning(64, 4, stages, True)
    if block < 128:
        return Tuning(64 if pair else 128, 4, stages, False)
    # Two programs of 128 registers a multiprocessor, one of which multiplies while the other unpacks: 1.3 x.
    return Tuning(64 if pair else 128, 8, stages, False, 128 if wgmma(device) else None)


@triton.jit
def product(a, w, total, SWAP: tl.constexpr):
    """Add a [M, K] times the transpose of w [N, K], of one type, to total [M, N]; all transposed if SWAP."""
    if SWAP:
        total = tl.dot(w, tl.trans(a), total, input_precision="ieee")
    else:
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    return total  # once: Triton compiles what stands behind a constexpr return


@triton.jit
def one_behind_another(a, b):
    return tl.reshape(tl.permute(tl.join(a, b), 2, 0, 1), (2 * a.shape[0], a.shape[1]))


@triton.jit
def biased(total, bias, row, there, SWAP: tl.constexpr):
    """Add the bias of its rows [N] to total [M, N] (if SWAP [N, M])."""
    value = tl.load(bias + row, mask=there, other=0.0)
    return total + (value[:, None] if SWAP else value[None, :])


@triton.jit
def pairs_of(order, starts, ends, t, M: tl.constexpr):
    """Return the pairs [M] of tile t, int64, and the mask of those that exist."""
    at = tl.load(starts + t) + tl.arange(0, M)
    held = at < tl.load(ends + t)
    return tl.load(order + at, mask=held, other=0).to(tl.int64), held


@triton.jit
def record_at(address):
    return tl.multiple_of(tl.multiple_of(address, 16).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _gate_up(
    x, order, experts, starts, ends, addresses, bias, inner, k, grids,
    H: tl.constexpr, INNER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr,
    PITCH: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr, CUBIC: tl.constexpr,
    FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    FU: tl.constexpr, U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr,
):  # fmt: skip
    """Grid (INNER / N, tiles). Gate and up are one product: up is BYTES or ROWS after gate, or has a format FU."""
    t = tl.program_id(1)
    expert = tl.load(experts + t)
    address = tl.load(addresses + tl.maximum(expert, 0))
    if (expert < 0) | (address == 0):
        return
    record = record_at(address)
    pair, held = pairs_of(order, starts, ends, t, M)
    row = tl.program_id(0) * N + tl.arange(0, N)
    inside, long = row < INNER, row.to(tl.int64) * PITCH
    line = tl.arange(0, 2 * N)  # N of gate, N of up
    lines = tl.program_id(0) * N + line % N
    matrix, there = record + tl.where(line < N, 0, BYTES), lines < INNER
    lines = lines.to(tl.int64) * PITCH + tl.where(line < N, 0, ROWS)
    tokens = x + (pair // k) * H
    total = tl.zeros((2 * N, M) if SWAP else (M, 2 * N), tl.float32)
    for step in range((H + 63) // 64):
        column = step * 64 + tl.arange(0, 64)
        a = tl.load(tokens[:, None] + column[None], mask=held[:, None] & (column < H)[None], other=0.0)
        if FU is None:
            w = tile(matrix, lines, there, step, FORMAT, H, P0, P1, P2, P3, grids)
        else:
            w = one_behind_another(tile(record, long, inside, step, FORMAT, H, P0, P1, P2, P3, grids),
                                   tile(record, long, inside, step, FU, H, U0, U1, U2, U3, grids))  # fmt: skip
        total = product(a, w.to(a.dtype), total, SWAP)
    if SWAP:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, N, M)), 1, 2, 0))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(total, (M, 2, N)), 0, 2, 1))
    if bias is not None:
        gate = biased(gate, bias + expert * (2 * INNER), row, inside, SWAP)
        up = biased(up, bias + expert * (2 * INNER) + INNER, row, inside, SWAP)
    value = glu(gate, up, ALPHA, LIMIT, PLUS, CUBIC).to(inner.dtype.element_ty)
    if SWAP:
        value = tl.trans(value)
    tl.store(inner + pair[:, None] * INNER + row[None], value, mask=held[:, None] & inside[None])


@triton.jit
def _down(
    inner, order, experts, starts, ends, addresses, bias, out, grids,
    H: tl.constexpr, INNER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr,
    FORMAT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
):  # fmt: skip
    """Grid (H / N, tiles)."""
    t = tl.program_id(1)
    expert = tl.load(experts + t)
    address = tl.load(addresses + tl.maximum(expert, 0))
    if (expert < 0) | (address == 0):
        return
    record = record_at(address)
    pair, held = pairs_of(order, starts, ends, t, M)
    row = tl.program_id(0) * N + tl.arange(0, N)
    there, long = row < H, row.to(tl.int64)
    tokens = inner + pair * INNER
    total = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    for step in range((INNER + 63) // 64):
        column = step * 64 + tl.arange(0, 64)
        a = tl.load(tokens[:, None] + column[None], mask=held[:, None] & (column < INNER)[None], other=0.0)
        w = tile(record, long, there, step, FORMAT, INNER, P0, P1, P2, P3, grids).to(a.dtype)
        total = product(a, w, total, SWAP)
    if bias is not None:
        total = biased(total, bias + expert * H, row, there, SWAP)
    value = total.to(out.dtype.element_ty)
    if SWAP:
        value = tl.trans(value)
    tl.store(out + pair[:, None] * H + row[None], value, mask=held[:, None] & there[None])


def behind(gate: Matrix, up: Matrix) -> dict[str, int | str | None]:
    """Return the offset of up's planes after gate's; or its format, if that differs."""
    apart = {u - g for g, u in zip(gate.planes, up.planes, strict=False)}
    if gate.format != up.format:
        return {"BYTES": 0, "ROWS": 0, "FU": up.format}
    if len(apart) == 1:
        return {"BYTES": apart.pop(), "ROWS": 0, "FU": None}
    rows = 1 if gate.pitch == 2 else gate.rows
    assert gate.rows_from(rows, up.rows, gate.pitch).planes == up.planes, "gate and up are no two halves"
    return {"BYTES": 0, "ROWS": rows, "FU": None}


def expert_mlp(
    x: Tensor, ids: Tensor, tiles: Tiles, addresses: Tensor, layout: SlotLayout, out: Tensor, *,
    glu: Glu = SILU, biases: tuple[Tensor, Tensor] | None = None,
    first: Tuning | None = None, second: Tuning | None = None,
) -> None:  # fmt: skip
    """Compute down glu(gate x, up x) of every pair, unweighted: x [T, H], ids [T, k] → out [T · k, H] in x's type.

    addresses int64 [E], on the device: address of an expert's record in `layout`, a multiple of 16; 0: not in this set,
    and `out` keeps what it holds for the expert's pairs. biases float32: gate and up concatenated [E, 2F], down [E, H].
    """
    h, f, k = layout.hidden, layout.expert_hidden, ids.shape[1]
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert x.dtype == out.dtype
    assert addresses.dtype == torch.int64
    assert (x.shape, out.shape) == ((len(ids), h), (ids.numel(), h))
    assert h % 32 == f % 32 == 0
    inner = torch.empty((len(out), f), dtype=x.dtype, device=x.device)
    first = first or tuning_of(tiles.block, x.dtype, x.device, layout.gate.format, True)
    second = second or tuning_of(tiles.block, x.dtype, x.device, layout.down.format, False)
    listed = (tiles.order, tiles.experts, tiles.starts, tiles.ends, addresses)
    n, (wide, narrow) = len(tiles.experts), biases or (None, None)
    grids = grids_for(x.device, layout.gate.format, layout.up.format, layout.down.format)
    _gate_up[(triton.cdiv(f, first.rows), n)](
        x, *listed, wide, inner, k, grids, H=h, INNER=f, M=tiles.block, N=first.rows, SWAP=first.swap,
        PITCH=layout.gate.pitch, **behind(layout.gate, layout.up),
        ALPHA=glu.alpha, LIMIT=glu.limit, PLUS=glu.plus, CUBIC=glu.cubic,
        FORMAT=layout.gate.format, **planes("P", layout.gate), **planes("U", layout.up),
        num_warps=first.warps, num_stages=first.stages, maxnreg=first.registers,
    )  # fmt: skip
    _down[(triton.cdiv(h, second.rows), n)](
        inner, *listed, narrow, out, grids, H=h, INNER=f, M=tiles.block, N=second.rows, SWAP=second.swap,
        FORMAT=layout.down.format, **planes("P", layout.down),
        num_warps=second.warps, num_stages=second.stages, maxnreg=second.registers,
    )  # fmt: skip


@triton.jit
def _combine(out, weights, total, H: tl.constexpr, K: tl.constexpr, B: tl.constexpr):
    """Grid (H / B, tokens)."""
    t = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * B + tl.arange(0, B)
    mask = column < H
    value = tl.zeros((B,), tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(weights + t * K + j)
        row = tl.load(out + (t * K + j) * H + column, mask=mask, other=0.0)
        value += tl.where(weight != 0, weight * row.to(tl.float32), 0.0)  # NaN may stand where there is no pair
    tl.store(total + t * H + column, value, mask=mask)


def combine(out: Tensor, weights: Tensor) -> Tensor:
    """Sum Σ_j weights[t, j] · out[t · k + j] in float32, in the order of j: out [T · k, H], weights [T, k] → [T, H].

    Values with a weight of 0 may be anything.
    """
    tokens, k = weights.shape
    h = out.shape[1]
    assert out.is_contiguous()
    assert weights.is_contiguous()
    assert len(out) == tokens * k
    total = torch.empty((tokens, h), device=out.device)
    _combine[(triton.cdiv(h, 1024), tokens)](out, weights, total, H=h, K=k, B=1024)
    return total
