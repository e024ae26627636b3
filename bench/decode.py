r"""Decoding on a GPU: a CSV row and a line of a table for every cap, policy, prefetcher, context and routing.

    python3 bench/decode.py --shape qwen3-30b-a3b --caps 25,50,75,100 --routing realistic,uniform \
        --policies crf:h=16,lru@50 --prefetch none --context 128,32768 --out bench/results/decode.csv

`lru@50` runs that policy at 50 % only. Routings: realistic (Qwen3-30B-A3B's), uniform, trace (gpt-oss-20b's), own (the
router's; about uniform with random weights). Prefetchers, separated by spaces: none, the engine's own such as
gate:d=1,p=0.05, and with replayed routing emulated ones: emulated:recall=0.727,precision=0.557,d=1,n=2 and oracle:d=2.
With all experts in VRAM only the first policy and routing are run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import routing as routes
from numpy.typing import NDArray
from rig import Peer, Rig, Row, Steps, machine, model_file, parser, report
from shapes import SHAPES

Ids = NDArray[np.int16]
WINDOWS = 8  # parts of the timed tokens, for their spread
FILL = 512  # tokens of the first prompt, which fills the slots
COLUMNS = {"cap": "cap", "routing": "routing", "policy": "policy", "prefetch": "prefetch", "context": "context",
           "tok_s": "tok/s", "ms": "ms", "ms_low": "low", "ms_high": "high", "hit_rate": "hit", "link_mib": "MiB/tok",
           "floor_ms": "floor", "of_floor_and_link": "÷(fl+link)", "roof_tok_s": "roof", "roof_by": "by",
           "share_of_roof": "share", "peer_ratio": "× peer"}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Settings that need an engine of their own."""

    cap: str
    policy: str
    prefetch: str


@dataclass(frozen=True)
class Emulated:
    """An emulated predictor, which names future ids with a given recall and precision."""

    recall: float
    precision: float
    setting: str  # prefetch setting of the engine: the same stream, budget and distance, its own predictor unused

    @classmethod
    def of(cls, spec: str) -> Emulated | None:
        name, _, options = spec.partition(":")
        if name not in ("emulated", "oracle"):
            return None
        fields = dict(option.split("=") for option in options.split(",") if option)
        recall, precision = float(fields.pop("recall", 1)), float(fields.pop("precision", 1))
        rest = ",".join(f"{key}={value}" for key, value in {"d": "1", "p": "0", **fields}.items())
        return cls(recall, precision, f"gate:{rest}")


def loads(args: argparse.Namespace) -> Iterator[Load]:
    for cap in args.caps.split(","):
        policies = [p.partition("@")[0] for p in args.policies.split(",") if p.partition("@")[2] in ("", cap)]
        whole = float(cap) >= 100
        for policy in policies[:1] if whole else policies:
            for prefetch in ["none"] if whole else args.prefetch:
                yield Load(cap, policy, prefetch)


def routing_ids(name: str, rig: Rig, tokens: int) -> Ids | None:
    if name == "own":
        return None
    if name == "realistic":
        if (rig.experts, rig.k) != (128, 8):
            raise SystemExit("realistic routing is fitted to 128 experts, top-8: choose uniform, trace or own")
        return routes.realistic(tokens, rig.layers)
    if name == "uniform":
        return routes.uniform(tokens, rig.layers, rig.experts, rig.k)
    if name != "trace":
        raise SystemExit(f"routing {name!r} is unknown: choose realistic, uniform, trace or own")
    ids = routes.from_trace(tokens=tokens)
    if ids.shape[1:] != (rig.layers, rig.k):
        raise SystemExit(f"the trace is {ids.shape[1]} layers of top-{ids.shape[2]}: it fits gpt-oss-20b's shape")
    return ids


def replay(rig: Rig, load: Load, ids: Ids | None, warm: int) -> float:
    """Return the hit rate of the timed tokens without prefetching, from a cache of other experts; NaN if unknown."""
    if ids is None:
        return float("nan")
    fill = routes.uniform(40, rig.layers, rig.experts, rig.k, seed=1)
    outcome = routes.replayed(np.concatenate([fill, ids]), rig.experts, load.policy, rig.slots)
    return float(outcome.hit[len(fill) + warm :].mean())


def cell(rig: Rig, load: Load, context: int, name: str, args: argparse.Namespace) -> Row:
    """Warm up, time, and compare with the bounds."""
    ids = routing_ids(name, rig, args.warm + args.tokens)
    expected = replay(rig, load, ids, args.warm)
    emulated = Emulated.of(load.prefetch)
    names = None
    if emulated:
        if ids is None:
            raise SystemExit("an emulated predictor needs replayed routing")
        misses = (1 - expected) * rig.k
        names = routes.predicted(ids, rig.experts, emulated.recall, emulated.precision, rig.slots, misses)
    rig.context(context)
    parts = slice(args.warm), slice(args.warm, None)
    for part, tokens in zip(parts, (args.warm, args.tokens), strict=True):
        rig.force(None if ids is None else ids[part], None if names is None else names[part])
        steps = rig.run(tokens)
    floor = rig.floor(ids if ids is not None else routes.uniform(1, rig.layers, rig.experts, rig.k))
    return row(rig, load, context, name, steps, floor, expected, Peer(args.peer))


