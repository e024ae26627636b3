"""Products and page_in on the card: real shapes, all formats, early starts in a graph, records out of pinned RAM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_tensors import DEVICE, ints, nan, randn
from quantised_matrices import EXTREMES, TESTED, filled_slots, random_matrix, random_records
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import experts as naive_experts
from offmoe.kernels import gemv as naive
from offmoe.kernels.gpu import experts
from offmoe.kernels.gpu import gemv as fast
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.planes import Matrix, SlotLayout, matrix, rearrange, rearrange_matrix, slot_layout, unplane
from offmoe.kernels.record import RecordLayout

RATIO = 3e-6  # interpreted, rows of 2,048 and 14,336 weights are within 8e-7 in every format
LAYERS, REPLAYS = 8, 50
SLOTS = 6  # 1 and 4 hold NaN
# hidden, inner: Qwen3-30B-A3B, gpt-oss-20b, OLMoE, and rows as long as Mixtral's
SHAPES = {"MXFP4": (2880, 2880), "Q8_0": (2048, 1024), "Q6_K": (1024, 14336), "Q4_0": (2880, 768)}
QWEN3 = (2048, 768)
QKV = (4096, 512, 509)  # rows, the last no whole number of programs


def record_of(fmt: str, down: str | None = None) -> RecordLayout:
    h, f = SHAPES.get(fmt, QWEN3)
    return RecordLayout.of(("gate", fmt, f, h), ("up", fmt, f, h), ("down", down or fmt, h, f))


def slots_of(fmt: str, kind: str = "normal") -> tuple[Tensor, SlotLayout]:
    record = record_of(fmt)
    layout = slot_layout(record)
    return filled_slots(random_records(record, 4, kind), layout, [0, 2, 3, 5], SLOTS).to(DEVICE), layout


def part(fmt: str, rows: int, cols: int, kind: str = "normal", seed: int = 0) -> tuple[Tensor, Matrix]:
    form = matrix(fmt, rows, cols)
    return rearrange_matrix(random_matrix(fmt, rows, cols, kind=kind, seed=seed)[0], form).to(DEVICE), form


def chosen(pairs: int) -> Tensor:
    """Slots that are filled, in no order, some twice."""
    return ints(*([5, 0, 3, 2, 3, 0, 2, 5] * 8)[:pairs])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fmt", TESTED)
def test_experts(fmt: str, tokens: int) -> None:
    records, layout = slots_of(fmt)
    slots, x = chosen(4 * tokens), 0.02 * randn(tokens, layout.hidden)
    weights, out = randn(len(slots), seed=3).abs(), nan(len(slots), layout.expert_hidden)
    want = out.double()
    experts.expert_gate_up(records, layout, slots, weights, x, out)
    naive_experts.expert_gate_up(records, layout, slots, weights, x, want)
    assert_close("gate_up", out, want, RATIO)
    inner, y = randn(*out.shape, seed=2), randn(*x.shape, seed=4)
    summed = y.double()
    experts.expert_down(records, layout, slots, inner, y)
    naive_experts.expert_down(records, layout, slots, inner, summed)
    assert_close("down", y, summed, RATIO)


@pytest.mark.parametrize("fmt", TESTED)
def test_movers_multiply_what_they_bring(fmt: str) -> None:
    """Captured, from pinned RAM, any number of misses: bit for bit what resident records give, and they stay."""
    records, layout = slots_of(fmt)
    record = record_of(fmt, fmt)
    rows = torch.zeros((6, -(-record.nbytes // 256) * 256), dtype=torch.uint8)
    rows[:, : record.nbytes] = random_records(record, 6, "normal")
    rows = rows.pin_memory()
    want = records.clone()
    want[:, : layout.nbytes] = rearrange(rows.to(DEVICE), layout)[:SLOTS]
    slots, weights, x = ints(5, 1, 0, 4), randn(4, seed=3).abs(), 0.02 * randn(1, layout.hidden)
    out, whole = nan(4, layout.expert_hidden), nan(4, layout.expert_hidden)
    count, listed, to = ints(0), ints(0, 0, 0, 0), ints(0, 0, 0, 0)
    copies = Copies(count, to, experts.movers_scratch([layout], DEVICE), None, listed, rows.data_ptr(), rows.stride(0))
    y, summed, pdl = randn(1, layout.hidden, seed=4), randn(1, layout.hidden, seed=4), pdl_supported(DEVICE)

    def launch() -> None:  # down starts early: what movers still bring it must not read
        experts.expert_gate_up(records, layout, slots, weights, x, out, copies=copies, pdl=pdl)
        experts.expert_down(records, layout, slots, out, y, count=count, pdl=pdl)

    replay = captured(launch)
    experts.expert_gate_up(want, layout, slots, weights, x, whole)
    experts.expert_down(want, layout, slots, whole, summed)
    before = randn(1, layout.hidden, seed=4)
    for missing in ([1, 5, 0, 4], [4], [], [0, 1]):
        records.copy_(want)
        records[missing] = 0xFF
        count.fill_(len(missing))
        listed[: len(missing)] = to[: len(missing)] = ints(*missing)
        out.fill_(torch.nan)
        y.copy_(before)
        replay()
        assert torch.equal(out, whole)
        assert torch.equal(y, summed)
        for form in (layout.gate, layout.up, layout.down):
            assert torch.equal(unplane(records, form), unplane(want, form))


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("fmt", TESTED)
def test_extreme_blocks(fmt: str, kind: str) -> None:
    """A card that flushed subnormals would turn every code into 0."""
    buffer, form = part(fmt, 33, 2048, kind)
    x, out = 1 + 0.1 * randn(1, 2048), nan(1, 33)
    want = out.double()
    fast.dense(x, [(buffer, form)], out)
    naive.dense(x, [(buffer, form)], want)
    if kind == "zero":
        assert (out == 0).all()
    else:
        assert want.abs().min() > 0
        # Q8_0's -1 is 127 - 128 there: what is left of two large sums
        assert_close(f"{fmt} {kind}", out, want, 2e-5 if (fmt, kind) == ("Q8_0", "ones") else RATIO)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(
    "formats",
    [
        ("Q4_K", "Q4_K", "Q6_K"),
        ("Q8_0", "BF16", "F16"),
        ("Q5_K", "Q5_0", "Q4_1"),
        ("INT4_128_F16_ZEROS", "INT4_32_BF16", "BF16"),
        ("NVFP4", "F8_E4M3_ROW", "MXFP4_PAIRS"),
    ],
)
def test_qkv_with_norm(formats: tuple[str, ...], tokens: int) -> None:
    parts = [part(fmt, rows, 2048, seed=rows) for fmt, rows in zip(formats, QKV, strict=True)]
    x, norm, out = 30 * randn(tokens, 2048), randn(2048, seed=5), nan(tokens, sum(QKV))
    want = out.double()
    fast.dense(x, parts, out, norm=norm, eps=1e-6)
    naive.dense(x, parts, want, norm=norm, eps=1e-6)
    assert_close("qkv", out, want, RATIO)


@pytest.mark.parametrize(("fmt", "rows", "cols"), [("Q4_K", 2048, 4096), ("Q6_K", 32001, 2048), ("MXFP4", 2880, 4096)])
def test_one_matrix(fmt: str, rows: int, cols: int) -> None:
    """An output projection, on top of what is there, and a head."""
    form, x, out = part(fmt, rows, cols), randn(1, cols), randn(1, rows, seed=6)
    want = out.double()
    fast.dense(x, [form], out, residual=True)
    naive.dense(x, [form], want, residual=True)
    assert_close("out", out, want, RATIO)


def captured(launch: Callable[[], None]) -> Callable[[], None]:
    """What replays it; it ran once before, so that nothing is compiled meanwhile."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


