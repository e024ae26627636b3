"""Shared parts of the GPU benchmarks: an adapter of the engine, model files, the machine, llama.cpp's results."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import shapes
import torch
from numpy.typing import NDArray

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.machine.bandwidth import link_bandwidth, vram_bandwidth
from offmoe.models.model import open_model
from offmoe.settings import Settings

Row = dict[str, Any]
Floats = NDArray[np.float64]
# llama.cpp on an H200 in an earlier run, tok/s: (shape, % of experts in VRAM, prompt, generated, depth).
EARLIER = {
    ("qwen3-30b-a3b", cap, *test): speed
    for test, speeds in {
        (0, 128, 0): {100: 292, 75: 123, 50: 79, 25: 55},
        (0, 128, 32768): {100: 196, 50: 61},
        (512, 0, 0): {100: 10828, 75: 2021, 50: 1613, 25: 1651},
        (4096, 0, 0): {100: 12809, 50: 6449, 25: 6628},
    }.items()
    for cap, speed in speeds.items()
}


@dataclass(frozen=True)
class Steps:
    """Decoded steps, one value per step."""

    seconds: Floats
    hits: Floats  # experts that were in slots, including prefetched ones
    covered: Floats  # hits due to prefetching
    late: Floats  # prefetched experts that had not arrived yet
    misses: Floats  # experts neither in slots nor on their way
    uploads: Floats  # experts that crossed the link, including prefetched ones


class Rig:
    """An engine on the GPU. Only this class uses the engine: when its names change, adapt them here."""

    def __init__(self, path: Path, shape: str, vram: str, ctx: int, **settings: Any) -> None:
        settings = {name: value for name, value in settings.items() if value is not None}
        chosen = Settings.of(device="cuda", vram=vram, ram=path.stat().st_size + (1 << 30), ctx=ctx, **settings)
        self.model = open_model(path)
        self.shape, self.path, self.kv = shape, path, settings.get("kv")
        self.engine = Engine(self.model, chosen)
        c = self.model.config
        self.layers, self.experts, self.k, self.vocab = c.moe_layers, c.experts, c.top_k, c.vocab
        self.slots = self.engine.plan.slots // c.moe_layers  # per layer
        self.record = self.model.record_bytes / self.model.records
        self.device = self.engine.plan.device
        self._wait_loaded()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.engine.close()
        torch.cuda.empty_cache()

    def prefill(self, tokens: int, seed: int) -> tuple[float, float]:
        """Run a new prompt of random ids; return seconds and bytes over the link."""
        ids = np.random.default_rng(seed).integers(0, self.vocab, tokens).tolist()
        self.engine.reset()
        before = self.engine.store.counters.pcie_bytes
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.engine.prefill(ids)
        torch.cuda.synchronize()
        return time.perf_counter() - began, float(self.engine.store.counters.pcie_bytes - before)

    def context(self, tokens: int) -> None:
        """Fill `tokens` positions of the KV cache, with zeros if a prefill would take long."""
        if tokens <= 1024:
            self.prefill(tokens, seed=tokens)
        else:
            self.engine.reset()
            self.engine.kv.pretend(tokens)

    def force(self, ids: NDArray[np.int16] | None, predicted: NDArray[np.int16] | None = None) -> None:
        """Set the routing of the next `run`, from the first row on; None restores the router."""
        self.engine.decoder.force(ids)
        self.engine.decoder.emulate(predicted)

    def run(self, tokens: int) -> Steps:
        """Decode `tokens` tokens."""
        found = self.engine.decoder.run(tokens)
        names = ("seconds", "hits", "covered", "late", "misses", "uploads")
        return Steps(*(np.asarray(getattr(found, name), np.float64) for name in names))

    def floor(self, ids: NDArray[np.int16], steps: int = 40) -> float:
        """Return the seconds of a step in which every expert hits: one token's experts repeated, at the current
        context.
        """
        self.force(np.repeat(ids[:1], steps, axis=0))
        found = self.run(steps)
        settled = found.seconds[8:][(found.misses + found.late)[8:] == 0]
        return float(np.median(settled)) if len(settled) else float("nan")

    def vram_bytes(self, context: float) -> float:
        """Return the bytes that a token reads: the trunk (of the embedding only one row), its experts, the KV cache,
        and the recurrent states, which are also written.
        """
        plan, embed = self.engine.plan, self.model.find("embed")
        assert embed is not None
        trunk = plan.trunk_bytes - (0 if self.model.config.stream.tied else embed.range.nbytes)
        return trunk + self.layers * self.k * self.record + plan.kv_bytes / plan.ctx * context + 2 * plan.state_bytes

    def bandwidths(self) -> tuple[float, float]:
        """Return the bandwidths of VRAM and of the link in bytes/s, measured once per process."""
        return vram_bandwidth(self.device), link_bandwidth(self.device)

    def _wait_loaded(self) -> None:
        """Wait until all experts are read from the disk, which is not measured here."""
        if not self.engine.plan.all_in_slots:
            self.engine.store.ram.wait_complete()


def model_file(shape: str, layers: int | None = None) -> Path:
    """Return the GGUF of a shape, which is written once."""
    if shape == "demo":
        return DEMO
    folder = Path(tempfile.gettempdir()) / "offmoe-bench"
    folder.mkdir(exist_ok=True)
    path = folder / f"{shape}{f'-{layers}' if layers else ''}.gguf"
    if not path.exists():
        began = time.perf_counter()
        part = path.with_suffix(".part")
        shapes.write(shape, part, layers)
        part.rename(path)
        print(f"# {path}: {path.stat().st_size / 1e9:.1f} GB written in {time.perf_counter() - began:.1f} s")
    return path


def machine() -> Row:
    import triton

    commit = os.environ.get("OFFMOE_COMMIT")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


class Peer:
    """llama-bench's rows of this run (`bench/peer.sh bench`), else those of an earlier one."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[Row] = []
        if path is not None and path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def speed(self, shape: str, layers: int, cap: float, prompt: int, generated: int, depth: int) -> tuple[float, str]:
        """Return tok/s and their source, or 0 if unknown. Static placement: the experts of whole layers are in VRAM."""
        on_cpu = layers * (100 - cap) / 100
        for row in self.rows:
            same = (int(row["n_prompt"]), int(row["n_depth"]), int(row["n_cpu_moe"])) == (prompt, depth, on_cpu)
            if same and (int(row["n_gen"]) > 0) == (generated > 0) and Path(row["model_filename"]).stem == shape:
                return float(row["avg_ts"]), "this call"
        speed = EARLIER.get((shape, int(cap), prompt, generated, depth))
        return (float(speed), "an earlier call") if speed else (0.0, "")


