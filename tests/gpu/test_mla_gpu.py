"""Latent attention on a GPU at real shapes, against its naive twins; captured, replayed, and to the bit again."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels.gpu import mla as fast
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.prefill import prefill_attention
from offmoe.kernels.mla import Latent, latent_attention
from offmoe.kernels.planes import Matrix, matrix, rearrange_matrix
from offmoe.kernels.rope import rope_table
from offmoe.kernels.striped import stripe, unstripe
from offmoe.mixers.latent.rows import positioned

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "DeepSeek-V2-Lite": (16, Latent(0, 512, 128, 64, 128)),
    "GLM-4.7-Flash": (20, Latent(768, 512, 192, 64, 256)),
    "DeepSeek-V3": (128, Latent(1536, 512, 128, 64, 128)),
}
RATIO = {BF16: 1e-2, F16: 2e-3, F32: 1e-5}


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def part(weight: Tensor) -> tuple[Tensor, Matrix]:
    """[heads, rows, cols] in slot layout, in its own type."""
    form = matrix(
        {BF16: "BF16", F16: "F16", F32: "F32"}[weight.dtype], weight.shape[0] * weight.shape[1], weight.shape[2]
    )
    return rearrange_matrix(weight.contiguous().view(torch.uint8).flatten(), form), form


class Layer:
    """Weights and cache of one layer, its context full of noise; buffers hold NaN."""

    def __init__(self, name: str, ctx: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.heads, self.z = SHAPES[name]
        z, heads, device = self.z, self.heads, torch.device("cuda", torch.cuda.current_device())
        self.dtype, self.ctx = dtype, ctx
        self.k_b = randn(heads, z.kv_rank, z.qk_nope, dtype=dtype) / z.qk_nope**0.5
        self.v_b = randn(heads, z.value, z.kv_rank, dtype=dtype) / z.kv_rank**0.5
        self.parts = part(self.k_b), part(self.v_b)
        self.norm, self.table = 1 + 0.3 * randn(z.kv_rank), rope_table(ctx, z.qk_rope, 1e4, device)
        self.cache = randn(ctx, z.width, dtype=dtype)
        self.query, self.fresh = randn(1, heads * z.key), 2 * randn(1, z.width)
        self.position = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.splits, self.least = fast.pick_splits(
            ctx, heads, torch.cuda.get_device_properties(0).multi_processor_count
        )
        self.given = self.striped()
        nan = lambda n: torch.full((n,), torch.nan, device="cuda")  # noqa: E731
        self.mixed, self.absorbed = nan(heads * z.value), nan(heads * z.kv_rank)
        self.partial = nan(fast.partial_size(heads, z, self.splits, device))

    def striped(self) -> Tensor:
        plain = self.heads * self.z.qk_nope
        return torch.cat((stripe(self.query[0, :plain]), self.query[0, plain:])).contiguous()

    def decode(self, pdl: bool = False) -> None:
        fast.decode_latents(
            self.given, self.fresh[0], self.cache, self.position, self.table, self.norm, *self.parts, self.mixed,
            self.absorbed, self.partial, heads=self.heads, latent=self.z, scale=self.z.key**-0.5, splits=self.splits,
            split_size=self.least, pdl=pdl,
        )  # fmt: skip

    def expected(self) -> Tensor:
        """From what the kernel left in the cache, whose new row is checked by itself."""
        here = int(self.position)
        qk_nope, qk_rope, row = positioned(
            self.query, self.fresh, self.norm, self.table, self.position.long(), self.heads, self.z
        )
        assert_close("the new row", self.cache[here : here + 1], row, RATIO[self.dtype])
        return latent_attention(
            qk_nope, qk_rope, self.cache[: here + 1].float(), self.k_b.float(), self.v_b.float(), self.position.long(),
            self.z.key**-0.5,
        ).flatten()  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("here", [0, 5, 127, 128, 1000, 4095])
def test_one_token_is_the_twins(name: str, dtype: torch.dtype, here: int) -> None:
    layer = Layer(name, 4096, dtype)
    layer.position.fill_(here)
    layer.decode()
    assert_close(f"{name} at {here}", unstripe(layer.mixed), layer.expected(), RATIO[dtype])


def test_32k_and_the_same_bits_every_time() -> None:
    layer = Layer("DeepSeek-V2-Lite", 32768, BF16)
    for here in (32767, 20_000, 300):
        layer.position.fill_(here)
        layer.decode()
        first = layer.mixed.clone()
        assert_close(f"mixed at {here}", unstripe(first), layer.expected(), RATIO[BF16])
        for _ in range(20):
            layer.mixed.fill_(torch.nan)
            layer.decode()
            assert torch.equal(layer.mixed, first), "the order of programs shows in the result"


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_follows_the_position_on_the_device(name: str) -> None:
    pdl = pdl_supported(torch.device("cuda", torch.cuda.current_device()))
    layer = Layer(name, 4096, BF16)
    layer.decode(pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.decode(pdl)
    for here in (0, 63, 128, 700, 4095):
        layer.position.fill_(here)
        layer.query.normal_()
        layer.given.copy_(layer.striped())
        graph.replay()
        assert_close(f"mixed at {here}", unstripe(layer.mixed), layer.expected(), RATIO[BF16])


def test_nothing_is_written_behind_the_context() -> None:
    layer = Layer("DeepSeek-V2-Lite", 512, BF16)
    before = layer.cache.clone()
    layer.position.fill_(512)
    layer.decode()
    assert torch.equal(layer.cache, before)


@pytest.mark.parametrize("wide", [192, 256])
def test_a_chunk_of_padded_values_makes_no_scores(wide: int) -> None:
    """Keys of 192 or 256 values, expanded for 16 heads: torch's own kernels take them with a scale of ours."""
    q, keys, values = (
        randn(1024, 16, wide, dtype=BF16),
        randn(16, 8192, wide, dtype=BF16),
        randn(16, 8192, wide, dtype=BF16),
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = prefill_attention(q, keys, values, 8192 - 1024, scale=0.05)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 120 << 20  # the scores of 16 heads would be 268 MB in bfloat16
    scores = torch.einsum("thd,hsd->hts", q[-1:].float(), keys.float()) * 0.05
    want = torch.einsum("hts,hsd->thd", scores.softmax(-1), values.float())
    assert_close("the last row", got[-1:], want, RATIO[BF16])
