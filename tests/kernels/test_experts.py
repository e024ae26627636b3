"""Experts in every format against float64; what is not in a slot is NaN, and what is not to be written stays so."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from exhaustive import cases
from kernel_tensors import DEVICE, ints, nan, randn
from quantised_matrices import TESTED, filled_slots, random_records
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import experts as naive
from offmoe.kernels.feed_forward import Glu
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.page_in import page_in as naive_page_in
from offmoe.kernels.planes import SlotLayout, slot_layout, unplane
from offmoe.kernels.record import RecordLayout, unpack
from offmoe.kernels.striped import unstripe

pytest.importorskip("triton")
from offmoe.kernels.gpu import experts as fast
from offmoe.kernels.gpu.experts import movers_scratch
from offmoe.kernels.gpu.movers import MOVER_CHUNK, Strips
from offmoe.kernels.gpu.page_in import Copies

RATIO = 2e-6


def record_of(fmt: str, down: str, stacked: bool) -> RecordLayout:
    """96 and 160 weights a row where blocks are of 32."""
    large = max(FORMATS[fmt].block, FORMATS[down].block) > 32
    h, f = (512 if FORMATS[fmt].tiled else 256, 256) if large else (160, 96)
    if stacked:
        return RecordLayout.of(("gate_up", fmt, 2 * f, h), ("down", down, h, f))
    return RecordLayout.of(("gate", fmt, f, h), ("up", fmt, f, h), ("down", down, h, f))


def slots_of(fmt: str, down: str, kind: str = "normal", stacked: bool = False) -> tuple[Tensor, SlotLayout]:
    """Four slots, of which 1 holds NaN."""
    record = record_of(fmt, down, stacked)
    layout = slot_layout(record)
    return filled_slots(random_records(record, 3, kind), layout, [0, 2, 3], 4).to(DEVICE), layout


def check_experts(fmt: str, down: str, kind: str, tokens: int, stacked: bool) -> None:
    records, layout = slots_of(fmt, down, kind, stacked)
    slots = ints(2, 0, 3, 2)[: 2 * tokens]
    x = 0.05 * randn(tokens, layout.hidden)  # gates of about 1 to 15
    out = nan(2 * tokens, layout.expert_hidden)
    weights, want = randn(2 * tokens, seed=3).abs(), out.double()
    fast.expert_gate_up(records, layout, slots, weights, x, out)
    naive.expert_gate_up(records, layout, slots, weights, x, want)
    assert_close("gate_up", out, want, RATIO)
    inner, y = randn(*out.shape, seed=2), randn(*x.shape, seed=4)
    summed = y.double()
    fast.expert_down(records, layout, slots, inner, y)
    naive.expert_down(records, layout, slots, inner, summed)
    assert_close("down", y, summed, RATIO)


@pytest.mark.parametrize(
    "fmt", cases(TESTED, ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XXS", "IQ3_S", "MXFP4", "NVFP4", "F8_E4M3", "F16"])
)
def test_experts_of_two_tokens(fmt: str) -> None:
    check_experts(fmt, fmt, "normal", 2, fmt in ("Q8_0", "Q6_K", "MXFP4"))


@pytest.mark.parametrize(("fmt", "down"), [("Q4_K", "Q6_K"), ("MXFP4", "Q8_0"), ("F16", "Q4_1")])
def test_experts_of_two_formats(fmt: str, down: str) -> None:
    check_experts(fmt, down, "normal", 1, False)


def test_rows_come_with_their_scales() -> None:
    """16 tiles a row, of 128 rows each: rows come one by one all the same, or six movers would bring a whole expert."""
    layout = slot_layout(
        RecordLayout.of(("gate", "F8_E4M3", 256, 2048), ("up", "F8_E4M3", 256, 2048), ("down", "Q4_0", 2048, 256))
    )
    strips = Strips.of(layout, MOVER_CHUNK)
    assert strips.rows == 1
    assert sorted(strips.tiles) == [1, 1, 128, 128]


@pytest.mark.parametrize(
    ("fmt", "stacked"),
    cases(
        product((fmt for fmt in TESTED if fmt != "IQ4_XS"), (False, True)),  # planes of IQ4_XS move as those of Q6_K
        [("Q4_K", True), ("Q6_K", False), ("MXFP4", False), ("F8_E4M3", False), ("NVFP4", True), ("BF16", False)],
    ),
)
def test_what_is_missing_is_brought_and_multiplied(fmt: str, stacked: bool) -> None:
    check_bringing(record_of(fmt, fmt, stacked))


@pytest.mark.parametrize(
    ("fmt", "inner", "hidden"),
    cases([("F8_E4M3", 512, 640), ("F8_E4M3_BF16", 1024, 384)], [("F8_E4M3_BF16", 1024, 384)]),
)
def test_scales_of_a_tile_begin_within_sixteen_bytes(fmt: str, inner: int, hidden: int) -> None:
    """An odd number in a row of tiles; in bfloat16 they begin within a word."""
    record = RecordLayout.of(("gate", fmt, inner, hidden), ("up", fmt, inner, hidden), ("down", "Q4_0", hidden, inner))
    check_bringing(record)


def check_bringing(record: RecordLayout) -> None:
    """Two experts of three, into slots that hold NaN; one that is not on the list any more stays out."""
    layout = slot_layout(record)
    records = filled_slots(random_records(record, 3), layout, [0, 2, 3], 4).to(DEVICE)
    rows, want = rows_of_three(record), records.clone()
    listed, to, count = ints(4, 0, 1), ints(1, 0, 3), ints(2)
    slots, weights, x = ints(0, 2, 1), randn(3, seed=3).abs(), 0.05 * randn(1, layout.hidden)
    naive_page_in(rows.to(DEVICE), listed, count, to, want, layout)
    whole, out = nan(3, layout.expert_hidden), nan(3, layout.expert_hidden)
    fast.expert_gate_up(want, layout, slots, weights, x, whole)
    copies = Copies(count, to, movers_scratch([layout], DEVICE), None, listed, rows.data_ptr(), rows.stride(0))
    fast.expert_gate_up(records, layout, slots, weights, x, out, copies=copies)
    assert not whole.isnan().any()
    assert torch.equal(out, whole)  # bit for bit: what is resident does not change a token
    for form in (layout.gate, layout.up, layout.down):
        assert torch.equal(unplane(records, form), unplane(want, form)), form


def test_nothing_is_missing() -> None:
    """What a count of 0 leaves behind in the list is not read."""
    records, layout = slots_of("Q4_K", "Q6_K")
    slots, weights, x = ints(2, 3, 0), randn(3, seed=3).abs(), 0.05 * randn(1, layout.hidden)
    whole, out, before = nan(3, layout.expert_hidden), nan(3, layout.expert_hidden), records.clone()
    fast.expert_gate_up(records, layout, slots, weights, x, whole)
    copies = Copies(ints(0), ints(2, 3, 9), movers_scratch([layout], DEVICE), None, ints(2**30, -5, 7), 0, 256)
    fast.expert_gate_up(records, layout, slots, weights, x, out, copies=copies)
    assert torch.equal(out, whole)
    assert torch.equal(records, before)


def rows_of_three(record: RecordLayout) -> Tensor:
    """Five rows of RAM, of which 4, 0 and 1 hold records."""
    rows = torch.full((5, -(-record.nbytes // 256) * 256), 0xFF, dtype=torch.uint8)
    rows[[4, 0, 1], : record.nbytes] = random_records(record, 3, "normal")
    return rows.pin_memory() if DEVICE.type == "cuda" else rows


CLAMPED = Glu(alpha=1.702, limit=2.0, plus=1.0)


@pytest.mark.parametrize(("fmt", "interleaved"), [("MXFP4_PAIRS", True), ("BF16", True), ("Q8_0", False)])
def test_biases_and_a_clamped_glu(fmt: str, interleaved: bool) -> None:
    """gpt-oss's experts; biases go by the expert and not by its slot, and the weights are in `inner` already."""
    h, f = 192, 128  # whole lanes
    record = RecordLayout.of(("gate_up", fmt, 2 * f, h), ("down", fmt, h, f), interleaved=interleaved)
    layout = slot_layout(record)
    records = filled_slots(random_records(record, 3), layout, [0, 2, 3], 4).to(DEVICE)
    wide, narrow, weights = randn(5, 2 * f, seed=5), randn(5, h, seed=6), randn(4, seed=3).abs()
    slots, ids, x = ints(2, 0, 3, 2), ints(4, 1, 0, 2), 0.05 * randn(2, h)
    out = nan(4, f)
    want = out.double()
    for twin, into in ((fast, out), (naive, want)):
        twin.expert_gate_up(records, layout, slots, weights, x, into, glu=CLAMPED, ids=ids, bias=wide)
    assert_close("gate_up", out, want, RATIO)
    gate_up, _ = unpack(random_records(record, 3), record, torch.float64)
    both = gate_up[1] @ unstripe(x.cpu())[0].double() + wide[4].cpu().double()
    assert_close("by hand", unstripe(out)[0], CLAMPED(*both.chunk(2)) * float(weights[0]), 1e-5)
    assert (both[:f] > CLAMPED.limit).any()
    assert (both[f:].abs() > CLAMPED.limit).any()
    chosen = {"glu": CLAMPED, "ids": ids[:3], "bias": wide}
    all_there, brought, absent = nan(3, f), nan(3, f), records.clone()
    fast.expert_gate_up(records, layout, slots[:3], weights[:3], x[:1], all_there, **chosen)
    absent[[0, 3]] = 0xFF
    rows = torch.zeros((2, absent.shape[1]), dtype=torch.uint8)
    rows[:, : record.nbytes] = random_records(record, 3)[[0, 2]]
    rows = rows.pin_memory() if DEVICE.type == "cuda" else rows
    copies = Copies(ints(2), ints(0, 3), movers_scratch([layout], DEVICE), None, ints(0, 1), rows.data_ptr(),
                    rows.stride(0))  # fmt: skip
    fast.expert_gate_up(absent, layout, slots[:3], weights[:3], x[:1], brought, copies=copies, **chosen)
    assert torch.equal(brought, all_there)
    y = randn(2, h, seed=4)
    summed = y.double()
    for twin, into in ((fast, y), (naive, summed)):
        twin.expert_down(records, layout, slots, out, into, ids=ids, weights=weights, bias=narrow)
    assert_close("down", y, summed, RATIO)


def test_a_clamp_hides_no_nan() -> None:
    records, layout = slots_of("F16", "F16")
    out, x = torch.zeros(1, layout.expert_hidden, device=DEVICE), nan(1, layout.hidden)
    fast.expert_gate_up(records, layout, ints(0), randn(1), x, out, glu=CLAMPED)
    assert out.isnan().all()


@pytest.mark.parametrize("fmt", ["BF16", "Q4_K"])
def test_a_weight_may_scale_what_its_expert_takes_in(fmt: str) -> None:
    records, layout = slots_of(fmt, fmt)
    slots, x, weights = ints(2, 0), 0.05 * randn(2, layout.hidden), 0.5 + randn(2, seed=3).abs()
    out = nan(2, layout.expert_hidden)
    want, scaled = out.double(), out.double()
    for twin, into in ((fast, out), (naive, want)):
        twin.expert_gate_up(records, layout, slots, weights, x, into, before=True)
    naive.expert_gate_up(records, layout, slots, torch.ones_like(weights), x.double() * weights[:, None], scaled)
    assert_close("gate_up", out, want, RATIO)
    assert_close("by hand", want, scaled, 1e-6)
