"""Compiles every kernel for real, with no GPU, and prints a line of JSON a kernel and capability.

`python -P compile_kernels.py 1 few 90`: in one process, one launch of each kernel for sm_90;
`python -P compile_kernels.py 2 all 80 86 89 90 120`: every launch below, in every weight format.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))  # after all others

import formula_policies
import kernel_compiler
from kernel_compiler import Job, Launch

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.decode.device_table import device_table
from offmoe.kernels.deltanet import Delta, DeltaWeights
from offmoe.kernels.feed_forward import Glu
from offmoe.kernels.formats import FORMATS, GGML
from offmoe.kernels.gpu import attention, gemm, sandwich
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.attention import decode_attention, partial_size
from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.kernels.gpu.embed import embed
from offmoe.kernels.gpu.experts import expert_down, expert_gate_up
from offmoe.kernels.gpu.foretell import foretell
from offmoe.kernels.gpu.formats.dot import UNIT
from offmoe.kernels.gpu.formats.unpack import dequantise_into
from offmoe.kernels.gpu.gemm import combine, expert_mlp, plan_tiles
from offmoe.kernels.gpu.gemv import Part, dense
from offmoe.kernels.gpu.mla import decode_latents, head_products
from offmoe.kernels.gpu.norm_rope import norm_rope_write, rms_norm
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.gpu.prefill import prefill_attention
from offmoe.kernels.gpu.request import request
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import predict, route
from offmoe.kernels.gpu.sample import FULL, GREEDY, TOPK, Scratch, sample_step
from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import SlotLayout, matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.ring import COUNTED
from offmoe.kernels.route import Rule
from offmoe.kernels.sandwich import Sandwich
from offmoe.kernels.shortconv import ConvWeights, ShortConv

CPU = torch.device("cpu")
H, F, LAYERS, EXPERTS, K = 2048, 768, 2, 128, 8
RULE = Rule(top_k=K, renormalise=True)
GROUPED = Rule("sigmoid", biased=True, groups=8, kept=4, group_best=2, top_k=K, top_p=0.9, renormalise=True, scale=2.5)


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def absent() -> Copies:
    return Copies(ints(1), ints(K), scratch_for(CPU, 16 << 20), None, ints(K), 1 << 40, 1 << 21)


def served() -> Copies:
    """Copies of records at addresses that the host has listed."""
    return Copies(ints(1), ints(K), scratch_for(CPU, 16 << 20), ints(K, dtype=torch.int64))


def slots_of(*parts: tuple[str, str, int, int]) -> tuple[torch.Tensor, SlotLayout]:
    layout = slot_layout(RecordLayout.of(*parts))
    return torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8), layout


def laid(fmt: str, rows: int, cols: int) -> Part:
    form = matrix(fmt, rows, cols)
    return ints(form.nbytes, dtype=torch.uint8), form


def one_format(fmt: str, pdl: bool) -> None:
    """Every kernel that has a weight format among its constants: movers and experts' products, a dense product, heads'
    products, an unpacked matrix, a prompt's products, a row of the embedding."""
    records, layout = slots_of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", fmt, H, F))
    expert_gate_up(records, layout, ints(K), floats(K), floats(1, H), floats(K, F), copies=absent(), pdl=pdl)
    expert_down(records, layout, ints(K), floats(K, F), floats(1, H), count=ints(1), pdl=pdl)
    page_in(absent(), records, layout, landed=ints(2), progress=ints(2), pdl=pdl)
    dense(floats(1, H), [laid(fmt, 512, H)], floats(1, 512), norm=floats(H), eps=1e-6, pdl=pdl)
    head_products(floats(8 * 512), laid(fmt, 8 * 128, 512), floats(8 * 128), 8, (33, 256, ints(1), 32), pdl)
    grouped(fmt, 128, torch.bfloat16)
    dequantise_into(*laid(fmt, 512, H), floats(512, H).bfloat16())
    if fmt in GGML:
        embed(ints(1), laid(fmt, 1024, H), floats(1, H), striped=True, pdl=pdl)


