"""The grouped GEMM against the naive one in float64; matrices unpacked bit for bit."""

from __future__ import annotations

import torch
from quantised_matrices import filled_slots, random_matrix, random_records
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import gemm as naive
from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.kernels.gpu import gemm as fast
from offmoe.kernels.gpu.formats.unpack import dequantise_into
from offmoe.kernels.planes import SlotLayout, matrix, rearrange_matrix, slot_layout
from offmoe.kernels.record import RecordLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]  # interpreted wrongly
RATIOS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
EXPERTS = 4
IDS = torch.tensor([[3, 0], [0, 1], [3, 1], [0, 3], [3, 0]], device=DEVICE)  # nobody asks for 2


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layout_of(fmt: str, down: str, stacked: bool = False) -> tuple[SlotLayout, RecordLayout]:
    """96 and 160 weights a row, no whole number of tiles, where blocks are of 32."""
    h, f = (256, 256) if max(FORMATS[fmt].block, FORMATS[down].block) > 32 else (160, 96)
    h = 512 if FORMATS[fmt].tiled else h
    record = RecordLayout.of(("gate", fmt, f, h), ("up", fmt, f, h), ("down", down, h, f))
    if stacked:
        record = RecordLayout.of(("gate_up", fmt, 2 * f, h), ("down", down, h, f))
    return slot_layout(record), record


def slots_of(fmt: str, down: str, stacked: bool = False) -> tuple[Tensor, SlotLayout]:
    """A slot for each expert, the others NaN; expert e lies in slot 2 e."""
    layout, record = layout_of(fmt, down, stacked)
    raw = random_records(record, EXPERTS)
    return filled_slots(raw, layout, [2 * e for e in range(EXPERTS)], 2 * EXPERTS).to(DEVICE), layout


def addresses_of(slots: Tensor, where: dict[int, int]) -> Tensor:
    """Expert → slot."""
    start, stride = slots.data_ptr(), slots.stride(0)
    return torch.tensor([start + where[e] * stride if e in where else 0 for e in range(EXPERTS)], device=DEVICE)


def scaled(tokens: int, layout: SlotLayout, dtype: torch.dtype) -> Tensor:
    """Gates of about 1 to 15; less for float16, whose results would overflow where weights are not small."""
    overflows = dtype == torch.float16 and not layout.down.format.startswith(("IQ1", "IQ2"))
    return ((0.0015 if overflows else 0.05) * randn(tokens, layout.hidden)).to(dtype)


def run(x: Tensor, ids: Tensor, slots: Tensor, where: dict[int, int], layout: SlotLayout, out: Tensor,
        block: int | None = None, **tuning: fast.Tuning) -> None:  # fmt: skip
    tiles = fast.plan_tiles(ids, EXPERTS, x.dtype, block)
    fast.expert_mlp(x, ids, tiles, addresses_of(slots, where), layout, out, **tuning)


def check_experts(fmt: str, down: str, dtype: torch.dtype, stacked: bool = False) -> None:
    """Expert 1 is not in the set."""
    slots, layout = slots_of(fmt, down, stacked)
    x = scaled(len(IDS), layout, dtype)
    out = torch.full((IDS.numel(), layout.hidden), torch.nan, dtype=dtype, device=DEVICE)
    want = out.double()
    where = {0: 0, 3: 6}
    run(x, IDS, slots, where, layout, out)
    naive.expert_mlp(x, IDS, {e: slots[slot] for e, slot in where.items()}, layout, want)
    left = IDS.reshape(-1) == 1
    assert out[left].isnan().all()
    assert_close(f"{fmt} {down} {dtype}", out[~left], want[~left], RATIOS[dtype])


def check_unpacked(fmt: str, kind: str) -> None:
    """37 rows, with columns to spare between them; from a row on of a larger matrix."""
    cols = 512 if FORMATS[fmt].block > 32 else 160
    first = 128 if FORMATS[fmt].tiled else 5
    raw = random_matrix(fmt, first + 37, cols, kind=kind)[0]
    whole = matrix(fmt, first + 37, cols)
    buffer, form = rearrange_matrix(raw, whole).to(DEVICE), whole.rows_from(first, 37)
    for dtype in DTYPES:
        target = torch.full((37, cols + 32), torch.nan, dtype=dtype, device=DEVICE)
        dequantise_into(buffer, form, target[:, :cols])
        want = dequantise(raw.to(DEVICE), fmt, first + 37, cols, torch.float32)[first:].to(dtype)
        assert torch.equal(target[:, :cols], want), dtype
        assert target[:, cols:].isnan().all()
        naive.dequantise_into(buffer, form, target[:, :cols])
        assert torch.equal(target[:, :cols], want)
