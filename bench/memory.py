"""Host memory and VRAM used to open and run a large GGUF, compared with the plan.

    python3 bench/memory.py [LAYERS]     a Qwen3-30B-A3B-shaped Q4_K file, 17.6 GB with all 48 layers

Every case is a process of its own. The VRAM used beyond the plan is what offmoe.plan.VRAM_MARGIN has to cover:
libraries, compiled kernels, graphs, fragmentation of torch's allocator. The last case on a GPU has only as much free
VRAM as a small card, and uses the default budget.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import write

from offmoe.engine import Engine
from offmoe.models.model import open_model
from offmoe.plan import VRAM_MARGIN
from offmoe.settings import Settings, format_size

CTX = 4608
PROMPT = {"cpu": 300, "cuda": 4400}  # more than a chunk on a GPU
SMALL_CARD = 12 << 30
CASES = {"cpu": (("30%", 300 << 20),), "cuda": (("25%", 4 << 30), ("50%", 32 << 30), ("25%", 0), ("", 32 << 30))}


def anonymous() -> int:
    """Return the bytes of this process that are not backed by a file, including memory pinned for a GPU."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def measure(path: Path, device: str, vram: str, ram: int) -> None:
    """Run one case in this process; "" is the default."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0  # as the plan sees it: CUDA's context exists
    before, began = anonymous(), time.perf_counter()
    settings = Settings.of(device=device, vram=vram or None, ram=ram, ctx=CTX)
    with Engine(open_model(path), settings) as engine:
        opened = time.perf_counter() - began
        list(engine.generate(list(range(100, 100 + PROMPT[device])), temperature=0.0, max_tokens=32))
        plan = engine.plan
        print(f"{path.stat().st_size} bytes, {plan.summary()}", *engine.notes)
        host = plan.ram_bytes + (plan.resident_bytes if device == "cpu" else 0)
        print(f"  open {opened:.1f} s; anonymous and pinned {beyond(anonymous() - before, host)}")
        if device == "cuda":
            left = torch.cuda.mem_get_info()[0]
            print(
                f"  VRAM {beyond(free - left, plan.resident_bytes)} (margin {format_size(VRAM_MARGIN)}); "
                f"left {format_size(left)}, torch took {format_size(torch.cuda.max_memory_reserved())} and used "
                f"{format_size(torch.cuda.max_memory_allocated())}, {retries()} retries"
            )
        stats = engine.stats()  # measures bandwidths in the remaining VRAM
        print(f"  prefill {stats.prefill_tok_s:.0f} tok/s, decode {stats.decode_tok_s:.2f} tok/s, {stats.roof}")
        paged, read = stats.pcie_bytes_per_token, stats.nvme_bytes_per_token
        print(
            f"  hit {stats.hit_rate:.1%}, stall {stats.stall_ms_per_token:.1f} ms per token; "
            f"{format_size(paged)} per token over the link, {format_size(read)} from disk"
        )


def beyond(taken: int, planned: int) -> str:
    way = "beyond" if taken > planned else "below"
    return f"{format_size(taken)}, planned {format_size(planned)}: {format_size(abs(taken - planned))} {way}"


def retries() -> int:
    return int(torch.cuda.memory_stats()["num_alloc_retries"])


def main(layers: int | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "qwen3.gguf", time.perf_counter()
        write("qwen3-30b-a3b", path, layers)
        print(f"written in {time.perf_counter() - began:.1f} s", flush=True)
        for vram, ram in CASES[device]:
            occupied = None
            if device == "cuda" and not vram:  # occupy the rest of the card
                occupied = torch.empty(torch.cuda.mem_get_info()[0] - SMALL_CARD, dtype=torch.uint8, device=device)
            subprocess.run([sys.executable, __file__, "case", path, device, vram, str(ram)], check=True)
            del occupied


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        measure(Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else None)