def variants(fmt: str, pdl: bool) -> None:
    """The other ways to launch what `one_format` does."""
    records, layout = slots_of(("gate_up", fmt, 2 * F, H), ("down", fmt, H, F))
    for copies in (served(), None):
        expert_gate_up(records, layout, ints(K), floats(K), floats(1, H), floats(K, F), copies=copies, pdl=pdl)
    expert_down(records, layout, ints(K), floats(K, F), floats(1, H), pdl=pdl)
    page_in(served(), records, layout, pdl=pdl)
    parts = [laid(fmt, rows, H) for rows in (256, 128, 128)]
    dense(floats(1, H), parts, floats(1, 512), norm=floats(H), eps=1e-6, bias=floats(512), pdl=pdl)
    dense(floats(1, H), parts, floats(1, 512), bias=floats(512), residual=True, pdl=pdl)
    if UNIT[fmt] == 32:  # of keys, whose rows are short
        head_products(floats(8 * 128), laid(fmt, 8 * 512, 128), floats(8 * 512), 8, None, pdl)
    for dtype in (torch.float32, torch.float16):
        grouped(fmt, 16, dtype)
        dequantise_into(*laid(fmt, 512, H), torch.zeros((512, H), dtype=dtype))
    if fmt in GGML:
        embed(ints(1, dtype=torch.int64), laid(fmt, 1024, H), floats(1, H), striped=False, pdl=pdl)


def grouped(fmt: str, block: int, dtype: torch.dtype) -> None:
    """A prompt's products in one format, for tiles of `block` pairs."""
    _, layout = slots_of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", fmt, H, F))
    x, ids = torch.zeros((64, H), dtype=dtype), ints(64, K, dtype=torch.int64)
    tiles = plan_tiles(ids, EXPERTS, dtype, block)
    expert_mlp(x, ids, tiles, ints(EXPERTS, dtype=torch.int64), layout, x.new_empty((ids.numel(), H)))


def arrangements(pdl: bool) -> None:
    """Movers of records that lie in other ways: stacked, in tiles that begin within a word, in two formats; and of
    records at addresses that the host has listed."""
    for h, f, parts in (
        (H, F, (("gate_up", "F8_E4M3", 2 * F, H), ("down", "F8_E4M3", H, F))),
        (384, 1024, (*((name, "F8_E4M3_BF16", 1024, 384) for name in ("gate", "up")), ("down", "Q4_0", 384, 1024))),
        (H, F, (("gate", "Q4_K", F, H), ("up", "Q5_0", F, H), ("down", "Q8_0", H, F))),
        (H, F, (("gate_up", "INT4_128_BF16", 2 * F, H), ("down", "INT4_32_F16_ZEROS", H, F))),
    ):
        records, layout = slots_of(*parts)
        for copies in (absent(), served()):
            expert_gate_up(records, layout, ints(K), floats(K), floats(1, h), floats(K, f), copies=copies, pdl=pdl)
        page_in(served(), records, layout, pdl=pdl)
    page_in(served(), records, pdl=pdl)  # as they lie


def products(fmt: str, pdl: bool) -> None:
    """The experts' two, and a dense one with a norm and a second part."""
    records, layout = slots_of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", fmt, H, F))
    expert_gate_up(records, layout, ints(K), floats(K), floats(1, H), floats(K, F), copies=absent(), pdl=pdl)
    expert_down(records, layout, ints(K), floats(K, F), floats(1, H), count=ints(1), pdl=pdl)
    parts = [(ints(form.nbytes, dtype=torch.uint8), form) for form in (matrix(fmt, 512, H), matrix("Q6_K", 512, H))]
    dense(floats(1, H), parts, floats(1, 1024), norm=floats(H), eps=1e-6, pdl=pdl)
    dense(floats(1, H), parts, floats(1, 1024), norm=floats(H), eps=1e-6, bias=floats(1024), pdl=pdl)
    dense(floats(1, H), parts, floats(1, 1024), bias=floats(1024), residual=True, pdl=pdl)


def mixtral(pdl: bool) -> None:
    """A row as long as that of four of Mixtral's experts: as many warps as a program may have."""
    layout = slot_layout(
        RecordLayout.of(
            *(
                (part, "Q6_K", *shape)
                for part, shape in (("gate", (14336, 1024)), ("up", (14336, 1024)), ("down", (1024, 14336)))
            )
        )
    )
    records = torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8)
    expert_down(records, layout, ints(4), floats(4, 14336), floats(1, 1024), pdl=pdl)


