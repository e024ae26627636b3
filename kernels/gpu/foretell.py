"""Prediction of policy echo on the GPU, computed on the side stream: cache.policies.echo's numbers, bit for bit.

It runs once per token, when all layers are routed: the token's row of bits enters the ring, is compared with all rows
there, and what followed the nearest ones is summed for every record. Sums are of integers below 2^24, so that their
order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

EACH, STEP = 64, 32  # rows of a program that compares, and words that it reads of each at a time
NONE = tl.constexpr(1 << 62)


@dataclass(frozen=True)
class Past:
    """Arrays of policy echo, int32 except `foretold` and `keys`."""

    rows: Tensor  # [w, words] the ring
    filled: Tensor  # [1] tokens that it has taken
    weights: Tensor  # [NEAREST, AHEAD]
    foretold: Tensor  # [records] float32, for the next token
    nearest: Tensor  # [NEAREST] ages, 0: none
    keys: Tensor  # [parts · NEAREST] int64
    ticket: Tensor  # [1] 0


@triton.jit
def popcount(x):
    """Return the number of set bits of int32 x."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _remember(log, k, experts, routed, rows, filled, status, words, w, WORDS: tl.constexpr, ROUTED: tl.constexpr):
    """One program. Append the row of the last token; nothing happens while status is not 0."""
    if tl.load(status) == 0:
        count = tl.load(filled)
        row = rows + (count % w).to(tl.int64) * words
        i, j = tl.arange(0, WORDS), tl.arange(0, ROUTED)
        tl.store(row + i, i * 0, mask=i < words)
        id = tl.load(log + j, mask=j < routed, other=-1)
        record = tl.maximum(id, 0) + j // k * experts
        tl.debug_barrier()  # the row is empty, and all have read the count
        tl.atomic_or(row + (record >> 5), (j * 0 + 1) << (record & 31), mask=id >= 0)
        tl.store(filled, count + 1)


@triton.jit
def least(keys, out, count: tl.constexpr):
    """Store the `count` lowest of distinct `keys` into out, in ascending order."""
    for n in range(count):
        first = tl.min(keys, 0)
        tl.store(out + n, first)
        keys = tl.where(keys == first, NONE, keys)


@triton.jit
def _compare(
    rows, filled, nearest, keys, ticket, words, w, parts,
    NEAREST: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Each program ranks some ages by the Hamming distance of their rows; the last to finish merges the rankings."""
    last = tl.load(filled) - 1
    age = tl.program_id(0) * EACH + tl.arange(0, EACH) + 2
    inside = (age < w) & (age <= last)
    row = tl.where(inside, (last - age) % w, 0).to(tl.int64) * words
    newest = rows + (tl.maximum(last, 0) % w).to(tl.int64) * words
    far = tl.zeros((EACH,), tl.int32)
    for start in range(0, words, STEP):
        i = start + tl.arange(0, STEP)
        bits = tl.load(rows + row[:, None] + i[None, :], mask=inside[:, None] & (i < words)[None, :], other=0)
        far += tl.sum(popcount(bits ^ tl.load(newest + i, mask=i < words, other=0)[None, :]), 1)
    least(tl.where(inside, far.to(tl.int64) * w + age, NONE), keys + tl.program_id(0) * NEAREST, NEAREST)
    tl.debug_barrier()  # all threads' stores come before the ticket
    if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
        tl.store(ticket, 0)
        j = tl.arange(0, MERGED)
        found = tl.load(keys + j, mask=j < parts * NEAREST, other=NONE, cache_modifier=".cg")
        for n in range(NEAREST):
            first = tl.min(found, 0)
            tl.store(nearest + n, tl.where(first < NONE, first % w, 0).to(tl.int32))
            found = tl.where(found == first, NONE, found)


@triton.jit
def _foretell(
    rows, filled, weights, nearest, foretold, words, w, records,
    NEAREST: tl.constexpr, AHEAD: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Each program sums for 32 · EACH records."""
    last = tl.load(filled) - 1
    i, bit = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, 32)
    said = tl.zeros((EACH, 32), tl.int32)
    for n in range(NEAREST):
        age = tl.load(nearest + n)
        for d in tl.static_range(AHEAD):
            after = age - 2 - d
            known = (age > 0) & (after >= 0)
            row = tl.where(known, (last - after) % w, 0).to(tl.int64) * words
            word = tl.load(rows + row + i, mask=(i < words) & known, other=0)
            said += ((word[:, None] >> bit[None, :]) & 1) * tl.load(weights + n * AHEAD + d)
    record = i[:, None] * 32 + bit[None, :]
    tl.store(foretold + record, said.to(tl.float32) * 0.000244140625, mask=record < records)  # echo.UNIT


def foretell(past: Past, log: Tensor, status: Tensor, *, k: int, experts: int) -> None:
    """Update `past` with the ids of the last token, `log` [layers · k] (-1: none), so that past.foretold is for the
    next token.

    Nothing changes while status [1] is not 0.
    """
    (w, words), (nearest, ahead) = past.rows.shape, past.weights.shape
    parts, records = parts_of(w), past.foretold.numel()
    _remember[(1,)](
        log, k, experts, log.numel(), past.rows, past.filled, status, words, w,
        WORDS=triton.next_power_of_2(words), ROUTED=triton.next_power_of_2(log.numel()),
    )  # fmt: skip
    _compare[(parts,)](
        past.rows, past.filled, past.nearest, past.keys, past.ticket, words, w, parts,
        NEAREST=nearest, EACH=EACH, STEP=STEP, MERGED=triton.next_power_of_2(parts * nearest),
    )  # fmt: skip
    _foretell[(triton.cdiv(words, 16),)](
        past.rows, past.filled, past.weights, past.nearest, past.foretold, words, w, records,
        NEAREST=nearest, AHEAD=ahead, EACH=16,
    )  # fmt: skip


def parts_of(w: int) -> int:
    """Return the number of programs that compare a ring of w rows."""
    return triton.cdiv(w, EACH)
