"""Time of the decode graph's kernels at Qwen3-30B-A3B's shape, relative to the roof: python bench/kernels.py OUT.csv

A figure is the median of five replays of a CUDA graph of at least 20 launches, each with different slots, out of more
than 200 MB. Bytes are those of the weights (or keys and values); the share is of VRAM bandwidth, for copies of link
bandwidth. `--sweep`: try numbers of warps per multiprocessor for the products in Q4_K instead, fastest first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rig import Row, add_row, machine, table
from torch import Tensor

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.decode.device_table import device_table
from offmoe.kernels.gpu import gemv, mla
from offmoe.kernels.gpu.attention import decode_attention, partial_size, pick_splits
from offmoe.kernels.gpu.experts import expert_down, expert_gate_up
from offmoe.kernels.gpu.foretell import foretell
from offmoe.kernels.gpu.gemv import dense
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.page_in import Copies, page_in, scratch_for
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import Choice, Router, RouterScratch, TokenState, route
from offmoe.kernels.gpu.table import Table
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import PLANES, SlotLayout, matrix, slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.kernels.ring import COUNTED
from offmoe.kernels.rope import rope_table
from offmoe.kernels.route import Rule
from offmoe.machine.bandwidth import link_bandwidth, vram_bandwidth

H, F, EXPERTS, K, LAYERS, VOCAB = 2048, 768, 128, 8, 48, 151936
HEADS, KV_HEADS, DIM, CTX = 32, 4, 128, 32768
LAUNCHES, LEAST, PINNED = 24, 400 << 20, 288 << 20
DENSE = {"qkv": (5120, H, "Q4_K"), "o": (H, HEADS * DIM, "Q4_K"), "head": (VOCAB, H, "Q6_K")}
# Hidden sizes F of experts of 0.9, 2.65 and 9 MB.
COPIED = {"Q4_K": (256, 768, 2560), "Q8_0": (160, 416, 1376)}
MISSES = (1, 4)
# Heads and widths of latent attention; its absorbed matrices are in Q8_0.
LATENTS = {
    "DeepSeek-V2-Lite": (16, Latent(0, 512, 128, 64, 128)),
    "GLM-4.7-Flash": (20, Latent(768, 512, 192, 64, 256)),
}
PARTS = (*PLANES, "dense", "pages", "latents", "rest")


class Bench:
    """Times kernels and prints rows. `warm`: run each kernel once, to fill Triton's cache."""

    def __init__(self, out: Path | None, warm: bool = False) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.pdl, self.out, self.warm = pdl_supported(self.device), out, warm
        self.rows: list[Row] = []
        self.generator = torch.Generator(self.device).manual_seed(3)
        self.roofs = {} if warm else {"vram": vram_bandwidth(self.device), "link": link_bandwidth(self.device)}
        self.machine = {} if warm else machine()

    def measure(self, kernel: str, what: str, nbytes: float, launch: Callable[[Any], object], inputs: Sequence[Any],
                roof: str = "vram", graph: bool = True) -> float:  # fmt: skip
        """Time `launch` for each of the inputs, which moves `nbytes`; add a row and return the seconds per launch."""

        def all_of_them() -> None:
            for each in inputs:
                launch(each)

        launch(inputs[0])
        torch.cuda.synchronize()
        if self.warm:
            return 0.0
        seconds = (graph_time(all_of_them) if graph else event_time(all_of_them)) / len(inputs)
        rate = nbytes / seconds
        row: Row = {"kernel": kernel, "what": what, "us": round(seconds * 1e6, 2), "mb": round(nbytes / 1e6, 3),
                    "gb_s": round(rate / 1e9, 1), "share": round(rate / self.roofs[roof], 3), "roof": roof}  # fmt: skip
        self.rows.append(row)
        if self.out is not None:
            add_row(self.out, row | self.machine)
        return seconds

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def noise(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=self.generator)

    def drawn(self, count: int, n: int) -> Tensor:
        """Return n random slots out of `count`."""
        return torch.randperm(count, device=self.device, generator=self.generator)[:n].to(torch.int32)