def gpt_oss(pdl: bool) -> None:
    """A layer at its real shape, but for what others have too."""
    h, experts, k, heads, kv_heads, dim, room = 2880, 32, 4, 64, 8, 64, 1152
    record = RecordLayout.of(("gate_up", "MXFP4_PAIRS", 2 * h, h), ("down", "MXFP4_PAIRS", h, h), interleaved=True)
    layout, glu, wide, narrow = slot_layout(record), Glu(1.702, 7.0, 1.0), floats(experts, 2 * h), floats(experts, h)
    records = torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8)
    for copies in (None, absent()):
        expert_gate_up(records, layout, ints(k), floats(k), floats(1, h), floats(k, h), copies=copies, glu=glu,
                       ids=ints(k), bias=wide, pdl=pdl)  # fmt: skip
    expert_down(records, layout, ints(k), floats(k, h), floats(1, h), ids=ints(k), weights=floats(k), bias=narrow,
                pdl=pdl)  # fmt: skip
    form = matrix("BF16", h, heads * dim)
    dense(floats(1, heads * dim), [(ints(form.nbytes, dtype=torch.uint8), form)], floats(1, h), bias=floats(h),
          residual=True, pdl=pdl)  # fmt: skip
    keys, splits = torch.zeros((kv_heads, room, dim), dtype=torch.bfloat16), 16
    width = (heads + 2 * kv_heads) * dim
    decode_attention(
        floats(width), keys, keys, ints(1), floats(2, 131072, dim), floats(heads * dim),
        floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
        q_norm=None, k_norm=None, norm_full=False, clip=None, eps=1e-6, splits=splits, window=128, sinks=floats(heads),
        pdl=pdl,
    )  # fmt: skip
    for window, dtype in ((128, torch.bfloat16), (0, torch.bfloat16), (128, torch.float32)):
        q = torch.zeros((64, heads, dim), dtype=dtype)
        prefill_attention(q, keys.to(dtype), keys.to(dtype), 127, window=window, sinks=floats(heads))
    for dtype in (torch.bfloat16, torch.float32):
        x, ids = torch.zeros((64, h), dtype=dtype), ints(64, k, dtype=torch.int64)
        for block in (16, 64)[: 1 + (dtype == torch.bfloat16)]:
            tiles = plan_tiles(ids, experts, dtype, block)
            expert_mlp(x, ids, tiles, ints(experts, dtype=torch.int64), layout, x.new_empty((64 * k, h)), glu=glu,
                       biases=(wide, narrow))  # fmt: skip


def prompt(block: int, fmt: str = "Q4_K", down: str = "Q6_K") -> None:
    """A chunk's kernels: tiles of 16 pairs have the weights on the left, others on the right."""
    layout = slot_layout(RecordLayout.of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", down, H, F)))
    x, ids = floats(64, H).bfloat16(), ints(64, K, dtype=torch.int64)
    out = x.new_empty((ids.numel(), H))
    tiles = plan_tiles(ids, EXPERTS, x.dtype, block)
    expert_mlp(x, ids, tiles, ints(EXPERTS, dtype=torch.int64), layout, out)
    combine(out, floats(64, K))
    form = matrix("Q6_K", 512, H)
    dequantise_into(ints(form.nbytes, dtype=torch.uint8), form, x.new_empty((512, H)))
    keys = torch.zeros((4, 4096, 128), dtype=torch.bfloat16)
    norm_rope_write(
        x.new_empty((64, 40 * 128)), keys, keys, ints(64, dtype=torch.int64), floats(2, 4096, 128), heads=32,
        kv_heads=4, head_dim=128, q_norm=floats(128), k_norm=floats(128), clip=None, eps=1e-6,
    )  # fmt: skip


def copies(fmt: str, pdl: bool) -> None:
    layout = slot_layout(RecordLayout.of(("gate_up", fmt, 2 * F, H), ("down", "Q4_K", H, F)))
    records = torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8)
    page_in(absent(), records, layout, landed=ints(2), progress=ints(2), pdl=pdl)
    sources, rows = ints(K, dtype=torch.int64), ints(LAYERS * EXPERTS)
    request(1 << 40, ints(1), ints(K), sources, rows, 1 << 40, 1 << 21, ints(1), ints(1))