class Layer:
    """What one layer multiplies, on buffers of its own; `x` carries over: 10 at first, a layer adds 10.

    Of Q8_0, whose codes are as often below 0 as above: else all gates of random weights close.
    """

    def __init__(self) -> None:
        self.records, self.layout = slots_of("Q8_0")
        h, f = SHAPES["Q8_0"]
        self.qkv, self.o, self.gate = part("Q8_0", 2 * h, h), part("Q8_0", h, 2 * h, seed=1), part("Q8_0", h, h)
        self.norm, self.slots, self.weights = 1e-4 * randn(h, seed=2), chosen(8), 1e-3 * randn(8, seed=3).abs()
        self.x, self.mixed, self.normed, self.inner = nan(1, h), nan(1, 2 * h), nan(1, h), nan(8, f)

    def launch(self, pdl: bool) -> None:
        fast.dense(self.x, [self.qkv], self.mixed, norm=self.norm, eps=1e-6, pdl=pdl)
        fast.dense(self.mixed, [self.o], self.x, residual=True, pdl=pdl)
        fast.dense(self.x, [self.gate], self.normed, norm=self.norm, eps=1e-6, pdl=pdl)
        experts.expert_gate_up(self.records, self.layout, self.slots, self.weights, self.normed, self.inner, pdl=pdl)
        experts.expert_down(self.records, self.layout, self.slots, self.inner, self.x, pdl=pdl)


