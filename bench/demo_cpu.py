"""Demo model on a machine without a GPU, compared with llama.cpp on the same file and with as many threads.

    python -P bench/demo_cpu.py bench/results/demo-cpu.csv

llama.cpp comes from offmoe[llama], installed with pip: `make` compiles it without AMX.

The configurations are measured in interleaved rounds, so that they see the same load of the machine; a figure is the
median of the rounds, with minimum and maximum. Absolute times on a shared machine mean little: read the ratios.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

import offmoe
from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine

ROUNDS, TOKENS = 7, 64
PROMPT = "Tell me a short story about a fox who learns to share."
COLUMNS = ("commit", "cpu", "torch", "figure", "median", "low", "high", "unit", "target", "how")
Row = dict[str, object]


def decode(engine: Engine) -> float:
    """Return tokens per second over TOKENS greedy ones."""
    list(engine.generate(PROMPT, temperature=0.0, max_tokens=TOKENS))
    return engine.stats().decode_tok_s


def roof(engine: Engine) -> float:
    found = engine.stats().roof
    return found.tok_s if found else 0.0


def first_token(engine: Engine) -> float:
    """Return the seconds from a new prompt of about 30 tokens to its first token."""
    engine.reset()
    list(engine.generate("How do I boil an egg so that the yolk stays soft? Tell me in short.", max_tokens=1))
    return engine.stats().ttft_s


def start() -> float:
    """Return the seconds of a whole `offmoe chat` that exits at once."""
    began = time.perf_counter()
    command = [sys.executable, "-P", "-m", "offmoe", "chat"]
    subprocess.run(command, input=b"/exit\n", capture_output=True, check=True)
    return time.perf_counter() - began


def llama_decoder(threads: int) -> Callable[[], float]:
    """Return a decoder with llama.cpp: greedy, the same prompt, without the cost of a sampler."""
    from llama_cpp import Llama

    llama = Llama(str(DEMO), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = llama.tokenize(PROMPT.encode())

    def run() -> float:
        llama.reset()
        llama.eval(prompt)
        began = time.perf_counter()
        for _ in range(TOKENS):
            llama.eval([llama.sample(temp=0.0)])
        return TOKENS / (time.perf_counter() - began)

    return run


def needs(name: str, without: frozenset[str] = frozenset()) -> set[str]:
    """Return `name` and its requirements, recursively, without extras."""
    found, asked = set(without), [name]
    while asked:
        if (package := asked.pop().lower().replace("_", "-")) not in found:
            found.add(package)
            requirements = (Requirement(line) for line in metadata.requires(package) or [])
            asked += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found - without


def installed_mb() -> float:
    """Return the size of all files of offmoe and its requirements, in MB, without torch and requirements that only
    torch has.
    """
    shared = needs("jinja2")
    ours = needs("offmoe", without=frozenset(needs("torch") - shared)) - {"offmoe"}
    files = [file for name in ours for file in metadata.files(name) or []]
    folder = Path(offmoe.__file__).parent
    paths = [Path(str(file.locate())) for file in files] + [p for p in folder.rglob("*") if p.is_file()]
    return sum(path.stat().st_size for path in paths if path.exists()) / 1e6


def measure() -> list[Row]:
    with ExitStack() as stack:
        engines = {
            share: stack.enter_context(Engine.load(str(DEMO), device="cpu", ctx=512, vram=share))
            for share in ("100%", "50%")
        }
        runs: dict[str, Callable[[], float]] = {
            "decode, all in slots": lambda: decode(engines["100%"]),
            "its roof": lambda: roof(engines["100%"]),
            "decode, half in slots": lambda: decode(engines["50%"]),
            "roof at half": lambda: roof(engines["50%"]),
            "first token": lambda: first_token(engines["100%"]),
        }
        threads = os.cpu_count() or 1
        if importlib.util.find_spec("llama_cpp"):
            runs["llama.cpp"] = llama_decoder(threads)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for round_index in range(ROUNDS + 1):
            for name, run in runs.items():
                value = run()
                if round_index:  # the first round warms up
                    samples[name].append(value)
        hits = engines["50%"].stats().hit_rate
    starts = [start() for _ in range(4)][1:]
    rows = [
        row("decode, all in slots", samples["decode, all in slots"], "tok/s", "≥ 25", f"{TOKENS} greedy tokens"),
        row("its roof", samples["its roof"], "tok/s", "", "the measured time with all hits"),
        row(
            "decode, half in slots", samples["decode, half in slots"], "tok/s", "≥ 10", f"hit rate {hits:.1%}, crf:h=16"
        ),
        row("roof at half", samples["roof at half"], "tok/s", "", "floor"),
        row("first token", samples["first token"], "s", "≤ 1", "32-token prompt, warm engine, nothing reused"),
        row("second start", starts, "s", "≤ 3", "`offmoe chat` with /exit, whole process"),
        row(
            "installed size", [installed_mb()], "MB", "≤ 200", "files, without torch and what it needs, without extras"
        ),
    ]
    if "llama.cpp" in samples:
        ratios = [ours / theirs for ours, theirs in zip(samples[rows[0]["figure"]], samples["llama.cpp"], strict=True)]
        rows.append(row("llama.cpp", samples["llama.cpp"], "tok/s", "", f"the peer: {threads} threads, same file"))
        rows.append(row("decode ÷ llama.cpp", ratios, "×", "≥ 0.25", "all in slots, round by round"))
    return rows


def row(figure: str, values: list[float], unit: str, target: str, how: str) -> Row:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {
        "figure": figure,
        "median": f"{middle:.3g}",
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "unit": unit,
        "target": target,
        "how": how,
    }


def machine() -> Row:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"commit": commit.stdout.strip(), "cpu": f"{os.cpu_count()} × {name}", "torch": torch.__version__}


def main(out: Path) -> None:
    machine_row = machine()
    rows = [{**machine_row, **values} for values in measure()]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for values in rows:
        print("{figure:24} {median:>6} ({low} … {high}) {unit:5} {target:7} {how}".format(**values))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
