"""What begins and what ends a step: the embedding's row, and the row of the ring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised_matrices import random_matrix
from tolerance import assert_close

from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.kernels.planes import matrix, rearrange_matrix
from offmoe.kernels.ring import ABORTED, COUNTED, DONE, RUN, Ring, row_words

pytest.importorskip("triton")
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.embed import embed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, LAYERS, K = 4, 3, 2


# See DeviceTrunk._raw.
EMBEDDED = [name for name, form in FORMATS.items() if not form.scales and not name.startswith("INT4")]


@pytest.mark.parametrize("fmt", EMBEDDED)
def test_a_row_is_the_dequantised_one(fmt: str) -> None:
    rows, cols = 5, 768  # one and a half programs
    form, raw = matrix(fmt, rows, cols), random_matrix(fmt, rows, cols)[0]
    buffer = rearrange_matrix(raw, form).to(DEVICE)
    tokens = torch.tensor([3, 0, 4], dtype=torch.int32, device=DEVICE)
    out = torch.full((3, cols), torch.nan, device=DEVICE)
    embed(tokens, (buffer, form), out, striped=False)
    assert_close(fmt, out, dequantise(raw, fmt, rows, cols)[[3, 0, 4]], 1e-6)


def test_no_token_reads_the_first_row() -> None:
    form = matrix("F32", 2, 32)
    buffer = torch.ones(64).view(torch.uint8).to(DEVICE)
    out = torch.full((1, 32), torch.nan, device=DEVICE)
    embed(torch.tensor([-1], device=DEVICE), (buffer, form), out, striped=False)
    assert (out == 1).all()


class Step:
    """All that `advance` touches; the ring holds rubbish but for its sequence numbers."""

    def __init__(self, **state: int) -> None:
        memory = torch.full((ROWS, row_words(LAYERS * K)), -7, dtype=torch.int32)
        self.ring = Ring(memory.pin_memory() if DEVICE.type == "cuda" else memory, LAYERS, K)
        values = {"token": 9, "position": 20, "clock": 100, "steps": 0, "status": RUN, "remaining": 50} | state
        self.state = {name: torch.tensor([v], dtype=torch.int32, device=DEVICE) for name, v in values.items()}
        self.counters = torch.zeros(COUNTED, dtype=torch.int32, device=DEVICE)
        self.ids = torch.zeros((LAYERS, K), dtype=torch.int32, device=DEVICE)
        self.eos = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)

    def advance(self, chosen: int) -> None:
        self.counters.copy_(torch.arange(COUNTED) + 10 * chosen)
        self.ids.copy_(torch.arange(LAYERS * K).view(LAYERS, K) + 1000 * chosen)
        taken = torch.tensor([chosen], dtype=torch.int32, device=DEVICE)
        advance(taken, **self.state, eos=self.eos, counters=self.counters, ids=self.ids,
                ring=self.ring.address, rows=ROWS)  # fmt: skip
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def values(self, *names: str) -> list[Any]:
        return [int(self.state[name]) for name in names]


def test_a_step_advances_and_tells_the_host() -> None:
    step = Step()
    for n, token in enumerate((7, 8, 1, 3, 4, 6)):  # round the ring
        assert step.ring.poll(n) is None
        step.advance(token)
        assert step.values("token", "position", "clock", "steps", "status", "remaining") == [
            token, 21 + n, 101 + n, 1 + n, RUN, 49 - n
        ]  # fmt: skip
        row = step.ring.poll(n)
        assert row is not None
        assert (row.step, row.done, row.token) == (n, False, token)
        counted = (row.hits, row.covered, row.late, row.misses, row.wasted, row.uploaded_bytes // 16)
        assert counted == tuple(i + 10 * token for i in range(6))
        assert row.ids.tolist() == [[i + 1000 * token, i + 1000 * token + 1] for i in (0, 2, 4)]
        assert not step.counters.any()
    assert step.ring.poll(0) is None  # its row is step 4's by now


@pytest.mark.parametrize(("token", "state"), [(5, {}), (2, {}), (7, {"remaining": 1}), (-1, {})])
def test_the_end_of_an_answer(token: int, state: dict[str, int]) -> None:
    step = Step(**state)
    step.advance(token)
    row = step.ring.poll(0)
    assert row is not None
    assert (row.done, row.token) == (True, token)
    before = step.ring.memory.clone()
    step.advance(8)  # launched past the end
    assert torch.equal(step.ring.memory, before)
    assert step.values("token", "position", "steps", "status") == [token, 21, 1, DONE]


def test_an_aborted_step_stands_still() -> None:
    step = Step(status=ABORTED, steps=3)
    before = step.ring.memory.clone()
    step.advance(8)
    assert torch.equal(step.ring.memory, before)
    assert step.values("token", "position", "clock", "steps", "status") == [9, 20, 100, 3, ABORTED]
