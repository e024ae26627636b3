"""Attention on a real GPU at real shapes: bfloat16, 32K positions, int8, inside graphs and with dependent launches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import kv as naive_kv
from offmoe.kernels.attention import attention
from offmoe.kernels.gpu import attention as fast
from offmoe.kernels.gpu import norm_rope as fast_norm
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.prefill import prefill_attention
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.kernels.rope import rope_table
from offmoe.kernels.striped import unstripe

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """A model's attention; norm: none, head or full."""

    heads: int
    kv_heads: int
    dim: int
    norm: str = "none"
    clip: float | None = None

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        if self.norm == "none":
            return None, None
        counts = (1, 1) if self.norm == "head" else (self.heads, self.kv_heads)
        return 1 + 0.2 * randn(counts[0] * self.dim), 1 + 0.2 * randn(counts[1] * self.dim)


SHAPES = {
    "qwen3-30b-a3b": Shape(32, 4, 128, "head"),
    "olmoe": Shape(16, 16, 128, "full", clip=2.0),
    "mixtral-8x7b": Shape(32, 8, 128),
    "gpt-oss": Shape(64, 8, 64),
    "wide": Shape(16, 8, 256, "head"),
    "odd": Shape(24, 8, 80),
}


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


class Layer:
    """A cache full of random keys and values, and all that a launch needs."""

    def __init__(self, shape: Shape, ctx: int, dtype: torch.dtype, int8: bool, splits: tuple[int, int]) -> None:
        torch.manual_seed(3)
        self.shape, self.ctx, self.int8 = shape, ctx, int8
        self.keys, self.values = (randn(shape.kv_heads, ctx, shape.dim, dtype=dtype) for _ in range(2))
        self.scales: Tensor | None = None
        if int8:
            (self.keys, k), (self.values, v) = naive_kv.quantise(self.keys), naive_kv.quantise(self.values)
            self.scales = torch.stack((k, v))
        self.q_norm, self.k_norm = shape.norms()
        self.table = rope_table(ctx, shape.dim, 1e6, torch.device("cuda"))
        self.qkv = randn(shape.width)
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.mixed = torch.full((shape.heads * shape.dim,), torch.nan, device="cuda")
        self.splits, self.split_size = splits
        size = fast.partial_size(shape.heads, shape.dim, self.splits)
        self.partial = torch.full((size,), torch.nan, device="cuda")
        self.tickets = torch.zeros(shape.kv_heads, dtype=torch.int32, device="cuda")

    def decode(self, pdl: bool = False) -> None:
        s = self.shape
        fast.decode_attention(
            self.qkv, self.keys, self.values, self.position, self.table, self.mixed, self.partial, self.tickets,
            heads=s.heads, kv_heads=s.kv_heads, head_dim=s.dim, q_norm=self.q_norm, k_norm=self.k_norm,
            norm_full=s.norm == "full", clip=s.clip, eps=EPS, splits=self.splits, split_size=self.split_size,
            scales=self.scales, pdl=pdl,
        )  # fmt: skip

    def contents(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values up to `end` in float32, as they lie in the cache."""
        keys, values = self.keys[:, :end], self.values[:, :end]
        if self.scales is None:
            return keys.float(), values.float()
        return tuple(naive_kv.dequantise(x, self.scales[i, :, :end], F32) for i, x in enumerate((keys, values)))

    def rotated(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, D], k and v [T, kv_heads, D] in float32, naively."""
        s = self.shape
        q, k, v = qkv.float().split((s.heads * s.dim, s.kv_heads * s.dim, s.kv_heads * s.dim), -1)
        q, k = (
            x if w is None else rms_norm(x.unflatten(-1, (-1, w.numel())), w, EPS).flatten(1)
            for x, w in ((q, self.q_norm), (k, self.k_norm))
        )
        if s.clip:
            q, k, v = (t.clamp(-s.clip, s.clip) for t in (q, k, v))
        q, k = (rope(x.unflatten(-1, (-1, s.dim)), self.table, positions) for x in (q, k))
        return q, k, v.unflatten(-1, (-1, s.dim))

    def expected(self) -> Tensor:
        """From what the kernel left in the cache, whose new row is checked by itself."""
        here = int(self.position)
        q, k, v = self.rotated(self.qkv[None], self.position)
        keys, values = self.contents(here + 1)
        ratio = 1e-2 if self.int8 else 4e-3
        assert_close("the new key", keys[:, here], k[0], ratio)
        assert_close("the new value", values[:, here], v[0], ratio)
        return attention(q, keys, values, self.position).flatten()


CASES = [(name, dtype, int8) for name in SHAPES for dtype, int8 in ((BF16, False), (F16, False), (BF16, True))]


@pytest.mark.parametrize(("name", "dtype", "int8"), CASES)
@pytest.mark.parametrize("here", [0, 5, 255, 256, 1000, 4095])
def test_one_token_is_the_twins(name: str, dtype: torch.dtype, int8: bool, here: int) -> None:
    shape = SHAPES[name]
    layer = Layer(shape, 4096, dtype, int8, fast.pick_splits(4096, shape.kv_heads))
    layer.position.fill_(here)
    layer.decode()
    want = layer.expected()
    assert_close(f"{name} at {here}", unstripe(layer.mixed), want, 2e-3 if dtype == F16 and not int8 else 8e-3)
    assert not layer.tickets.any()


def test_float32_is_exact() -> None:
    layer = Layer(SHAPES["qwen3-30b-a3b"], 1024, F32, False, (4, 256))
    layer.position.fill_(900)
    layer.decode()
    assert_close("mixed", unstripe(layer.mixed), layer.expected(), 1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_32k_and_the_same_bits_every_time(int8: bool) -> None:
    layer = Layer(SHAPES["qwen3-30b-a3b"], 32768, BF16, int8, fast.pick_splits(32768, 4))
    for here in (32767, 20_000, 300):
        layer.position.fill_(here)
        layer.decode()
        first = unstripe(layer.mixed).clone()
        assert_close(f"mixed at {here}", first, layer.expected(), 8e-3)
        for _ in range(20):
            layer.mixed.fill_(torch.nan)
            layer.decode()
            assert torch.equal(unstripe(layer.mixed), first), "the order of programs shows in the result"


def test_a_graph_follows_the_position_on_the_device() -> None:
    pdl = pdl_supported(torch.device("cuda", torch.cuda.current_device()))
    layer = Layer(SHAPES["qwen3-30b-a3b"], 4096, BF16, False, fast.pick_splits(4096, 4))
    layer.decode(pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.decode(pdl)
    for here in (0, 63, 64, 700, 4095):
        layer.position.fill_(here)
        layer.qkv.copy_(randn(layer.shape.width))
        graph.replay()
        assert_close(f"mixed at {here}", unstripe(layer.mixed), layer.expected(), 8e-3)


def test_nothing_is_written_behind_the_context() -> None:
    layer = Layer(SHAPES["mixtral-8x7b"], 512, BF16, False, (2, 256))
    before = layer.keys.clone(), layer.values.clone()
    layer.position.fill_(512)
    layer.decode()
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])


@pytest.mark.parametrize(("name", "dtype", "int8"), CASES)
def test_many_tokens_are_turned_and_written(name: str, dtype: torch.dtype, int8: bool) -> None:
    shape = SHAPES[name]
    layer = Layer(shape, 1024, dtype, int8, (1, 256))
    positions = 200 + torch.arange(300, device="cuda")
    qkv = randn(300, shape.width, dtype=dtype)
    q = fast_norm.norm_rope_write(
        qkv, layer.keys, layer.values, positions, layer.table, heads=shape.heads, kv_heads=shape.kv_heads,
        head_dim=shape.dim, q_norm=layer.q_norm, k_norm=layer.k_norm, clip=shape.clip, eps=EPS, scales=layer.scales,
    )  # fmt: skip
    keys, values = layer.contents(500)
    want = layer.rotated(qkv, positions)
    assert_close("q", q, want[0], 4e-3)
    assert_close("k", keys[:, 200:].transpose(0, 1), want[1], 1e-2 if int8 else 4e-3)
    assert_close("v", values[:, 200:].transpose(0, 1), want[2], 1e-2 if int8 else 4e-3)


@pytest.mark.parametrize(("name", "dtype", "int8"), CASES)
@pytest.mark.parametrize(("start", "count"), [(0, 300), (0, 1), (700, 300), (700, 1)])
def test_a_chunk_is_the_twins(name: str, dtype: torch.dtype, int8: bool, start: int, count: int) -> None:
    shape = SHAPES[name]
    layer = Layer(shape, 1024, dtype, int8, (1, 256))
    q = randn(count, shape.heads, shape.dim, dtype=dtype)
    got = prefill_attention(q, layer.keys, layer.values, start, layer.scales)
    keys, values = layer.contents(start + count)
    positions = start + torch.arange(count, device="cuda")
    assert_close("mixed", got, attention(q.float(), keys, values, positions), 1e-2)


def test_a_long_chunk_makes_no_mask() -> None:
    """4,096 queries over 32K positions: a mask alone would be 128 MB, the scores of one head 268 MB."""
    layer = Layer(SHAPES["qwen3-30b-a3b"], 32768, BF16, False, (1, 256))
    q = randn(4096, 32, 128, dtype=BF16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill_attention(q, layer.keys, layer.values, 32768 - 4096)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 120 << 20


@pytest.mark.parametrize("width", [40, 2048, 4096, 5120])
def test_rms_norm_is_the_twins(width: int) -> None:
    x, weight = 3 * randn(7, width), 1 + randn(width)
    out = torch.full((7, width), torch.nan, dtype=BF16, device="cuda")
    assert_close("norm", fast_norm.rms_norm(x, weight, EPS, out), rms_norm(x, weight, EPS), 4e-3)
