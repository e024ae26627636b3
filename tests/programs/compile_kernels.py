"""Compiles every kernel for real, with no GPU: `python -P compile_kernels.py 80`, a line of JSON a kernel.

Launches are caught before they start; a kernel is compiled for the arguments that it was called with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.decode.device_table import device_table
from offmoe.kernels.deltanet import Delta, DeltaWeights
from offmoe.kernels.feed_forward import Glu
from offmoe.kernels.gpu import gemm, sandwich
from offmoe.kernels.gpu.advance import advance
from offmoe.kernels.gpu.attention import decode_attention, partial_size
from offmoe.kernels.gpu.deltanet import delta_chunk, delta_step
from offmoe.kernels.gpu.embed import embed
from offmoe.kernels.gpu.experts import expert_down, expert_gate_up
from offmoe.kernels.gpu.foretell import foretell
from offmoe.kernels.gpu.formats.unpack import dequantise_into
from offmoe.kernels.gpu.gemm import combine, expert_mlp, plan_tiles
from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.mla import decode_latents
from offmoe.kernels.gpu.norm_rope import norm_rope_write, rms_norm
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.gpu.prefill import prefill_attention
from offmoe.kernels.gpu.request import request
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import predict, route
from offmoe.kernels.gpu.sample import Scratch, sample_step
from offmoe.kernels.gpu.shortconv import conv_chunk, conv_step
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.ring import COUNTED
from offmoe.kernels.route import Rule
from offmoe.kernels.sandwich import Sandwich
from offmoe.kernels.shortconv import ConvWeights, ShortConv

CPU = torch.device("cpu")
H, F, LAYERS, EXPERTS, K = 2048, 768, 2, 128, 8
RULE = Rule(top_k=K, renormalise=True)
GROUPED = Rule("sigmoid", biased=True, groups=8, kept=4, group_best=2, top_k=K, top_p=0.9, renormalise=True, scale=2.5)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
         torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Launches inside do not happen: they are listed."""
    launches: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *values, grid, warmup, **named: launches.append((kernel, values, named))
    yield launches
    JITFunction.run = run


def made_of(launch: Launch, capability: int) -> Any:
    """Pointers and whole numbers that divide by 16 are said to, as at a launch."""
    kernel, values, named = launch
    options = {key: named.pop(key) for key in list(named) if key not in kernel.arg_names}
    given = dict(zip(kernel.arg_names, values, strict=False)) | named
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given[name]
        if name == "DEVICE":
            value = True  # the tensors here lie in RAM
        if name in fixed or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def name_of(launch: Launch) -> str:
    """`experts._down`."""
    return f"{launch[0].__module__.rpartition('.')[2]}.{launch[0].__name__}"


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    made = made_of(launch, capability)
    ptx = made.asm["ptx"]
    return {
        "kernel": name_of(launch),
        "format": launch[2].get("FG", launch[2].get("FORMAT")),
        "warps": made.metadata.num_warps,
        "shared": made.metadata.shared,
        "flushing_fma": re.findall(r"fma[.\w]*ftz", ptx),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)),
        **resources(made.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, which is where they spill to."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.findall(rf"{name}:(\d+)", said)[-1]) for name in ("REG", "STACK")}


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def absent() -> Copies:
    return Copies(ints(1), ints(K), scratch_for(CPU, 16 << 20), None, ints(K), 1 << 40, 1 << 21)


def products(fmt: str, pdl: bool) -> None:
    """The experts' two, and a dense one with a norm and a second part."""
    record = RecordLayout.of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", fmt, H, F))
    layout = slot_layout(record)
    records = torch.empty((2, -(-layout.nbytes // 256) * 256), dtype=torch.uint8)
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


def attention(pdl: bool) -> None:
    heads, kv_heads, dim, ctx, splits = 32, 4, 128, 4096, 33
    keys = torch.zeros((kv_heads, ctx, dim), dtype=torch.bfloat16)
    decode_attention(
        floats((heads + 2 * kv_heads) * dim), keys, keys, ints(1), floats(2, ctx, dim), floats(heads * dim),
        floats(partial_size(heads, dim, splits)), ints(kv_heads), heads=heads, kv_heads=kv_heads, head_dim=dim,
        q_norm=floats(dim), k_norm=floats(dim), norm_full=False, clip=None, eps=1e-6, splits=splits, pdl=pdl,
    )  # fmt: skip


def delta(pdl: bool) -> None:
    """Qwen3-Next: its DeltaNet, and its attention with gated heads of 256."""
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
    """Llama 4 Scout: chunked attention, attention temperature in NoPE layers, weights that multiply the input."""
    heads, kv_heads, dim, ctx, splits = 40, 8, 128, 16384, 16
    keys, ones = torch.zeros((kv_heads, 9216, dim), dtype=torch.bfloat16), floats(dim)
    for window, turned, norm, temperature in ((8192, dim, ones, None), (0, 2, None, floats(ctx))):
        kept = keys if window else torch.zeros((kv_heads, ctx, dim), dtype=torch.bfloat16)
        decode_attention(
            floats((heads + 2 * kv_heads) * dim), kept, kept, ints(1), floats(2, ctx, turned), floats(heads * dim),
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
    sample_step(floats(151936), floats(5), ints(1, dtype=torch.int64), ints(1), ints(151936, dtype=torch.uint8),
                ints(1), ints(1), Scratch.of(151936, CPU), variant="greedy", pdl=pdl)  # fmt: skip
    state = {name: ints(1) for name in ("token", "position", "steps", "status", "remaining")}
    advance(ints(1), clock=ints(2), eos=ints(16), counters=ints(COUNTED), ids=ints(LAYERS * K), ring=1 << 40, rows=64,
            pdl=pdl, **state)  # fmt: skip


def main(capability: int) -> None:
    pdl = capability >= 90
    gemm.wgmma = lambda device: capability == 90
    with caught() as launches:
        products("Q4_K", pdl)
        products("MXFP4", pdl)
        products("Q6_K", pdl)
        products("IQ4_XS", pdl)
        products("Q2_K", pdl)
        products("Q3_K", pdl)
        products("F8_E4M3", pdl)
        products("NVFP4", pdl)
        products("INT4_128_F16_ZEROS", pdl)
        products("INT4_32_BF16", pdl)
        mixtral(pdl)
        gpt_oss(pdl)
        copies("Q6_K", pdl)
        residency("lru", pdl)
        residency("crf", pdl, GROUPED)
        residency("lfru", pdl, Rule("mixer", top_k=K, jitter=0.01))
        residency("echo", pdl)
        attention(pdl)
        delta(pdl)
        gemma(pdl)
        residency("crf", pdl, Rule(top_k=K, renormalise=True, scaled=True))
        convolution(pdl)
        llama4(pdl)
        latents(pdl, 16, Latent(0, 512, 128, 64, 128), "BF16")  # DeepSeek-V2-Lite
        latents(pdl, 20, Latent(768, 512, 192, 64, 256), "Q8_0")  # GLM-4.7-Flash
        ends(pdl)
        prompt(16)
        prompt(64)
        prompt(128)
        prompt(128, "Q2_K", "Q3_K")
        prompt(128, "IQ4_XS", "NVFP4")
    for launch in launches:
        try:
            print(json.dumps(compiled(launch, capability)), flush=True)
        except Exception as error:  # the next kernel is tried too
            print(json.dumps({"kernel": name_of(launch), "error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
