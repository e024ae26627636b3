"""Prompts of random ids on a GPU: tok/s, compared with the bounds of the link and of the tensor cores.

    python3 bench/prefill.py --shape qwen3-30b-a3b --caps 50,100 --tokens 512,4096 --out bench/results/prefill.csv

Every prompt is a new one, after an untimed one of the same length, which determines the state of the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from rig import Peer, Rig, Row, machine, model_file, parser, report
from shapes import SHAPES

from offmoe.machine.bandwidth import best_time
from offmoe.models.parameters import count_weights

COLUMNS = {"shape": "shape", "cap": "cap", "tokens": "tokens", "tok_s": "tok/s", "low": "low", "high": "high",
           "link_mib": "MiB", "roof_tok_s": "roof", "roof_by": "by", "share_of_roof": "share",
           "peer_ratio": "× peer"}  # fmt: skip


@cache
def bf16_rate() -> float:
    """Return the multiply-adds per second of a large product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return n**3 / best_time(lambda: a @ b, torch.device("cuda"), repeats=5)


def row(rig: Rig, cap: str, tokens: int, runs: list[tuple[float, float]], peers: Peer) -> Row:
    seconds = statistics.median(run[0] for run in runs)
    moved = statistics.median(run[1] for run in runs)
    vram_rate, link_rate = rig.bandwidths()
    macs = count_weights(rig.model).active_without_embedding * tokens  # a lower bound: without attention's products
    roofs = {"link": moved / link_rate, "bf16": macs / bf16_rate()}
    by = max(roofs, key=lambda what: roofs[what])
    speed, source = peers.speed(rig.shape, rig.layers, float(cap), tokens, 0, 0)
    return {
        **machine(), "shape": rig.shape, "cap": f"{cap}%", "tokens": tokens, "chunk": rig.engine.plan.chunk,
        "tok_s": round(tokens / seconds), "low": round(tokens / max(run[0] for run in runs)),
        "high": round(tokens / min(run[0] for run in runs)), "link_mib": round(moved / 2**20),
        "roof_tok_s": round(tokens / roofs[by]), "roof_by": by, "share_of_roof": f"{roofs[by] / seconds:.3f}",
        "peer_tok_s": round(speed), "peer_ratio": f"{tokens / seconds / speed:.2f}" if speed else "-",
        "peer_from": source, "bf16_tflop_s": round(2 * bf16_rate() / 1e12), "vram_gb_s": round(vram_rate / 1e9),
        "link_gb_s": round(link_rate / 1e9, 1),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[Row]:
    lengths = [int(text) for text in args.tokens.split(",")]
    peers = Peer(args.peer)
    for shape in args.shape.split(","):
        path = model_file(shape, args.layers)
        for cap in args.caps.split(","):
            began = time.perf_counter()
            with Rig(path, shape, f"{cap}%", max(lengths) + 64, chunk=args.chunk) as rig:
                print(f"# {rig.engine.plan.summary()}: ready in {time.perf_counter() - began:.1f} s", flush=True)
                for tokens in lengths:
                    runs = [rig.prefill(tokens, seed=seed) for seed in range(args.runs + 1)]
                    yield row(rig, cap, tokens, runs[1:], peers)


def parse_args(argv: list[str]) -> argparse.Namespace:
    options = parser("prefill", __doc__)
    options.add_argument("--shape", default="qwen3-30b-a3b", help=f"{', '.join(SHAPES)} or demo, separated by commas")
    options.add_argument("--caps", default="50,100")
    options.add_argument("--tokens", default="512,4096")
    options.add_argument("--chunk", type=int, default=4096)
    options.add_argument("--runs", type=int, default=3, help="number of timed prompts, after an untimed one")
    options.add_argument("--peer", type=Path, help="llama-bench's CSV of this run")
    return options.parse_args(argv)


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    report("prefill", measure(args), COLUMNS, args.out)