def residency(policy: str, pdl: bool, rule: Rule = RULE) -> None:
    table = device_table(Residency(LAYERS, EXPERTS, 128, make_policy(policy, LAYERS * EXPERTS), "layer"), 10, CPU)
    t, ids = table, ints(1, LAYERS, K, dtype=torch.int16)
    bias = floats(EXPERTS) if rule.biased else None
    shift = floats(H) if rule.scores == "mixer" else None  # a LayerNorm
    rows = EXPERTS + rule.biased  # with a gated shared expert too
    candidates(t.owner, t.arriving, t.a, t.b, t.decay, t.clock, t.candidates, kind=t.kind, foretold=t.foretold,
               worth=t.worth)  # fmt: skip
    pool = device_table(Residency(LAYERS, EXPERTS, 128, make_policy(policy, LAYERS * EXPERTS), "global"), 10, CPU)
    candidates(pool.owner, pool.arriving, pool.a, pool.b, pool.decay, pool.clock, pool.candidates, kind=pool.kind,
               scratch=pool.scratch, foretold=pool.past and pool.past.foretold, worth=pool.worth)  # fmt: skip
    if t.past:
        foretell(t.past, ints(LAYERS * K), ints(1), k=K, experts=EXPERTS)
    route(
        floats(H), floats(H), 1e-6, floats(rows, H).bfloat16(), table, 1, layers=LAYERS, rule=rule, bias=bias,
        shift=shift, logits=floats(rows), normed=floats(H), ticket=ints(1), ids=ints(K), weights=floats(K + 1),
        slots=ints(K), hit=ints(K), miss_count=ints(1), miss_records=ints(K), miss_slots=ints(K), status=ints(1),
        counters=ints(COUNTED), log=ints(LAYERS * K), step=ints(1), units=1 << 17, raw=floats(H), pdl=pdl,
        fetched=(ints(1), ints(K)), forced=ids if policy == "lru" else None,
        factors=floats(EXPERTS) if rule.scaled else None, apart=rule.scaled,
    )  # fmt: skip
    predict(
        floats(H), floats(H), 1e-6, floats(rows, H).bfloat16(), table, 1, layers=LAYERS, rule=rule, least=0.05,
        most=2, bias=bias, shift=shift, logits=floats(EXPERTS), ticket=ints(1), held=ints(K), fetch_count=ints(1),
        fetch_records=ints(K), fetch_slots=ints(K), status=ints(1), counters=ints(COUNTED), step=ints(1), units=1 << 17,
        pdl=pdl, emulated=ids if policy == "lru" else None, apart=rule.scaled,
    )  # fmt: skip


def attended(pdl: bool) -> None:
    heads, kv_heads, dim, ctx, splits = 32, 4, 128, 4096, 33
    keys = torch.zeros((kv_heads, ctx, dim), dtype=torch.bfloat16)
    decode_attention(
        floats((heads + 2 * kv_heads) * dim), keys, keys, ints(1), floats(2, ctx, dim), floats(heads * dim),
        floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
        q_norm=floats(dim), k_norm=floats(dim), norm_full=False, clip=None, eps=1e-6, splits=splits, pdl=pdl,
    )  # fmt: skip


def caches(pdl: bool) -> None:
    """KV caches of other types, one norm over all heads, clipped values."""
    heads, dim, ctx, splits = 16, 128, 4096, 33
    for dtype in (torch.int8, torch.float16, torch.float32):
        keys, norm = torch.zeros((heads, ctx, dim), dtype=dtype), floats(heads * dim)
        scales = floats(2, heads, ctx) if dtype == torch.int8 else None
        shape = {"heads": heads, "kv_heads": heads, "head_dim": dim, "q_norm": norm, "k_norm": norm, "scales": scales}
        decode_attention(
            floats(3 * heads * dim), keys, keys, ints(1), floats(2, ctx, dim), floats(heads * dim),
            floats(partial_size(heads, dim, splits)), ints(heads), norm_full=True, clip=8.0, eps=1e-6, splits=splits,
            pdl=pdl, **shape,
        )  # fmt: skip
        norm_rope_write(floats(64, 3 * heads * dim).bfloat16(), keys, keys, ints(64, dtype=torch.int64),
                        floats(2, ctx, dim), clip=8.0, eps=1e-6, **shape)  # fmt: skip


def delta(pdl: bool) -> None:
    """Launch kernels of Qwen3-Next: its DeltaNet, and its attention with gated heads of 256."""
    shape = Delta(key_heads=16, value_heads=32, key_dim=128, value_dim=128, taps=4)
    weights = DeltaWeights(shape, floats(4, shape.channels), floats(32), floats(32), floats(128), 1e-6, pdl)
    delta_step(
        floats(sum(shape.projected)), weights, floats(32, 128, 128), floats(4, shape.channels), ints(1), ints(1),
        floats(shape.values), ctx=4096, pdl=pdl,
    )  # fmt: skip
    rows = floats(100, sum(shape.projected)).bfloat16()
    delta_chunk(rows, weights, floats(32, 128, 128), floats(4, shape.channels), 7)
    heads, kv_heads, dim, ctx, splits = 16, 2, 256, 4096, 66
    keys = torch.zeros((kv_heads, ctx, dim), dtype=torch.bfloat16)
    decode_attention(
        floats((heads + 2 * kv_heads) * dim), keys, keys, ints(1), floats(2, ctx, 64), floats(heads * dim),
        floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
        q_norm=floats(dim), k_norm=floats(dim), norm_full=False, clip=None, eps=1e-6, splits=splits,
        gate=floats(heads * dim), pdl=pdl,
    )  # fmt: skip


