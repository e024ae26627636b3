"""What opening and running a large GGUF really takes of host memory and of VRAM, against what was planned.

python bench/memory.py [LAYERS]     a Qwen3-30B-A3B-shaped Q4_K file, 17.6 GB with all 48 layers
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import write

from offmoe.engine import Engine
from offmoe.models.model import open_model
from offmoe.settings import Settings, format_size

CTX = 4608
PROMPT = {"cpu": 300, "cuda": 4400}  # more than a chunk on a GPU


def anonymous() -> int:
    """Bytes of this process that are no file's; memory pinned for a GPU lies here too."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def measure(path: Path, device: str, vram: str, ram: int) -> None:
    if device == "cuda":
        half = torch.ones((64, 64), device="cuda", dtype=torch.bfloat16)
        (half @ half).softmax(-1).cpu()  # what CUDA and its libraries take once (0.8 GB) is not the engine's
        free = torch.cuda.mem_get_info()[0]
    before, began = anonymous(), time.perf_counter()
    settings = Settings.of(device=device, vram=vram, ram=ram, ctx=CTX)
    with Engine(open_model(path), settings) as engine:
        opened = time.perf_counter() - began
        list(engine.generate(list(range(100, 100 + PROMPT[device])), temperature=0.0, max_tokens=32))
        plan, stats = engine.plan, engine.stats()
        budget = plan.ram_bytes
        if device == "cpu":
            budget += plan.real_slot_bytes + plan.trunk_bytes + plan.kv_bytes
        taken = anonymous() - before
        size, paged, read = path.stat().st_size, stats.pcie_bytes_per_token, stats.nvme_bytes_per_token
        print(f"{size} bytes, {plan.summary()}")
        print(f"  open {opened:.1f} s; anonymous and pinned {format_size(taken)}, budgets {format_size(budget)}")
        print(f"  beyond the budgets: {(taken - budget) / size:+.1%} of the file")
        if device == "cuda":
            planned = plan.real_slot_bytes + plan.trunk_bytes + plan.kv_bytes + plan.workspace_bytes
            used = free - torch.cuda.mem_get_info()[0]
            print(f"  VRAM {format_size(used)}, planned {format_size(planned)}: {format_size(abs(used - planned))} "
                  f"{'beyond' if used > planned else 'below'}")  # fmt: skip
        print(f"  prefill {stats.prefill_tok_s:.0f} tok/s, decode {stats.decode_tok_s:.2f} tok/s, {stats.roof}")
        print(f"  hit {stats.hit_rate:.1%}, stall {stats.stall_ms_per_token:.1f} ms a token")
        print(f"  {format_size(paged)} a token over the link, {format_size(read)} from disk")


if __name__ == "__main__":
    layers = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qwen3.gguf"
        began = time.perf_counter()
        write("qwen3-30b-a3b", path, layers)
        print(f"written in {time.perf_counter() - began:.1f} s")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for vram, ram in (
            (("25%", 4 << 30), ("50%", 32 << 30), ("25%", 0)) if device == "cuda" else (("30%", 300 << 20),)
        ):
            measure(path, device, vram, ram)