def graph_time(run: Callable[[], None]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return event_time(graph.replay)


def event_time(run: Callable[[], None], repeats: int = 5) -> float:
    """Return the seconds of the median run."""
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def record_of(fmt: str, inner: int) -> RecordLayout:
    return RecordLayout.of(("gate", fmt, inner, H), ("up", fmt, inner, H), ("down", fmt, H, inner))


def experts_of(b: Bench, fmt: str) -> tuple[Tensor, SlotLayout]:
    """Return slots filled with random bytes, and their layout."""
    layout = slot_layout(record_of(fmt, F))
    stride = -(-layout.nbytes // 256) * 256
    return b.noise(8 * K if b.warm else max(EXPERTS, LEAST // stride), stride), layout


def products(b: Bench, records: Tensor, layout: SlotLayout, n: int) -> dict[str, float]:
    """Time both products of n experts, for n ÷ 8 tokens."""
    x, inner, weights = b.floats(n // K, H), b.floats(n, F), b.floats(n).abs()
    draws = [b.drawn(len(records), n) for _ in range(LAUNCHES)]
    upper, what = layout.down.planes[0], f"{layout.gate.format} {n} experts"
    return {
        "gate_up": b.measure(
            "gate_up", what, n * upper,
            lambda slots: expert_gate_up(records, layout, slots, weights, x, inner, pdl=b.pdl), draws,
        ),
        "down": b.measure(
            "down", what, n * (layout.nbytes - upper),
            lambda slots: expert_down(records, layout, slots, inner, x, pdl=b.pdl), draws,
        ),
    }  # fmt: skip


def dense_product(b: Bench, name: str) -> float:
    rows, cols, fmt = DENSE[name]
    form = matrix(fmt, rows, cols)
    buffers = b.noise(1 if b.warm else max(2, -(-LEAST // 2 // form.nbytes)), form.nbytes)
    x, out, norm = b.floats(1, cols), b.floats(1, rows), None if name == "o" else b.floats(cols)
    return b.measure(
        "dense", f"{name} {rows}×{cols} {fmt}", form.nbytes,
        lambda buffer: dense(x, [(buffer, form)], out, norm=norm, eps=1e-6, residual=norm is None, pdl=b.pdl),
        [buffers[i % len(buffers)] for i in range(max(LAUNCHES, len(buffers)))],
    )  # fmt: skip


def pages(b: Bench, pinned: Tensor, fmt: str, inner: int) -> None:
    """Time page_in for one and for four experts, and the copy engine with one copy per expert."""
    record = record_of(fmt, inner)
    layout, stride, size = slot_layout(record), -(-record.nbytes // 256) * 256, record.nbytes
    rows, scratch = len(pinned) // stride, scratch_for(b.device)
    target = torch.empty((32, max(stride, -(-layout.nbytes // 256) * 256)), dtype=torch.uint8, device=b.device)
    count, what = b.ints(1), f"{fmt} {size / 1e6:.2f} MB"
    for n in MISSES:
        count.fill_(n)
        draws = [(b.drawn(rows, n), b.drawn(32, n)) for _ in range(LAUNCHES)]
        b.measure("page_in", f"{what} × {n}", n * size, lambda pair: page_in(
            Copies(count, pair[1], scratch, None, pair[0], pinned.data_ptr(), stride), target, layout
        ), draws, "link")  # fmt: skip
    places = [(i * 7 % rows * stride, i % 32) for i in range(LAUNCHES)]
    b.measure("copy engine", what, size, lambda pair: target[pair[1], :size].copy_(
        pinned[pair[0] : pair[0] + size], non_blocking=True
    ), places, "link", graph=False)  # fmt: skip


def listing(b: Bench, scope: str) -> Table:
    """Time foretell and candidates; return a table in which half of all experts have slots."""
    slots = EXPERTS // 2 * LAYERS
    t = device_table(Residency(LAYERS, EXPERTS, slots, make_policy("crf:h=16", LAYERS * EXPERTS), scope), K, b.device)
    t.owner.copy_(torch.arange(slots) // (EXPERTS // 2) * EXPERTS + torch.arange(slots) % (EXPERTS // 2))
    t.slot_of.fill_(-1)
    t.slot_of[t.owner.long()] = torch.arange(slots, dtype=torch.int32, device=b.device)
    e = device_table(Residency(LAYERS, EXPERTS, slots, make_policy("echo", LAYERS * EXPERTS), scope), K, b.device)
    past, log = e.past, b.ints(LAYERS * K)
    assert past
    past.filled.fill_(len(past.rows))
    b.measure("foretell", f"{len(past.rows)} rows", past.rows.nbytes, lambda _: foretell(
        past, log, past.ticket, k=K, experts=EXPERTS
    ), range(LAUNCHES))  # fmt: skip
    b.measure("candidates", f"{scope}, {slots} slots", 0, lambda _: candidates(
        t.owner, t.arriving, t.a, t.b, t.decay, t.clock, t.candidates, kind=t.kind, scratch=t.scratch
    ), range(LAUNCHES))  # fmt: skip
    return t


def routes(b: Bench, t: Table) -> None:
    """Time norm, router, top-k and residency; no layer is repeated, and after the first replay every expert hits."""
    x, norm, router = b.floats(H), b.floats(H), b.floats(EXPERTS, H).bfloat16()
    logits, normed, weights = b.floats(EXPERTS), b.floats(H), b.floats(K)
    ids, slots, hit, missing, places = (b.ints(K) for _ in range(5))
    count, ticket, status, step = (b.ints(1) for _ in range(4))
    counters, log = b.ints(COUNTED), b.ints(LAYERS * K)
    choice = Choice(ids, weights, slots, hit, count, missing, places)
    token, scratch = TokenState(status, counters, log, step), RouterScratch(logits, ticket)
    by = Router(norm, 1e-6, router, Rule(top_k=K, renormalise=True))
    b.measure("route", f"{EXPERTS} experts, top-{K}, bf16", router.nbytes, lambda layer: route(
        x, by, t, layer, choice, token, scratch, layers=LAYERS, normed=normed, units=1, pdl=b.pdl
    ), [layer for layer in range(2, LAYERS) if layer % 16])  # fmt: skip


def attentions(b: Bench, context: int, keys: Tensor, values: Tensor) -> None:
    splits, rope = pick_splits(CTX, KV_HEADS)[0], rope_table(CTX, DIM, 1e6, b.device)
    qkv, mixed, norm = b.floats((HEADS + 2 * KV_HEADS) * DIM), b.floats(HEADS * DIM), b.floats(DIM)
    partial, tickets, position = b.floats(partial_size(HEADS, DIM, splits)), b.ints(KV_HEADS), b.ints(1) + context - 1
    b.measure("attention", f"context {context}", 4 * KV_HEADS * DIM * context, lambda i: decode_attention(
        qkv, keys[i], values[i], position, rope, mixed, partial, tickets, heads=HEADS, kv_heads=KV_HEADS,
        head_dim=DIM, q_norm=norm, k_norm=norm, norm_full=False, clip=None, eps=1e-6, splits=splits, pdl=b.pdl,
    ), range(len(keys)))  # fmt: skip


def latents(b: Bench, name: str, context: int) -> None:
    """Time the three launches of latent attention together; each launch of a replay has its own weights and cache."""
    (heads, z), count = LATENTS[name], 2 if b.warm else LAUNCHES
    forms = [
        matrix("Q8_0", rows, cols) for rows, cols in ((heads * z.kv_rank, z.qk_nope), (heads * z.value, z.kv_rank))
    ]
    parts = [[(torch.zeros(form.nbytes, dtype=torch.uint8, device=b.device), form) for form in forms]
             for _ in range(count)]  # fmt: skip
    cache = torch.randn((count, CTX, z.width), device=b.device, dtype=torch.bfloat16)
    splits = mla.pick_splits(CTX, heads, gemv.multiprocessors(b.device))[0]
    query, fresh, norm, mixed = (
        b.floats(heads * z.key),
        b.floats(z.width),
        b.floats(z.kv_rank),
        b.floats(heads * z.value),
    )
    absorbed, partial = b.floats(heads * z.kv_rank), b.floats(mla.partial_size(heads, z, splits, b.device))
    position, rope = b.ints(1) + context - 1, rope_table(CTX, z.qk_rope, 1e6, b.device)
    nbytes = 2 * z.width * context + sum(form.nbytes for form in forms)
    b.measure("latent attention", f"{name}, context {context}", nbytes, lambda i: mla.decode_latents(
        query, fresh, cache[i], position, rope, norm, *parts[i], mixed, absorbed, partial, heads=heads, latent=z,
        scale=z.key**-0.5, splits=splits, pdl=b.pdl,
    ), range(count))  # fmt: skip


def run(b: Bench, part: str) -> None:
    if part == "pages":
        pinned = torch.empty((64 << 20) if b.warm else PINNED, dtype=torch.uint8, pin_memory=True)
        for fmt, sizes in COPIED.items():
            for inner in sizes:
                pages(b, pinned, fmt, inner)
    elif part == "dense":
        for name in DENSE:
            dense_product(b, name)
    elif part == "latents":
        for name in LATENTS:
            for context in (128, 1024, 8192, CTX):
                latents(b, name, context)
    elif part == "rest":
        listing(b, "global")
        routes(b, listing(b, "layer"))
        shape = (2 if b.warm else LAUNCHES, KV_HEADS, CTX, DIM)
        keys, values = (torch.randn(shape, device=b.device, dtype=torch.bfloat16) for _ in "kv")
        for context in (128, CTX):
            attentions(b, context, keys, values)
    else:
        records, layout = experts_of(b, part)
        for n in (K, 8 * K):
            products(b, records, layout, n)


def sweep(b: Bench, warps: int) -> list[Row]:
    """Time the products in Q4_K for one token, with `warps` warps per multiprocessor."""
    gemv.WARPS = gemv.FEWER_WARPS = warps
    found = {f"{name} {n}": t for n in (K, 8 * K) for name, t in products(b, *experts_of(b, "Q4_K"), n).items()}
    found |= {name: dense_product(b, name) for name in DENSE}
    return [{"kernel": name, "warps": warps, "us": round(t * 1e6, 2)} for name, t in found.items()]


def warm_up(parts: Sequence[str]) -> None:
    """Compile in one process per part, as Triton compiles on one core.

    An error here is raised again later, with its message.
    """
    waiting, running = list(parts), set()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            command = [sys.executable, __file__, "--warm", waiting.pop()]
            running.add(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        running = {process for process in running if process.poll() is None}
        time.sleep(0.05)


def swept(out: Path | None) -> None:
    warm_up(["Q4_K", "dense"])
    b = Bench(None)
    found = [row for warps in (6, 8, 12, 16, 24) for row in sweep(b, warps)]
    for row in found if out else ():
        add_row(out, row | b.machine)
    found.sort(key=lambda row: (row["kernel"], row["us"]))
    print(table(found, {name: name for name in ("kernel", "warps", "us")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="rows are added to this file")
    parser.add_argument(
        "--sweep", action="store_true", help="try numbers of warps per multiprocessor for the products in Q4_K"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm:
        run(Bench(None, warm=True), args.warm)
    elif args.sweep:
        swept(args.out)
    else:
        warm_up(args.only)
        b = Bench(args.out)
        for part in args.only:
            run(b, part)
        print(b.machine | {roof: f"{value / 1e9:.0f} GB/s" for roof, value in b.roofs.items()})
        names = {"kernel": "kernel", "what": "what", "us": "µs", "mb": "MB", "gb_s": "GB/s", "share": "of roof"}
        print(table(b.rows, names))


if __name__ == "__main__":
    main()