def gemma(pdl: bool) -> None:
    """Norms around the parts, heads of either kind of layer, a capped head."""
    h, heads, ctx, splits = 2816, 16, 4096, 16
    norms = Sandwich(*(floats(h) for _ in range(5)), floats(1))
    sandwich.attended(floats(h), floats(h), norms, 1e-6, floats(h), floats(h), floats(h), pdl)
    sandwich.fed(floats(h), floats(h), floats(h), norms, 1e-6, pdl)
    for kv_heads, dim, window, room in ((8, 256, 1024, 2048), (2, 512, 0, ctx)):
        keys = torch.zeros((kv_heads, room, dim), dtype=torch.float16)
        decode_attention(
            floats((heads + 2 * kv_heads) * dim), keys, keys, ints(1), floats(2, ctx, dim), floats(heads * dim),
            floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
            q_norm=floats(dim), k_norm=floats(dim), norm_full=False, clip=None, eps=1e-6, splits=splits, scale=1.0,
            window=window, value_norm=True, pdl=pdl,
        )  # fmt: skip
        prefill_attention(floats(100, heads, dim).half(), keys, keys, 0, window=window, scale=1.0)
    form = matrix("Q6_K", 1024, 2816)
    part = (ints(form.nbytes, dtype=torch.uint8), form)
    dense(floats(1, h), [part], floats(1, 1024), norm=floats(h), eps=1e-6, cap=30.0, pdl=pdl)


def convolution(pdl: bool) -> None:
    w, recent = ConvWeights(ShortConv(H, 3), floats(3, H)), floats(3, H)
    conv_step(floats(3 * H), w, recent, ints(1), ints(1), floats(H), ctx=4096, pdl=pdl)
    conv_chunk(floats(100, 3 * H).bfloat16(), w, recent, 7)


def llama4(pdl: bool) -> None:
    """Launch kernels of Scout: chunked attention, attention temperature in NoPE layers, weights on inputs."""
    heads, kv_heads, dim, ctx, splits = 40, 8, 128, 16384, 16
    keys, ones = torch.zeros((kv_heads, 9216, dim), dtype=torch.bfloat16), floats(dim)
    for window, rotary, norm, temperature in ((8192, dim, ones, None), (0, 2, None, floats(ctx))):
        kept = keys if window else torch.zeros((kv_heads, ctx, dim), dtype=torch.bfloat16)
        decode_attention(
            floats((heads + 2 * kv_heads) * dim), kept, kept, ints(1), floats(2, ctx, rotary), floats(heads * dim),
            floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
            q_norm=norm, k_norm=norm, norm_full=False, norm_after=True, clip=None, eps=1e-5, splits=splits,
            window=window, chunked=True, temperature=temperature, pdl=pdl,
        )  # fmt: skip
    prefill_attention(torch.zeros((64, heads, dim), dtype=torch.bfloat16), keys, keys, 8190, window=8192, chunked=True)
    layout = slot_layout(RecordLayout.of(("gate_up", "Q4_K", 2 * F, H), ("down", "Q4_K", H, F)))
    records = torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8)
    expert_gate_up(records, layout, ints(1), floats(1), floats(1, H), floats(1, F), copies=absent(), before=True,
                   pdl=pdl)  # fmt: skip


def latents(pdl: bool, heads: int, z: Latent, fmt: str) -> None:
    ctx, splits = 4096, 32
    parts = []
    for rows, cols in ((heads * z.kv_rank, z.qk_nope), (heads * z.value, z.kv_rank)):
        form = matrix(fmt, rows, cols)
        parts.append((ints(form.nbytes, dtype=torch.uint8), form))
    decode_latents(
        floats(heads * z.key), floats(z.width), floats(ctx, z.width).bfloat16(), ints(1), floats(2, ctx, z.qk_rope),
        floats(z.kv_rank), *parts, floats(heads * z.value), floats(heads * z.kv_rank),
        floats(heads * (splits * (z.kv_rank + 2) + 132 * z.kv_rank)), heads=heads, latent=z, scale=0.1, splits=splits,
        pdl=pdl,
    )  # fmt: skip


