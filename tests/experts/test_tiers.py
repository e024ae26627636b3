"""Memory as planned, and failures below the engine: a clear error, then the same tokens as before."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustive import cases
from tiny_models import tiny

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.machine import disk_reader as transfer

LIBRARIES = 80 << 20  # threads, allocator, lazily loaded code: 21 to 50 MiB were seen, whatever the model
PROMPT = "Give me three tips for staying healthy."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(DEMO, tmp_path / "model.gguf"))


def load(model: Path, **settings: Any) -> Engine:
    return Engine.load(str(model), **{"device": "cpu", "ctx": 128, "vram": "31.25%", "ram": 0, **settings})


def answer(engine: Engine) -> list[int]:
    list(engine.generate(PROMPT, temperature=0.0, max_tokens=6))
    engine.store.check()
    return engine.answer_tokens


def answers(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.reset()
        answer(engine)


@pytest.mark.parametrize("ram", [0, 480 * 31232])
def test_a_file_that_shrinks_in_use_is_an_error_and_no_wrong_token(model: Path, ram: int) -> None:
    with load(model, ram=ram) as engine:
        tokens = answer(engine)
        whole = model.read_bytes()
        os.truncate(model, 12 << 20)
        with pytest.raises(OffmoeError, match=r"model.gguf failed: it ends at byte \d+: it shrank while in use"):
            answers(engine, 3)  # the first may need only what is resident
        engine.store.check()
        model.write_bytes(whole)  # the same inode: the descriptors see it
        engine.reset()
        assert answer(engine) == tokens


def test_a_disk_that_fails_now_and_then_is_an_error_each_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model) as engine:
        tokens = answer(engine)
        read, calls = transfer.read_fully, iter(range(10**9))

        def flaky(*arguments: Any) -> int:
            if next(calls) % 97 == 96:
                raise OSError(errno.EIO, "Input/output error")
            return read(*arguments)

        monkeypatch.setattr(transfer, "read_fully", flaky)
        for _ in range(3):
            engine.reset()
            with pytest.raises(OffmoeError, match="Input/output error"):
                answer(engine)
            engine.store.check()
        monkeypatch.undo()
        engine.reset()
        assert answer(engine) == tokens


def test_the_background_fill_reads_every_record_once(model: Path) -> None:
    with load(model, ram="64MiB") as engine:
        answer(engine)
        for read in list(engine.store.ram._reads.values()):
            read.done.result(timeout=30)
        engine.store.ram._land_finished()
        assert not engine.store.ram.table.arriving.any()
        assert (engine.store.ram.table.slot_of >= 0).all()
        layer, expert = 17, 23
        row = engine.store.ram.table.slot_of[layer * 32 + expert]
        want = torch.cat([engine.model.checkpoint.read_range(part) for part in engine.model.ranges(layer, expert)])
        assert torch.equal(engine.store.ram.rows[row, : want.numel()], want)


def test_closing_while_the_background_fill_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model, ram="64MiB") as engine:
        reads = list(engine.store.ram._reads.values())
    assert all(read.done.done() for read in reads), "nobody waits for ever"


MEASURE = """
import sys
from offmoe.engine import Engine
from offmoe.models.model import open_model
from offmoe.settings import Settings

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))

import torch
torch.ones(64, 512) @ torch.ones(512, 2048)  # MKL keeps buffers
before = anonymous()
engine = Engine(open_model(sys.argv[1]), Settings.of(device="cpu", vram=sys.argv[2], ram=int(sys.argv[3]), ctx=128))
list(engine.generate(list(range(3, 60)), temperature=0.0, max_tokens=6))
plan = engine.plan
print(anonymous() - before, plan.ram_bytes + plan.real_slot_bytes + plan.trunk_bytes + plan.kv_bytes)
"""


@pytest.mark.parametrize(("vram", "ram"), cases([("12.5%", 0), ("50%", 60 << 20)], [("12.5%", 0)]))
def test_memory_stays_within_the_budgets(vram: str, ram: int, tmp_path: Path) -> None:
    """In a process of its own; 5 % of the file is left for activations and what libraries take."""
    config = type(tiny("mixtral").config)(
        vocab_size=96, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    type(tiny("mixtral"))(config).to(torch.bfloat16).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    script = [sys.executable, "-P", "-c", MEASURE, str(tmp_path), vram, str(ram)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, budget = map(int, done.stdout.split())
    assert taken <= budget + size // 20 + LIBRARIES, f"{taken} bytes for budgets of {budget}, the file has {size}"