def add_row(out: Path, row: Row) -> None:
    """Append a row at once, so that it is kept even if the next cell fails."""
    fresh = not out.exists() or not out.stat().st_size
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Return a table; `columns` maps names to headings. Text is aligned left, numbers right."""
    lines = [list(columns.values())] + [[str(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = [all(isinstance(row[name], str) for row in rows) for name in columns]
    return "\n".join(
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def parser(what: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all engine benchmarks; rows go to `what`.csv."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--layers", type=int, help="number of layers, if not the shape's own")
    result.add_argument("--out", type=Path, default=Path(f"bench/results/{what}.csv"))
    return result


def report(what: str, result: Iterator[Row], columns: dict[str, str], out: Path) -> None:
    """Write rows to the file and to the screen as they are made, and a table of all at the end."""
    if not torch.cuda.is_available():
        raise SystemExit(f"bench/{what}.py measures a GPU, and torch sees none")
    rows = []
    for row in result:
        rows.append(row)
        add_row(out, row)
        print("  ".join(f"{row[name]}" for name in columns), flush=True)
    print(f"\n{what}, {rows[0]['shape']} on {rows[0]['gpu']}, commit {rows[0]['commit']}\n{table(rows, columns)}")


if __name__ == "__main__":
    if sys.argv[1] == "--peer":
        found = Peer(Path(sys.argv[2])).rows
        names = ("n_cpu_moe", "n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts")
        print(table([{name: row[name] for name in names} for row in found], dict(zip(names, names, strict=True))))
    else:
        print(model_file(sys.argv[1]))
