"""Products of many tokens with routed experts, straight from slots: a grouped GEMM that unpacks weights as it reads.

Pairs (token, choice) are sorted by expert and cut into tiles of one expert each. Which experts are in a set, and where
they lie, changes no tile: a pair's result is the same bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.gpu.experts import glu
from offmoe.kernels.gpu.gemv import planes
from offmoe.kernels.gpu.unpack import tile
from offmoe.kernels.planes import SlotLayout


@dataclass(frozen=True)
class Tiles:
    """`order` int32 [T · k]: pairs sorted by expert. Tile i takes the sorted pairs starts[i] … min(starts[i] + block,
    ends[i]) of experts[i], int32 [n]; the last tiles may hold none (expert -1)."""

    order: Tensor
    experts: Tensor
    starts: Tensor
    ends: Tensor
    block: int


@dataclass(frozen=True)
class Tuning:
    """Rows of a weight tile, warps, stages; swap: weights are the left operand, so that few tokens fill an MMA."""

    rows: int
    warps: int
    stages: int
    swap: bool


def block_of(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """Pairs a tile: half as many again as an expert has on average, for a second tile unpacks the weights again."""
    block = triton.next_power_of_2(max(16, 3 * pairs // (2 * experts)))
    return min(block, 16 if dtype == torch.float32 else 128)


@triton.jit
def _plan_tiles(
    ids, order, tile_experts, starts, ends, pairs, experts, tiles,
    M: tl.constexpr, EP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grid (experts + 1): a program lists the pairs of one expert; the last one marks the tiles that hold none."""
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
    """ids int64 [T, k], -1: none → tiles, as many as there can be at most. Nothing is read on the host."""
    pairs = ids.numel()
    block = block or block_of(pairs, experts, dtype)
    tiles = min(-(-pairs // block) + experts, pairs)
    order, listed, starts, ends = (ids.new_empty(n, dtype=torch.int32) for n in (pairs, tiles, tiles, tiles))
    _plan_tiles[(experts + 1,)](
        ids, order, listed, starts, ends, pairs, experts, tiles, M=block, EP=triton.next_power_of_2(experts), B=1024
    )
    return Tiles(order, listed, starts, ends, block)


def tuning_of(block: int, dtype: torch.dtype, *formats: str) -> Tuning:
    """For gate and up, with an accumulator each, or for down: as many formats. Compiled for sm_80 and sm_90, none
    spills or takes more than 96 KiB of shared memory."""
    if dtype == torch.float32:  # plain FMA: more outputs a thread spill
        return Tuning(16, 8, 1, False)
    stages = 2 if "F32" in formats else 3
    if block < 64:
        return Tuning(64, 4, stages, True)
    return Tuning(64 if len(formats) == 2 else 128, 8 if block == 128 else 4, stages, False)


@triton.jit
def product(a, w, total, SWAP: tl.constexpr):
    """total [M, N] += a [M, K] times the transpose of w [N, K]; all transposed if SWAP."""
    w = w.to(a.dtype)
    if SWAP:
        total = tl.dot(w, tl.trans(a), total, input_precision="ieee")
    else:
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    return total  # once: Triton compiles what stands behind a constexpr return


@triton.jit
def biased(total, bias, row, there, SWAP: tl.constexpr):
    """total [M, N] (if SWAP [N, M]) and the bias of its rows [N]."""
    value = tl.load(bias + row, mask=there, other=0.0)
    return total + (value[:, None] if SWAP else value[None, :])


@triton.jit
def pairs_of(order, starts, ends, t, M: tl.constexpr):
    """The pairs [M] of tile t, int64, and which of them are there."""
    at = tl.load(starts + t) + tl.arange(0, M)
    held = at < tl.load(ends + t)
    return tl.load(order + at, mask=held, other=0).to(tl.int64), held


@triton.jit
def record_at(address):
    return tl.multiple_of(tl.multiple_of(address, 16).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _gate_up(
    x, order, experts, starts, ends, addresses, bias, inner, k,
    H: tl.constexpr, INNER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr,
    PITCH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr, CUBIC: tl.constexpr,
    FG: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G3: tl.constexpr,
    FU: tl.constexpr, U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr,
):  # fmt: skip
    """Grid (INNER / N, tiles)."""
    t = tl.program_id(1)
    expert = tl.load(experts + t)
    address = tl.load(addresses + tl.maximum(expert, 0))
    if (expert < 0) | (address == 0):
        return
    record = record_at(address)
    pair, held = pairs_of(order, starts, ends, t, M)
    row = tl.program_id(0) * N + tl.arange(0, N)
    there, long = row < INNER, row.to(tl.int64) * PITCH
    tokens = x + (pair // k) * H
    gate = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    up = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    for step in range((H + 63) // 64):
        column = step * 64 + tl.arange(0, 64)
        a = tl.load(tokens[:, None] + column[None], mask=held[:, None] & (column < H)[None], other=0.0)
        gate = product(a, tile(record, long, there, step, FG, H, G0, G1, G2, G3), gate, SWAP)
        up = product(a, tile(record, long, there, step, FU, H, U0, U1, U2, U3), up, SWAP)
    if bias is not None:
        gate = biased(gate, bias + expert * (2 * INNER), row, there, SWAP)
        up = biased(up, bias + expert * (2 * INNER) + INNER, row, there, SWAP)
    value = glu(gate, up, ALPHA, LIMIT, PLUS, CUBIC).to(inner.dtype.element_ty)
    if SWAP:
        value = tl.trans(value)
    tl.store(inner + pair[:, None] * INNER + row[None], value, mask=held[:, None] & there[None])


@triton.jit
def _down(
    inner, order, experts, starts, ends, addresses, bias, out,
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
        total = product(a, tile(record, long, there, step, FORMAT, INNER, P0, P1, P2, P3), total, SWAP)
    if bias is not None:
        total = biased(total, bias + expert * H, row, there, SWAP)
    value = total.to(out.dtype.element_ty)
    if SWAP:
        value = tl.trans(value)
    tl.store(out + pair[:, None] * H + row[None], value, mask=held[:, None] & there[None])


def expert_mlp(
    x: Tensor, ids: Tensor, tiles: Tiles, addresses: Tensor, layout: SlotLayout, out: Tensor, *,
    glu: Glu = SILU, biases: tuple[Tensor, Tensor] | None = None,
    first: Tuning | None = None, second: Tuning | None = None,
) -> None:  # fmt: skip
    """down glu(gate x, up x) of every pair, unweighted: x [T, H], ids [T, k] → out [T · k, H] in x's type.

    addresses int64 [E], on the device: where an expert's record lies in `layout`, a multiple of 16; 0: it is not in
    this set, and what `out` holds for its pairs stays. biases float32: of gate beside up [E, 2F], of down [E, H].
    """
    h, f, k = layout.hidden, layout.expert_hidden, ids.shape[1]
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert x.dtype == out.dtype
    assert addresses.dtype == torch.int64
    assert (x.shape, out.shape) == ((len(ids), h), (ids.numel(), h))
    assert h % 32 == f % 32 == 0
    inner = torch.empty((len(out), f), dtype=x.dtype, device=x.device)
    first = first or tuning_of(tiles.block, x.dtype, layout.gate.format, layout.up.format)
    second = second or tuning_of(tiles.block, x.dtype, layout.down.format)
    listed = (tiles.order, tiles.experts, tiles.starts, tiles.ends, addresses)
    n, (wide, narrow) = len(tiles.experts), biases or (None, None)
    _gate_up[(triton.cdiv(f, first.rows), n)](
        x, *listed, wide, inner, k, H=h, INNER=f, M=tiles.block, N=first.rows, SWAP=first.swap,
        PITCH=layout.gate.pitch, ALPHA=glu.alpha, LIMIT=glu.limit, PLUS=glu.plus, CUBIC=glu.cubic,
        FG=layout.gate.format, **planes("G", layout.gate), FU=layout.up.format, **planes("U", layout.up),
        num_warps=first.warps, num_stages=first.stages,
    )  # fmt: skip
    _down[(triton.cdiv(h, second.rows), n)](
        inner, *listed, narrow, out, H=h, INNER=f, M=tiles.block, N=second.rows, SWAP=second.swap,
        FORMAT=layout.down.format, **planes("P", layout.down), num_warps=second.warps, num_stages=second.stages,
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
    """Σ_j weights[t, j] · out[t · k + j], in float32 and in the order of j: out [T · k, H], weights [T, k] → [T, H].

    What stands at a weight of 0 may be anything.
    """
    tokens, k = weights.shape
    h = out.shape[1]
    assert out.is_contiguous()
    assert weights.is_contiguous()
    assert len(out) == tokens * k
    total = torch.empty((tokens, h), device=out.device)
    _combine[(triton.cdiv(h, 1024), tokens)](out, weights, total, H=h, K=k, B=1024)
    return total