def ends(pdl: bool) -> None:
    rms_norm(floats(1, H), floats(H), 1e-6, floats(1, H))  # of a layer without experts
    rms_norm(floats(1, H), floats(H), 1e-6, floats(1, H), floats(H))
    form = matrix("Q4_K", 1024, H)
    embed(ints(1), (ints(form.nbytes, dtype=torch.uint8), form), floats(1, H), striped=True, pdl=pdl)
    for variant in (GREEDY, TOPK, FULL):
        sample_step(floats(151936), floats(5), ints(1, dtype=torch.int64), ints(1), ints(151936, dtype=torch.uint8),
                    ints(1), ints(1), Scratch.of(151936, CPU), variant=variant, pdl=pdl)  # fmt: skip
    state = {name: ints(1) for name in ("token", "position", "steps", "status", "remaining")}
    advance(ints(1), clock=ints(2), eos=ints(16), counters=ints(COUNTED), ids=ints(LAYERS * K), ring=1 << 40, rows=64,
            pdl=pdl, **state)  # fmt: skip


def launches_for(capability: int, whole: bool) -> tuple[list[Launch], list[Launch]]:
    """Launches as they are made on a GPU of that capability; `whole`: in every weight format. Second those of which
    the rest of the compiler learns nothing: only Triton's language is tested."""
    pdl = capability >= 90
    gemm.wgmma = lambda device: capability == 90
    attention.own_memory = lambda device: kernel_compiler.SHARED[capability]
    with kernel_compiler.caught() as launches:
        products("Q4_K", pdl)
        products("Q6_K", pdl)
        mixtral(pdl)
        gpt_oss(pdl)
        copies("Q6_K", pdl)
        residency("lru", pdl)
        residency("crf", pdl, GROUPED)
        residency("lfru", pdl, Rule("mixer", top_k=K, jitter=0.01))
        residency("echo", pdl)
        residency("lfu", pdl)
        residency(f"{formula_policies.HERE}:Signed", pdl)
        attended(pdl)
        caches(pdl)
        delta(pdl)
        gemma(pdl)
        residency("crf", pdl, Rule(top_k=K, renormalise=True, scaled=True))
        convolution(pdl)
        llama4(pdl)
        latents(pdl, 16, Latent(0, 512, 128, 64, 128), "BF16")  # DeepSeek-V2-Lite
        latents(pdl, 20, Latent(768, 512, 192, 64, 256), "Q8_0")  # GLM-4.7-Flash
        ends(pdl)
        arrangements(pdl)
        for block in (16, 32, 64, 128):
            prompt(block)
        for fmt in FORMATS if whole else ():
            one_format(fmt, pdl)
    with kernel_compiler.caught() as others:
        for fmt in FORMATS if whole else ():
            variants(fmt, pdl)
    return launches, others


def jobs_of(capabilities: list[int], whole: bool) -> Iterator[Job]:
    """Launches that differ, each with the capabilities of one major version that it is made on: PTX for them is the
    same, which is shown for one launch of each kernel. Without `whole` one launch of each kernel and its settings."""
    made: dict[tuple[int, str], tuple[Launch, list[int]]] = {}
    parsed: dict[str, Job] = {}
    for capability in capabilities:
        launches, others = launches_for(capability, whole)
        for launch in launches:
            _, on = made.setdefault((capability // 10, kernel_compiler.identity(launch)), (launch, []))
            if capability not in on:
                on.append(capability)
        for launch in others:
            parsed.setdefault(kernel_compiler.identity(launch), Job(launch, (capability,), "parsed"))
    seen, proven = set(), set()
    for (major, _), (launch, on) in made.items():
        kernel = (major, kernel_compiler.name_of(launch))
        settings = (*kernel, launch[2].get("num_warps"), launch[2].get("maxnreg"))
        if len(on) > 1 and kernel not in proven:
            yield Job(launch, tuple(on), "proven")
            proven.add(kernel)
        elif whole or settings not in seen:
            yield Job(launch, tuple(on))
        seen.add(settings)
    yield from parsed.values()


def main(processes: str, extent: str, *capabilities: str) -> None:
    torch.Tensor.is_cuda = property(lambda tensor: True)  # the tensors here are in RAM
    jobs = list(jobs_of([int(capability) for capability in capabilities], extent == "all"))
    for line in kernel_compiler.all_compiled(jobs, int(processes)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
