"""Cost of a miss in a decode step, by the number of misses per layer and the number of layers with misses.

    python3 bench/misses.py --shape gpt-oss-20b --out bench/results/misses.csv

Routing is forced: in every n-th layer some of the k experts rotate through more experts than there are slots, so that
the policy lru always misses them; all others hit. The floor is a step in which every expert hits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rig import Rig, Row, machine, model_file, parser, report
from shapes import SHAPES

COLUMNS = {"missing": "missing", "every": "every", "floor_ms": "floor", "ms": "ms", "misses": "misses",
           "us_a_miss": "µs a miss", "gb_s": "GB/s", "link_gb_s": "link"}  # fmt: skip
TOKENS = 60  # timed tokens, after the same number of untimed ones


def in_turn(rig: Rig, missing: int, every: int, tokens: int) -> NDArray[np.int16]:
    """Return ids [tokens, layers, k]: the last k experts, `missing` of which are replaced by others in every
    `every`-th layer.
    """
    ids = np.empty((tokens, rig.layers, rig.k), np.int16)
    ids[:] = np.arange(rig.experts - rig.k, rig.experts)
    others = (rig.experts - rig.k) // max(1, missing) * missing
    if missing:
        turn = np.arange(tokens)[:, None] * missing + np.arange(missing)
        ids[:, ::every, :missing] = (turn % others)[:, None]
    return ids


def median_ms(rig: Rig, missing: int, every: int) -> tuple[float, float]:
    """Return the median time of a step in ms, and its misses."""
    ids = in_turn(rig, missing, every, 2 * TOKENS)
    for part in np.split(ids, 2):
        rig.force(part)
        steps = rig.run(TOKENS)
    return float(np.median(steps.seconds)) * 1e3, float(steps.misses.mean())


def measure(args: argparse.Namespace) -> Iterator[Row]:
    with Rig(model_file(args.shape, args.layers), args.shape, "50%", 704, policy="lru") as rig:
        rig.prefill(512, seed=0)  # fill every slot
        rig.context(128)
        floor, _ = median_ms(rig, 0, 1)
        link = rig.bandwidths()[1]
        for missing in (1, 2, rig.k):
            for every in (1, 2, 8):
                ms, misses = median_ms(rig, missing, every)
                each = (ms - floor) / misses
                yield {**machine(), "shape": args.shape, "missing": missing, "every": every,
                       "floor_ms": f"{floor:.3f}", "ms": f"{ms:.3f}", "misses": f"{misses:.1f}",
                       "us_a_miss": f"{each * 1e3:.1f}", "gb_s": f"{rig.record / each / 1e6:.1f}",
                       "link_gb_s": f"{link / 1e9:.1f}"}  # fmt: skip


def parse_args(argv: list[str]) -> argparse.Namespace:
    options = parser("misses", __doc__)
    options.add_argument("--shape", default="gpt-oss-20b", choices=list(SHAPES))
    return options.parse_args(argv)


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    report("misses", measure(args), COLUMNS, args.out)