def row(rig: Rig, load: Load, context: int, name: str, steps: Steps, floor: float, expected: float, peers: Peer) -> Row:
    vram_rate, link_rate = rig.bandwidths()
    routed = rig.layers * rig.k
    demanded = float((steps.misses + steps.late + steps.covered).mean()) * rig.record
    moved = float(steps.uploads.mean()) * rig.record
    link, vram = demanded / link_rate, rig.vram_bytes(context + len(steps.seconds) / 2) / vram_rate
    roofs = {"floor": floor, "link": link, "vram": vram}
    by = max(roofs, key=lambda what: roofs[what])
    seconds = float(steps.seconds.mean())
    windows = [float(part.mean()) * 1e3 for part in np.array_split(steps.seconds, WINDOWS)]
    speed, source = peers.speed(rig.shape, rig.layers, float(load.cap), 0, 128, 0 if context < 4096 else context)
    return {
        **machine(), "shape": rig.shape, "cap": f"{load.cap}%", "routing": name, "policy": load.policy,
        "prefetch": load.prefetch + " (int8 KV)" * (rig.kv == "int8"), "context": context,
        "tokens": len(steps.seconds), "tok_s": round(1 / seconds, 1),
        "ms": f"{np.median(windows):.3f}", "ms_low": f"{min(windows):.3f}", "ms_high": f"{max(windows):.3f}",
        "hit_rate": f"{float(steps.hits.mean()) / routed:.3f}", "hit_replayed": f"{expected:.3f}",
        "misses": round(float(steps.misses.mean()), 2), "late": round(float(steps.late.mean()), 2),
        "covered": round(float(steps.covered.mean()), 2), "uploads": round(float(steps.uploads.mean()), 2),
        "link_mib": round(moved / 2**20, 2), "vram_mib": round(vram * vram_rate / 2**20),
        "floor_ms": f"{floor * 1e3:.3f}", "link_ms": f"{link * 1e3:.3f}",
        "of_floor_and_link": f"{seconds / (floor + link):.3f}", "roof_tok_s": round(1 / roofs[by], 1), "roof_by": by,
        "share_of_roof": f"{roofs[by] / seconds:.3f}", "peer_tok_s": speed,
        "peer_ratio": f"{1 / seconds / speed:.2f}" if speed else "-", "peer_from": source,
        "vram_gb_s": round(vram_rate / 1e9), "link_gb_s": round(link_rate / 1e9, 1),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[Row]:
    path = model_file(args.shape, args.layers)
    contexts = [int(text) for text in args.context.split(",")]
    ctx = max(max(contexts) + max(args.warm + args.tokens, 64) + 64, FILL + 64)
    for load in loads(args):
        began = time.perf_counter()
        emulated = Emulated.of(load.prefetch)
        prefetch = emulated.setting if emulated else load.prefetch
        with Rig(path, args.shape, f"{load.cap}%", ctx, policy=load.policy, prefetch=prefetch, kv=args.kv) as rig:
            print(f"# {rig.engine.plan.summary()}: ready in {time.perf_counter() - began:.1f} s", flush=True)
            rig.prefill(FILL, seed=0)  # fill every slot
            names = args.routing.split(",")
            for context in contexts:
                for name in names[:1] if float(load.cap) >= 100 else names:
                    yield cell(rig, load, context, name, args)


def parse_args(argv: list[str]) -> argparse.Namespace:
    options = parser("decode", __doc__)
    options.add_argument("--shape", default="qwen3-30b-a3b", choices=[*SHAPES, "demo"])
    options.add_argument("--caps", default="25,50,75,100", help="percentages of the experts that have a slot")
    options.add_argument("--routing", default="realistic,uniform")
    options.add_argument("--policies", default="crf:h=16")
    options.add_argument("--prefetch", default=["none"], nargs="+")
    options.add_argument("--context", default="128")
    options.add_argument("--kv", choices=["int8"], help="data type of the KV cache, instead of the activations' type")
    options.add_argument("--tokens", type=int, default=400, help="number of timed tokens")
    options.add_argument("--warm", type=int, default=200, help="number of untimed tokens before them")
    options.add_argument("--quick", action="store_true", help="50 and 100 %%, realistic, fewer tokens: about a minute")
    options.add_argument("--peer", type=Path, help="llama-bench's CSV of this run")
    args = options.parse_args(argv)
    if args.quick:
        args.caps, args.tokens, args.warm, args.context = "50,100", 160, 120, "128"
        args.routing = args.routing.partition(",")[0]
    return args


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    report("decode", measure(args), COLUMNS, args.out)
