"""Last node of a step: it takes the token, advances the clocks, and tells the host through the ring."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.ring import COUNTED, row_words


@triton.jit
def _advance(
    chosen, token, position, clock, steps, status, remaining, eos, counters, ids, ring, rows, eos_count, ids_count,
    WORDS: tl.constexpr, COUNTED: tl.constexpr, EOS: tl.constexpr, IDS: tl.constexpr,
    DEVICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program. Offsets in a row are those of kernels.ring."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    state, step, taken = tl.load(status), tl.load(steps), tl.load(chosen).to(tl.int32)
    left, here, now = tl.load(remaining) - 1, tl.load(position), tl.load(clock)
    tl.debug_barrier()  # one thread stores below: by then all others have read
    if state != 0:
        return
    i = tl.arange(0, EOS)
    ends = tl.sum((tl.load(eos + i, mask=i < eos_count, other=-2) == taken).to(tl.int32), 0) > 0
    state = (ends | (left <= 0) | (taken < 0)).to(tl.int32)
    tl.store(remaining, left)
    tl.store(token, taken.to(token.dtype.element_ty))
    tl.store(position, here + 1)
    tl.store(clock, now + 1)
    tl.store(steps, step + 1)
    tl.store(status, state)
    row = ring.to(tl.pointer_type(tl.int32)) + (step % rows).to(tl.int64) * WORDS
    tl.store(row + 1, state)
    tl.store(row + 2, taken)
    if DEVICE:
        tl.store((row + 4).to(tl.pointer_type(tl.int64)), tl.extra.cuda.globaltimer())
    c = tl.arange(0, COUNTED)
    tl.store(row + 8 + c, tl.load(counters + c))
    tl.store(counters + c, tl.zeros((COUNTED,), tl.int32))
    i = tl.arange(0, IDS)
    tl.store(row + 16 + i, tl.load(ids + i, mask=i < ids_count, other=0), mask=i < ids_count)
    if DEVICE:  # every thread's words reach the host before the sequence number does
        fence()
        tl.debug_barrier()
        fence()
    tl.store(row, step + 1)


@triton.jit
def fence():
    """Order all memory accesses before and after, system-wide."""
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def advance(
    chosen: Tensor, *, token: Tensor, position: Tensor, clock: Tensor, steps: Tensor, status: Tensor,
    remaining: Tensor, eos: Tensor, counters: Tensor, ids: Tensor, ring: int, rows: int, pdl: bool = False,
) -> None:  # fmt: skip
    """Take the token `chosen` [1] (-1: NaN) if status [1] is RUN; otherwise do nothing.

    token = chosen; position, clock and steps increase by one, remaining decreases; status becomes DONE at an id in eos
    [n], when none remain, or at NaN. The step's row is written at address `ring` (kernels.ring): the counters [COUNTED]
    int32, which are reset to 0, and ids [layers, k] int32. All state is [1], int32 or int64.
    """
    assert counters.numel() == COUNTED
    _advance[(1,)](
        chosen, token, position, clock, steps, status, remaining, eos, counters, ids, ring, rows,
        eos.numel(), ids.numel(), WORDS=row_words(ids.numel()), COUNTED=COUNTED,
        EOS=triton.next_power_of_2(max(1, eos.numel())), IDS=triton.next_power_of_2(max(1, ids.numel())),
        DEVICE=token.is_cuda, num_warps=4, **dependent(pdl),
    )  # fmt: skip
