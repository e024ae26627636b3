"""The attention kernels through Triton's interpreter (or on the GPU that is there), against their naive twins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import kv as naive_kv
from offmoe.kernels.attention import attention
from offmoe.kernels.norm_rope import rms_norm, rope
from offmoe.kernels.rope import AttentionTemperature, rope_table
from offmoe.kernels.striped import unstripe

pytest.importorskip("triton")
from offmoe.kernels.gpu import attention as fast
from offmoe.kernels.gpu import norm_rope as fast_norm
from offmoe.kernels.gpu.prefill import prefill_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16, F32 = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A shape; norm: none, head, after (of rotated heads) or full."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int = 0  # values of a head that are rotated; 0: all
    norm: str = "head"
    clip: float | None = None
    dtype: torch.dtype = F32
    ctx: int = 64
    int8: bool = False
    eps: float = 1e-5
    scale: float | None = None
    window: int = 0
    room: int = 0  # positions that the cache holds; 0: all
    sinks: bool = False
    chunked: bool = False
    value_norm: bool = False  # each head's value over its RMS
    temperature: bool = False  # queries are multiplied, by position

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        if self.norm == "none":
            return None, None
        sizes = (
            (self.dim, self.dim)
            if self.norm in ("head", "after")
            else (self.heads * self.dim, self.kv_heads * self.dim)
        )
        q, k = (1 + 0.3 * randn(size, seed=90 + i) for i, size in enumerate(sizes))
        return q, k

    def sink_logits(self) -> Tensor | None:
        """Sinks as large as scores: in some heads they take most of the attention."""
        return 3 * randn(self.heads, seed=77) if self.sinks else None

    def temperatures(self) -> Tensor | None:
        return AttentionTemperature(5, 0.5).table(self.ctx, DEVICE) if self.temperature else None

    def ring(self, cache: Tensor | None, filled: int) -> Tensor | None:
        """[…, ctx, …] → what is left of it in a ring, on its third dimension or its second."""
        if cache is None or not self.room:
            return cache
        dim = cache.ndim - 2 if cache.shape[-1] == self.dim else cache.ndim - 1
        positions = torch.arange(self.room, device=DEVICE)
        newest = positions + (filled - 1 - positions).clamp(min=0) // self.room * self.room  # that lies there
        return cache.index_select(dim, newest).contiguous()

    def cache(self, filled: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and scales; what is not filled holds NaN, in int8 the scales do."""
        keys, values = (randn(self.kv_heads, self.ctx, self.dim, seed=s) for s in (1, 2))
        if self.int8:
            (keys, k_scales), (values, v_scales) = naive_kv.quantise(keys), naive_kv.quantise(values)
            scales = torch.stack((k_scales, v_scales))
            scales[:, :, filled:] = torch.nan
            return keys, values, scales
        keys[:, filled:], values[:, filled:] = torch.nan, torch.nan
        return keys.to(self.dtype), values.to(self.dtype), None


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def naive_qkv(case: Case, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As Trunk.attend does it, in float32: q [T, heads, D]; k and v [T, kv_heads, D]."""
    q, k, v = qkv.float().split((case.heads * case.dim, case.kv_heads * case.dim, case.kv_heads * case.dim), -1)
    table = rope_table(case.ctx, case.rotary or case.dim, 1e4, DEVICE)
    if case.value_norm:
        v = rms_norm(v.unflatten(-1, (-1, case.dim)), None, case.eps).flatten(-2)
    if case.norm == "after":
        q, k = (rope(x.unflatten(-1, (-1, case.dim)), table, positions) for x in (q, k))
        q, k = (rms_norm(x, w, case.eps) for x, w in zip((q, k), case.norms(), strict=True))
        return q, k, v.unflatten(-1, (-1, case.dim))
    q, k = (
        x if w is None else rms_norm(x.unflatten(-1, (-1, w.numel())), w, case.eps).flatten(1)
        for x, w in zip((q, k), case.norms(), strict=True)
    )
    if case.clip:
        q, k, v = (t.clamp(-case.clip, case.clip) for t in (q, k, v))
    q, k = (rope(x.unflatten(-1, (-1, case.dim)), table, positions) for x in (q, k))
    return q, k, v.unflatten(-1, (-1, case.dim))


def stored(case: Case, x: Tensor) -> Tensor:
    """x after its way through the cache, in float32."""
    return naive_kv.dequantise(*naive_kv.quantise(x), F32) if case.int8 else x.to(case.dtype).float()


def contents(keys: Tensor, scales: Tensor | None) -> Tensor:
    return keys.float() if scales is None else naive_kv.dequantise(keys, scales, F32)


def expected(case: Case, qkv: Tensor, here: int) -> tuple[Tensor, Tensor, Tensor]:
    """mixed [heads · D], and the new k and v as they should lie in the cache."""
    keys, values, scales = case.cache(here)
    positions = torch.tensor([here], device=DEVICE)
    q, k, v = naive_qkv(case, qkv[None], positions)
    q = q if (temperatures := case.temperatures()) is None else q * temperatures[here]
    keys, values = (contents(x, None if scales is None else scales[i]) for i, x in enumerate((keys, values)))
    k, v = stored(case, k[0]), stored(case, v[0])
    keys[:, here], values[:, here] = k, v
    keys, values = keys[:, : here + 1], values[:, : here + 1]
    return attention(q, keys, values, positions, case.window, case.sink_logits(), case.scale,
                     case.chunked).flatten(), k, v  # fmt: skip


def decode(case: Case, qkv: Tensor, here: int, splits: int, split_size: int, **options: Any) -> tuple[Tensor, ...]:
    keys, values, scales = (case.ring(x, here) for x in case.cache(here))
    assert keys is not None
    assert values is not None
    mixed = torch.full((case.heads * case.dim,), torch.nan, device=DEVICE)
    partial = torch.full((fast.partial_size(case.heads, case.dim, splits),), torch.nan, device=DEVICE)
    tickets = torch.zeros(case.kv_heads, dtype=torch.int32, device=DEVICE)
    q_norm, k_norm = case.norms()
    fast.decode_attention(
        qkv, keys, values, torch.tensor([here], device=DEVICE), rope_table(case.ctx, case.rotary or case.dim, 1e4,
        DEVICE), mixed, partial, tickets, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.dim,
        q_norm=q_norm, k_norm=k_norm, norm_full=case.norm == "full", norm_after=case.norm == "after",
        clip=case.clip, eps=case.eps, scale=case.scale,
        splits=splits, split_size=split_size, scales=scales, window=case.window, chunked=case.chunked,
        sinks=case.sink_logits(), temperature=case.temperatures(), value_norm=case.value_norm, **options,
    )  # fmt: skip
    assert not tickets.any(), "tickets are not back at 0"
    spot = here % keys.shape[1]
    k, v = (contents(x, None if scales is None else scales[i])[:, spot] for i, x in enumerate((keys, values)))
    return unstripe(mixed), k, v


CASES = {
    "plain f32": Case(norm="none"),
    "head norm f16": Case(dtype=F16),
    "full norm, clip, no groups": Case(heads=4, kv_heads=4, norm="full", clip=0.9),
    "odd width": Case(heads=3, kv_heads=1, dim=20, dtype=F16),
    "large group": Case(heads=20, kv_heads=1, norm="full"),
    "half of a head rotated": Case(rotary=8),
    "full norm, rotary of an odd width": Case(heads=3, kv_heads=1, dim=20, rotary=12, norm="full", dtype=F16),
    "norm after rotation, scaled": Case(norm="after", rotary=8, scale=0.5),
    "sinks": Case(sinks=True, norm="none"),
    "window": Case(window=9),
    "window and sinks in a ring": Case(window=9, room=48, sinks=True, norm="none", ctx=200),
    "ring of int8": Case(window=30, room=48, int8=True, ctx=200),
    "window as wide as its ring": Case(window=32, room=32, sinks=True, dtype=F16, ctx=200),
    "chunk": Case(window=9, chunked=True),
    "chunk in a ring, with temperature": Case(window=30, room=48, chunked=True, temperature=True, norm="none", ctx=200),
    "values normed, unscaled": Case(value_norm=True, scale=1.0, window=9),
    "values normed, unscaled, int8": Case(value_norm=True, scale=1.0, kv_heads=1, dim=32, int8=True),
    "int8": Case(int8=True),
    "int8, clip": Case(int8=True, norm="none", clip=0.5, heads=2, kv_heads=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("here", "splits"), [(0, 1), (7, 1), (16, 4), (45, 2), (63, 4), (129, 2)])
def test_one_token_is_the_twins(name: str, here: int, splits: int) -> None:
    case = CASES[name]
    here = min(here, case.ctx - 1)
    qkv = randn(case.width, seed=here)
    got = decode(case, qkv, here, splits, 16, block=16)
    ratio = 2e-3 if case.dtype == F16 or (case.int8 and DEVICE.type == "cpu") else 5e-3 if case.int8 else 1e-5
    for part, mine, want in zip(("mixed", "k", "v"), got, expected(case, qkv, here), strict=True):
        assert_close(f"{name}: {part} at {here}", mine, want, ratio)


def test_a_long_context_is_divided_on_the_device() -> None:
    """3 splits of at least 16 serve 64 positions: the device makes them 32 long."""
    case = Case()
    qkv = randn(case.width, seed=5)
    got, _, _ = decode(case, qkv, 63, 3, 16, block=16)
    assert_close("mixed", got, expected(case, qkv, 63)[0], 1e-5)


@pytest.mark.parametrize(("here", "splits"), [(7, 1), (45, 4)])
def test_heads_are_gated(here: int, splits: int) -> None:
    """In the last program where several share a head."""
    case = CASES["odd width"]
    qkv, gate = randn(case.width, seed=here), randn(case.heads * case.dim, seed=6)
    got, k, _ = decode(case, qkv, here, splits, 16, block=16, gate=gate)
    mixed, k_want, _ = expected(case, qkv, here)
    assert_close("mixed", got, mixed * gate.sigmoid(), 2e-3)
    assert_close("k", k, k_want, 2e-3)


def test_nothing_is_written_behind_the_context() -> None:
    """At position ctx (a step launched past the end) no other head's first row is overwritten."""
    case = Case(ctx=16)
    keys, values, _ = case.cache(16)
    before = keys.clone(), values.clone()
    position = torch.tensor([16], device=DEVICE)
    mixed, partial = torch.empty(case.heads * case.dim, device=DEVICE), torch.empty(4096, device=DEVICE)
    q_norm, k_norm = case.norms()
    fast.decode_attention(
        randn(case.width, seed=1), keys, values, position, rope_table(16, case.dim, 1e4, DEVICE), mixed, partial,
        torch.zeros(2, dtype=torch.int32, device=DEVICE), heads=4, kv_heads=2, head_dim=16, q_norm=q_norm,
        k_norm=k_norm, norm_full=False, clip=None, eps=1e-5, splits=2, split_size=16, block=16,
    )  # fmt: skip
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("name", CASES)
def test_many_tokens_are_turned_and_written(name: str) -> None:
    case, positions = CASES[name], torch.tensor([3, 4, 5], device=DEVICE)
    qkv = randn(3, case.width, seed=8).to(F32 if case.int8 else case.dtype)
    keys, values, scales = case.cache(0)
    q_norm, k_norm = case.norms()
    got = fast_norm.norm_rope_write(
        qkv, keys, values, positions, rope_table(case.ctx, case.rotary or case.dim, 1e4, DEVICE), heads=case.heads,
        kv_heads=case.kv_heads, head_dim=case.dim, q_norm=q_norm, k_norm=k_norm, clip=case.clip, eps=case.eps,
        scales=scales, norm_after=case.norm == "after", value_norm=case.value_norm,
    )  # fmt: skip
    q, k, v = naive_qkv(case, qkv, positions)
    ratio = 1e-3 if case.dtype == F16 else 1e-5
    assert_close("q", got, q, ratio)
    for i, (label, cache, want) in enumerate((("k", keys, k), ("v", values, v))):
        mine = contents(cache, None if scales is None else scales[i])[:, positions].transpose(0, 1)
        assert_close(label, mine, stored(case, want), ratio if not case.int8 else 3e-3)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_rms_norm_is_the_twins(dtype: torch.dtype) -> None:
    x, weight = 3 * randn(3, 40, seed=1), 1 + randn(40, seed=2)
    out = torch.full((3, 40), torch.nan, dtype=dtype, device=DEVICE)
    assert_close("norm", fast_norm.rms_norm(x, weight, 1e-5, out), rms_norm(x, weight, 1e-5), 1e-3)
    x, bias = x + 5, randn(40, seed=3)
    assert_close("LayerNorm", fast_norm.rms_norm(x, weight, 1e-5, out, bias), rms_norm(x, weight, 1e-5, bias), 1e-3)


@pytest.mark.parametrize("start", [0, 1, 20])
@pytest.mark.parametrize("case", [
    Case(), replace(Case(), int8=True), replace(Case(), kv_heads=4), Case(sinks=True), Case(window=5),
    Case(window=5, chunked=True), Case(window=7, chunked=True, sinks=True, int8=True),
    Case(window=5, sinks=True, int8=True), Case(window=12, sinks=True, dtype=F16, dim=20, heads=3, kv_heads=1),
])  # fmt: skip
def test_a_chunk_is_the_twins(case: Case, start: int) -> None:
    q = randn(9, case.heads, case.dim, seed=4)
    keys, values, scales = case.cache(start + 9)
    sinks = case.sink_logits()
    q = q.to(F32 if case.int8 else case.dtype)
    got = prefill_attention(q, keys, values, start, scales, window=case.window, chunked=case.chunked, sinks=sinks)
    positions = start + torch.arange(9, device=DEVICE)
    keys, values = (contents(x, None if scales is None else scales[i]) for i, x in enumerate((keys, values)))
    keys, values = keys[:, : start + 9], values[:, : start + 9]
    want = attention(q.float(), keys, values, positions, case.window, sinks, chunked=case.chunked)
    assert_close("mixed", got, want, 2e-3 if q.dtype == F16 else 1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_a_chunk_is_written_where_it_is_kept(int8: bool) -> None:
    """Positions are rotated by what they are and lie by what comes before them."""
    case, positions = Case(int8=int8), torch.tensor([30, 31, 32], device=DEVICE)
    qkv = randn(3, case.width, seed=8)
    keys, values, scales = (None if x is None else x[..., :7, :] if x.shape[-1] == case.dim else x[..., :7]
                            for x in case.cache(0))  # fmt: skip
    assert keys is not None
    assert values is not None
    q_norm, k_norm = case.norms()
    keys, values = keys.contiguous(), values.contiguous()
    scales = None if scales is None else scales.contiguous()
    fast_norm.norm_rope_write(
        qkv, keys, values, positions, rope_table(case.ctx, case.dim, 1e4, DEVICE), heads=case.heads,
        kv_heads=case.kv_heads, head_dim=case.dim, q_norm=q_norm, k_norm=k_norm, clip=None, eps=case.eps,
        scales=scales, first=27,
    )  # fmt: skip
    _, k, v = naive_qkv(case, qkv, positions)
    for i, (label, cache, want) in enumerate((("k", keys, k), ("v", values, v))):
        mine = contents(cache, None if scales is None else scales[i])[:, positions - 27].transpose(0, 1)
        assert_close(label, mine, stored(case, want), 3e-3 if int8 else 1e-5)


def test_splits_cover_a_bucket_with_a_program_a_multiprocessor() -> None:
    assert fast.pick_splits(256, 4) == (1, 256)
    assert fast.pick_splits(1024, 4) == (4, 256)
    assert fast.pick_splits(32768, 4) == (32, 256)
    assert fast.pick_splits(32768, 200) == (1, 256)