@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_ends_as_launches_in_turn_do(pdl: bool) -> None:
    """Bit for bit: a kernel that starts early reads nothing that is not written yet."""
    if pdl and not pdl_supported(DEVICE):
        pytest.skip("no programmatic dependent launch on this card")
    layer, start = Layer(), 10 * randn(1, SHAPES["Q8_0"][0])
    layer.x.copy_(start)
    for _ in range(LAYERS):
        layer.launch(False)
        torch.cuda.synchronize()
    want = layer.x.clone()
    assert want.isfinite().all()
    assert layer.inner.abs().mean() > 0.1 * layer.weights.mean()
    replay = captured(lambda: [layer.launch(pdl) for _ in range(LAYERS)])
    for _ in range(REPLAYS):
        layer.x.copy_(start)
        for buffer in (layer.mixed, layer.normed, layer.inner):
            buffer.fill_(torch.nan)
        replay()
        assert torch.equal(layer.x, want)


@pytest.mark.parametrize("addressed", [False, True])
@pytest.mark.parametrize(("fmt", "down"), [("Q4_K", "Q6_K"), ("MXFP4", "MXFP4"), ("NVFP4", "Q8_0"), ("BF16", "Q5_0")])
def test_records_arrive_whole(fmt: str, down: str, addressed: bool) -> None:
    """From pinned RAM or VRAM, captured, again and again over other slots; a count of 0 changes nothing."""
    record = record_of(fmt, down)
    layout, stride = slot_layout(record), -(-record.nbytes // 256) * 256
    size = -(-layout.nbytes // 256) * 256
    rows = torch.randint(0, 256, (6, stride), dtype=torch.uint8)
    rows = rows.to(DEVICE) if addressed else rows.pin_memory()
    want = rearrange(rows.to(DEVICE), layout)
    target, landed, progress = (torch.zeros(shape, dtype=kind, device=DEVICE) for shape, kind in (
        ((8, size), torch.uint8), ((8,), torch.int32), ((8,), torch.int32)))  # fmt: skip
    records, slots, count, scratch = ints(0, 0, 0), ints(0, 0, 0), ints(0), scratch_for(DEVICE)
    sources = torch.zeros(3, dtype=torch.int64, device=DEVICE) if addressed else None

    def launch() -> None:
        copies = Copies(count, slots, scratch, sources, records, rows.data_ptr(), stride)
        page_in(copies, target, layout, landed=landed, progress=progress)

    replay = captured(launch)
    for step, n in enumerate((3, 1, 0, 2, 3)):
        wanted, places = [(step + 2 * i) % 6 for i in range(3)], [(3 * step + i) % 8 for i in range(3)]
        records.copy_(ints(*wanted))
        slots.copy_(ints(*places))
        count.fill_(n)
        if sources is not None:
            sources.copy_(rows.data_ptr() + records.long() * stride)
        target.fill_(0xFF)
        landed.zero_()
        replay()
        torch.cuda.synchronize()
        for i, slot in enumerate(places[:n]):
            for form in (layout.gate, layout.up, layout.down):
                assert torch.equal(unplane(target[slot][None], form), unplane(want[wanted[i]][None], form))
        others = [slot for slot in range(8) if slot not in places[:n]]
        assert (target[others] == 0xFF).all()
        assert landed.nonzero().flatten().tolist() == sorted(places[:n])
        assert not progress.any()
