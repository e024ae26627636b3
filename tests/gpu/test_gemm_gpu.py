"""The grouped GEMM on a GPU: 16-bit types, every size of a tile at a real layer's shape, and no host in between."""

from __future__ import annotations

import pytest
import torch
from gemm_checks import EXPERTS, RATIOS, addresses_of, check_experts, check_unpacked, run, scaled
from quantised_matrices import TESTED, filled_slots, random_records
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import gemm as naive
from offmoe.kernels.gpu.gemm import combine, expert_mlp, plan_tiles
from offmoe.kernels.planes import SlotLayout, slot_layout
from offmoe.kernels.record import RecordLayout

CUDA = torch.device("cuda")
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fmt", TESTED)
def test_experts_in_every_type(fmt: str, dtype: torch.dtype) -> None:
    check_experts(fmt, fmt, dtype, fmt in ("Q8_0", "Q6_K"))


@pytest.mark.parametrize("fmt", TESTED)
def test_unpacked(fmt: str) -> None:
    check_unpacked(fmt, "normal")


def large(fmt: str, down: str) -> tuple[Tensor, SlotLayout]:
    """H 2048, F 768; expert e in slot e."""
    record = RecordLayout.of(("gate", fmt, 768, 2048), ("up", fmt, 768, 2048), ("down", down, 2048, 768))
    layout = slot_layout(record)
    raw = random_records(record, EXPERTS)
    return filled_slots(raw, layout, list(range(EXPERTS)), EXPERTS + 1).to(CUDA), layout


def drawn(tokens: int) -> Tensor:
    """Two experts a token; expert 0 gets most of them."""
    g = torch.Generator().manual_seed(5)
    weights = torch.tensor([8.0, 2.0, 1.0, 0.1])[:EXPERTS]
    return torch.multinomial(weights.expand(tokens, EXPERTS), 2, generator=g).to(CUDA)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize(("fmt", "down"), [("Q4_K", "Q6_K"), ("MXFP4", "Q8_0")])
def test_a_real_layer(fmt: str, down: str, block: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and block > 16:
        pytest.skip("float32 has tiles of 16")
    slots, layout = large(fmt, down)
    ids, x = drawn(201), 0.1 * scaled(201, layout, dtype)
    out = torch.full((ids.numel(), layout.hidden), torch.nan, dtype=dtype, device=CUDA)
    want = out.double()
    run(x, ids, slots, {e: e for e in range(EXPERTS)}, layout, out, block)
    naive.expert_mlp(x, ids, {e: slots[e] for e in range(EXPERTS)}, layout, want)
    assert_close(f"{fmt} {down} {dtype} {block}", out, want, RATIOS[dtype])


def test_a_set_and_an_address_change_no_bit_of_a_real_layer() -> None:
    slots, layout = large("Q4_K", "Q6_K")
    ids, x = drawn(300), 0.1 * scaled(300, layout, torch.bfloat16)
    whole, parts = (torch.full((600, layout.hidden), torch.nan, dtype=x.dtype, device=CUDA) for _ in "ab")
    run(x, ids, slots, {e: e for e in range(EXPERTS)}, layout, whole)
    slots[EXPERTS] = slots[1]
    slots[1] = 0xFF
    run(x, ids, slots, {0: 0, 3: 3}, layout, parts)
    run(x, ids, slots, {1: EXPERTS, 2: 2}, layout, parts)
    assert whole.isfinite().all()
    assert torch.equal(whole, parts)


def test_the_host_waits_for_nothing() -> None:
    """The second time, for the first compiles."""
    slots, layout = large("Q4_K", "Q4_K")
    ids, x, weights = drawn(64), 0.1 * scaled(64, layout, torch.bfloat16), torch.rand((64, 2), device=CUDA)
    addresses = addresses_of(slots, {e: e for e in range(EXPERTS)})
    out = torch.empty((128, layout.hidden), dtype=x.dtype, device=CUDA)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            expert_mlp(x, ids, plan_tiles(ids, EXPERTS, x.dtype), addresses, layout, out)
            total = combine(out, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_close("combine", total, naive.combine(out, weights), 1e-6)
