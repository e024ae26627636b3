"""Addresses of missed records in RAM: from the table of known rows, or requested from the host through the mailbox."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.advance import fence
from offmoe.kernels.mailbox import answer_word
from offmoe.kernels.ring import ABORTED

SPIN_NS = 50_000  # of one look in the interpreter, about


@triton.jit(do_not_specialize=["timeout_ns", "spins"])
def _request(
    mailbox, count, records, sources, row_of, base, stride, status, seq, timeout_ns, spins,
    B: tl.constexpr, ANSWER: tl.constexpr, ABORTED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """One program of one warp. Offsets are those of kernels.mailbox."""
    state, n, number = tl.load(status), tl.load(count), tl.load(seq) + 1
    i = tl.arange(0, B)
    asked = (i < n) & (state == 0)
    record = tl.load(records + i, mask=asked, other=0)
    row = tl.load(row_of + record, mask=asked, other=0)
    tl.debug_barrier()  # one thread stores below: by then all others have read
    if state != 0:
        tl.store(count, 0)
        return
    if tl.min(row, 0) >= 0:
        tl.store(sources + i, base + row.to(tl.int64) * stride, mask=asked)
        return
    words = mailbox.to(tl.pointer_type(tl.int32))
    tl.store(words + 2 + i, record, mask=asked)
    tl.store(words + 1, n)
    if DEVICE:  # every thread's words reach the host before the sequence number does
        fence()
        tl.debug_barrier()
        fence()
    tl.store(words, number)
    tl.store(seq, number)
    answer = words + ANSWER
    left = state + spins
    if DEVICE:
        deadline = tl.extra.cuda.globaltimer() + timeout_ns
    while (tl.load(answer, volatile=True) != number) & (left > 0):
        if DEVICE:
            left = (tl.extra.cuda.globaltimer() < deadline).to(tl.int32)
        else:
            left -= 1
    if DEVICE:
        fence()
    word = tl.load(answer + (i & 1), volatile=True)  # threads may have left the loop for different reasons: look again
    done = tl.sum(tl.where(i == 0, word, 0), 0)
    failed = tl.sum(tl.where(i == 1, word, 0), 0)
    if DEVICE:
        fence()
    if (done == number) & (failed == 0):
        address = tl.load((answer + 2).to(tl.pointer_type(tl.int64)) + i, mask=asked, other=0, volatile=True)
        tl.store(sources + i, address, mask=asked)
    else:
        tl.store(status, ABORTED)
        tl.store(count, 0)


def request(
    mailbox: int, count: Tensor, records: Tensor, sources: Tensor, row_of: Tensor, base: int, stride: int,
    status: Tensor, seq: Tensor, *, timeout_ns: int = 2_000_000_000,
) -> None:  # fmt: skip
    """Write into sources [k] int64 the addresses of the first `count` [1] of records [k], while status [1] is RUN.

    If all rows row_of[record] are known (≥ 0), the addresses are base + row · stride; otherwise the host answers at
    address `mailbox`, and the kernel spins meanwhile. Without an answer in time, or with an error, status becomes
    ABORTED. Where status is not RUN afterwards, count is 0. `seq` [1] counts requests. All other tensors are int32.
    """
    k = records.numel()
    assert sources.numel() >= k, f"sources {sources.numel()} ≥ records {k}"
    _request[(1,)](
        mailbox, count, records, sources, row_of, base, stride, status, seq, timeout_ns,
        max(2, timeout_ns // SPIN_NS), B=max(2, triton.next_power_of_2(k)), ANSWER=answer_word(k), ABORTED=ABORTED,
        DEVICE=count.is_cuda, num_warps=1,
    )  # fmt: skip
