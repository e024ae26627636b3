"""The grouped GEMM in every format against float64; matrices unpacked bit for bit. Interpreted if there is no GPU."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from exhaustive import cases
from quantised_matrices import EXTREMES, TESTED, filled_slots, random_records
from tolerance import assert_close

from offmoe.kernels import gemm as naive
from offmoe.kernels.feed_forward import Glu
from offmoe.kernels.planes import slot_layout
from offmoe.kernels.record import RecordLayout

pytest.importorskip("triton")
from gemm_checks import (
    DEVICE,
    DTYPES,
    EXPERTS,
    IDS,
    RATIOS,
    addresses_of,
    check_experts,
    check_unpacked,
    randn,
    run,
    scaled,
    slots_of,
)

from offmoe.kernels.gpu import gemm as fast


@pytest.mark.parametrize(
    "fmt", cases(TESTED, ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "IQ2_XXS", "IQ3_S", "MXFP4", "NVFP4", "F8_E4M3", "F16"])
)
def test_experts(fmt: str) -> None:
    check_experts(fmt, fmt, torch.float32, fmt in ("Q8_0", "Q6_K", "MXFP4"))


@pytest.mark.parametrize(("fmt", "down"), [("Q4_K", "Q6_K"), ("MXFP4", "Q8_0"), ("F16", "Q4_1")])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_experts_of_two_formats(fmt: str, down: str, dtype: torch.dtype) -> None:
    check_experts(fmt, down, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_up_in_a_format_of_its_own(dtype: torch.dtype) -> None:
    record = RecordLayout.of(("gate", "Q4_K", 256, 256), ("up", "Q8_0", 256, 256), ("down", "Q6_K", 256, 256))
    layout = slot_layout(record)
    slots = filled_slots(random_records(record, EXPERTS), layout, [2 * e for e in range(EXPERTS)], 8).to(DEVICE)
    x, where = scaled(len(IDS), layout, dtype), {e: 2 * e for e in range(EXPERTS)}
    out = torch.full((IDS.numel(), layout.hidden), torch.nan, dtype=dtype, device=DEVICE)
    want = out.double()
    run(x, IDS, slots, where, layout, out)
    naive.expert_mlp(x, IDS, {e: slots[s] for e, s in where.items()}, layout, want)
    assert_close(str(dtype), out, want, RATIOS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 64])
def test_biases_and_a_clamped_glu(dtype: torch.dtype, block: int) -> None:
    record = RecordLayout.of(("gate_up", "MXFP4_PAIRS", 192, 160), ("down", "MXFP4_PAIRS", 160, 96), interleaved=True)
    layout, glu = slot_layout(record), Glu(1.702, 2.0, 1.0)
    slots = filled_slots(random_records(record, EXPERTS), layout, [2 * e for e in range(EXPERTS)], 8).to(DEVICE)
    x, biases = scaled(len(IDS), layout, dtype), (randn(EXPERTS, 192, seed=5), randn(EXPERTS, 160, seed=6))
    out = torch.full((IDS.numel(), 160), torch.nan, dtype=dtype, device=DEVICE)
    want, where = out.double(), {e: 2 * e for e in range(EXPERTS)}
    tiles = fast.plan_tiles(IDS, EXPERTS, dtype, block if dtype != torch.float32 else 16)
    fast.expert_mlp(x, IDS, tiles, addresses_of(slots, where), layout, out, glu=glu, biases=biases)
    naive.expert_mlp(x, IDS, {e: slots[s] for e, s in where.items()}, layout, want, glu=glu, biases=biases)
    assert_close(str(dtype), out, want, RATIOS[dtype])


def test_a_set_and_an_address_change_no_bit() -> None:
    slots, layout = slots_of("Q4_0", "Q4_0")
    x = scaled(len(IDS), layout, torch.float16)
    whole, parts = (torch.full((IDS.numel(), layout.hidden), torch.nan, dtype=x.dtype, device=DEVICE) for _ in "ab")
    run(x, IDS, slots, {0: 0, 1: 2, 2: 4, 3: 6}, layout, whole)
    slots[5] = slots[2]
    slots[2] = 0xFF
    run(x, IDS, slots, {3: 6}, layout, parts)
    run(x, IDS, slots, {0: 0, 1: 5}, layout, parts)
    assert whole.isfinite().all()
    assert torch.equal(whole, parts)


def test_several_tiles_of_an_expert_and_every_tuning() -> None:
    slots, layout = slots_of("Q4_1", "Q5_0")
    ids = torch.where(torch.arange(40, device=DEVICE) < 37, 1, 2)[:, None]
    x = scaled(40, layout, torch.float16)
    want = torch.full((40, layout.hidden), torch.nan, device=DEVICE).double()
    naive.expert_mlp(x, ids, {1: slots[2], 2: slots[4]}, layout, want)
    for swap in (False, True):
        tuning = fast.Tuning(64, 4, 2, swap)
        out = torch.full((40, layout.hidden), torch.nan, dtype=x.dtype, device=DEVICE)
        run(x, ids, slots, {1: 2, 2: 4}, layout, out, 16, first=tuning, second=tuning)
        assert_close(f"swap={swap}", out, want, RATIOS[x.dtype])


TILED = [(1, 1, 1, 16), (7, 2, 5, 16), (90, 3, 4, 32), (700, 2, 8, 64)]


@pytest.mark.parametrize(("tokens", "k", "experts", "block"), TILED)
def test_tiles_are_the_twins(tokens: int, k: int, experts: int, block: int) -> None:
    """The last case takes more than one round of the kernel; some experts get nothing."""
    ids = torch.randint(0, experts, (tokens, k), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ids[ids == 2] = 0
    ids[1::3, -1] = -1
    order, listed = naive.plan_tiles(ids, experts, block)
    tiles = fast.plan_tiles(ids, experts, torch.float16, block)
    assert torch.equal(tiles.order[: len(order)].long(), order)
    n = len(listed)
    assert list(zip(*(t[:n].tolist() for t in (tiles.experts, tiles.starts, tiles.ends)), strict=True)) == listed
    assert tiles.experts[n:].eq(-1).all()
    assert len(tiles.experts) == min(-(-tokens * k // block) + experts, tokens * k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype: torch.dtype) -> None:
    out, weights = randn(9, 160).to(dtype), randn(3, 3, seed=2)
    assert_close("combine", fast.combine(out, weights), naive.combine(out, weights), 1e-6)
    weights[1, 2], weights[2] = 0, 0
    want = naive.combine(out, weights)
    out[5:] = torch.nan
    assert_close("of some", fast.combine(out, weights), want, 1e-6)


KINDS = ("normal", *EXTREMES)


@pytest.mark.parametrize(("fmt", "kind"), cases(product(TESTED, KINDS), list(zip(TESTED, cycle(KINDS), strict=False))))
def test_unpacked_bit_for_bit(fmt: str, kind: str) -> None:
    check_unpacked(fmt, kind)
