"""Time of a prompt's chunk through the experts of one layer of Qwen3-30B-A3B: python bench/gemm.py OUT.csv

A figure is the median of five replays of a CUDA graph of four calls, each with another set of experts; the share is of
torch.matmul's rate in bfloat16 at 8192³. `--sweep`: try sizes of tiles, warps and stages in Q4_K instead.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rig import Row, add_row, machine, table
from torch import Tensor

from offmoe.kernels.gpu.formats.unpack import dequantise_into
from offmoe.kernels.gpu.gemm import Tiles, Tuning, block_of, combine, expert_mlp, plan_tiles, tuning_of
from offmoe.kernels.planes import PLANES, SlotLayout, matrix, slot_layout
from offmoe.kernels.record import RecordLayout

H, F, EXPERTS, K, SETS = 2048, 768, 128, 8, 4
CUDA = torch.device("cuda")


def seconds(run: Callable[[], None], repeats: int = 5) -> float:
    """Return the seconds of the median replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times[1:])


def matmul_rate() -> float:
    """Return the FLOP/s of a large torch.matmul."""
    a = torch.randn((8192, 8192), device=CUDA, dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: torch.mm(a, a))


class Layer:
    """Experts of a layer, of random bytes: the values do not change the time."""

    def __init__(self, fmt: str, tokens: int) -> None:
        self.layout: SlotLayout = slot_layout(
            RecordLayout.of(("gate", fmt, F, H), ("up", fmt, F, H), ("down", fmt, H, F))
        )
        stride = -(-self.layout.nbytes // 256) * 256
        self.records = torch.randint(0, 256, (SETS, EXPERTS, stride), dtype=torch.uint8, device=CUDA)
        firsts = self.records.data_ptr() + torch.arange(SETS * EXPERTS, device=CUDA) * stride
        self.addresses = firsts.view(SETS, EXPERTS)
        self.x = torch.randn((tokens, H), device=CUDA, dtype=torch.bfloat16)
        self.ids = torch.rand((tokens, EXPERTS), device=CUDA).topk(K).indices
        self.weights = torch.rand((tokens, K), device=CUDA)
        self.out = torch.empty((tokens * K, H), device=CUDA, dtype=torch.bfloat16)
        self.flop = 6.0 * tokens * K * H * F

    def tiles(self, block: int | None = None) -> Tiles:
        return plan_tiles(self.ids, EXPERTS, self.x.dtype, block)

    def products(self, tiles: Tiles, **tuning: Tuning) -> float:
        def run() -> None:
            for addresses in self.addresses:
                expert_mlp(self.x, self.ids, tiles, addresses, self.layout, self.out, **tuning)

        return seconds(run) / SETS


def timed(fmt: str, tokens: int, roof: float) -> list[Row]:
    layer = Layer(fmt, tokens)
    tiles = layer.tiles()
    products = layer.products(tiles)
    rows: list[Row] = [{"kernel": "expert_mlp", "format": fmt, "tokens": tokens, "ms": products * 1e3,
                        "share": layer.flop / products / roof}]  # fmt: skip
    if fmt == "Q4_K":
        rows.append({"kernel": "plan_tiles", "tokens": tokens, "ms": seconds(lambda: layer.tiles() and None) * 1e3})
        combined = seconds(lambda: combine(layer.out, layer.weights) is None or None)
        rows.append({"kernel": "combine", "tokens": tokens, "ms": combined * 1e3})
    return rows


def unpacked(fmt: str) -> Row:
    """Time the dequantisation of a matrix [4096, 2048]; bytes are those read and written."""
    form = matrix(fmt, 4096, H)
    buffer: Tensor = torch.randint(0, 256, (form.nbytes,), dtype=torch.uint8, device=CUDA)
    out = torch.empty((form.rows, form.cols), device=CUDA, dtype=torch.bfloat16)
    took = seconds(lambda: dequantise_into(buffer, form, out))
    return {
        "kernel": "dequantise_into",
        "format": fmt,
        "ms": took * 1e3,
        "gb_s": (form.nbytes + out.nbytes) / took / 1e9,
    }


def sweep(tokens: int) -> list[Row]:
    """Try sizes of blocks; then tunings of one product at a time, with the other's default."""
    layer, rows = Layer("Q4_K", tokens), []
    usual = block_of(tokens * K, EXPERTS, layer.x.dtype)
    for block in {usual, min(128, usual * 2)}:
        tiles = layer.tiles(block)
        for which in ("first", "second"):
            default = tuning_of(block, layer.x.dtype, CUDA, "Q4_K", which == "first")
            for n, warps, stages, swap in itertools.product((64, 128), (4, 8), (3, 4), (False, True)):
                tuning = replace(default, rows=n, warps=warps, stages=stages, swap=swap)
                try:
                    took = layer.products(tiles, **{which: tuning})
                except Exception as error:  # out of shared memory
                    print(which, block, tuning, type(error).__name__)
                    continue
                rows.append({"product": which, "tokens": tokens, "block": block, "rows": n, "warps": warps,
                             "stages": stages, "swap": swap, "usual": tuning == default, "ms": took * 1e3})  # fmt: skip
    return sorted(rows, key=lambda row: (row["product"], row["ms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="rows are added to this file")
    parser.add_argument("--sweep", type=int, metavar="TOKENS")
    args = parser.parse_args()
    if args.sweep:
        rows = sweep(args.sweep)
    else:
        roof = matmul_rate()
        print(f"torch.matmul: {roof / 1e12:.0f} TFLOP/s")
        rows = [row for tokens in (64, 512, 4096) for row in timed("Q4_K", tokens, roof)]
        rows += [row for fmt in PLANES if fmt != "Q4_K" for row in timed(fmt, 4096, roof)]
        rows += [unpacked(fmt) for fmt in PLANES]
    rows = [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    names = {key: key for row in rows for key in row}
    here = machine()
    for row in rows if args.out else ():
        add_row(args.out, {key: row.get(key, "") for key in names} | here)
    print(here)
    print(table([{key: row.get(key, "") for key in names} for row in rows], names))


if __name__ == "__main__":
    main()
