"""A cache policy of your own, replayed on a trace and run in an engine: `python examples/own_policy.py TRACE.npz`.

On the command line the same policy is `--policy examples/own_policy.py:Patient,h=64`.
"""

import sys
from pathlib import Path
from typing import ClassVar

import offmoe
from offmoe.cache.policies.base import Parameter
from offmoe.cache.policies.formula import Formula
from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace


class Patient(Formula):
    """Uses that fade as h ÷ (age + h): more slowly than an exponential for old records."""

    parameters: ClassVar = {"h": Parameter(default=16, low=1, high=4096)}

    @staticmethod
    def use(value, age, uses, h):
        """Return a record's value after it is used, `age` tokens after its last use."""
        return value * (h / (age + h)) + uses

    @staticmethod
    def worth(value, age, h):
        """Return the score of a record `age` tokens after its last use: the lowest one leaves."""
        return value * (h / (age + h))


if __name__ == "__main__":
    spec = f"{Path(__file__).resolve()}:Patient,h=32"
    trace = Trace.load(sys.argv[1])
    for policy in ("lru", "crf:h=16", spec):
        name = "Patient" if policy == spec else policy
        print(f"{name:10} {replay(trace, policy, trace.meta['experts'] // 2).hit_rate:.1%}")
    with offmoe.load("demo", vram="50%", policy=spec) as engine:
        for piece in engine.generate("What is the capital of France?", temperature=0, max_tokens=16):
            print(piece.text, end="", flush=True)
        print(f"\nin the engine: hit rate {engine.stats().hit_rate:.1%}")
