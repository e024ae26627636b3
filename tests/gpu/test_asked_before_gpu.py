"""The same question gives the same answer on a GPU, to the bit, whatever was asked before.

A prompt's beginning is continued at multiples of row_blocks.ROWS: every operation of a chunk gives a row the same bits
however many rows run with it. If one does not, ROWS = 1 << 30 makes a block of a whole chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asked_before import GREEDY, ask, check_asked_before, questions
from gemm_checks import EXPERTS, addresses_of, scaled
from packed_files import packed
from paths import ROOT
from quantised_matrices import TESTED, filled_slots, random_records
from tiny_models import FAMILIES, saved

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.kernels import row_blocks
from offmoe.kernels.gpu.gemm import blocks, expert_mlp, plan_tiles
from offmoe.kernels.planes import slot_layout
from offmoe.kernels.record import RecordLayout
from offmoe.mixers.heads import cache as head_cache
from offmoe.models.model import open_model
from offmoe.settings import Settings

SIXTEEN = [torch.bfloat16, torch.float16]
IDS = torch.randint(3, 96, (240,), generator=torch.Generator().manual_seed(9)).tolist()
LENGTHS = (1, 16, 17, 48, 95, 150)
ROWS = 16


def engine_of(path: Path, **settings: Any) -> Engine:
    chosen = {"device": "cuda", "ctx": 256, "chunk": 4 * ROWS, "ram": "64MiB", "dtype": "bf16", **settings}
    return Engine(open_model(path), Settings.of(**chosen))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, and rings that are lost now and then."""
    monkeypatch.setattr(row_blocks, "ROWS", ROWS)
    monkeypatch.setattr(head_cache, "SLACK", 100)


@pytest.mark.parametrize("routing", ["even", "skewed"])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("fmt", TESTED)
def test_tiles_of_every_size_give_the_same_bits(fmt: str, dtype: torch.dtype, routing: str) -> None:
    """A chunk's number of pairs chooses the size, H 2048 and F 768 as in a real layer."""
    record = RecordLayout.of(("gate", fmt, 768, 2048), ("up", fmt, 768, 2048), ("down", fmt, 2048, 768))
    layout = slot_layout(record)
    slots = filled_slots(random_records(record, EXPERTS), layout, list(range(EXPERTS)), EXPERTS).cuda()
    x = 0.1 * scaled(300, layout, dtype)
    weights = torch.ones(EXPERTS) if routing == "even" else torch.tensor([8.0, 2.0, 1.0, 0.1])
    ids = torch.multinomial(weights.expand(300, -1), 2, generator=torch.Generator().manual_seed(5)).cuda()
    addresses = addresses_of(slots, {expert: expert for expert in range(EXPERTS)})
    results = []
    for block in blocks(dtype):
        out = torch.full((ids.numel(), layout.hidden), torch.nan, dtype=dtype, device="cuda")
        expert_mlp(x, ids, plan_tiles(ids, EXPERTS, dtype, block), addresses, layout, out)
        results.append(out)
    few = torch.full((100, layout.hidden), torch.nan, dtype=dtype, device="cuda")
    expert_mlp(x[:50].contiguous(), ids[:50].contiguous(), plan_tiles(ids[:50].contiguous(), EXPERTS, dtype), addresses,
               layout, few)  # fmt: skip
    assert results[0].isfinite().all()
    for block, out in zip(blocks(dtype), results, strict=True):
        assert torch.equal(out, results[0]), f"{block} pairs a tile"
    assert torch.equal(few, results[0][:100]), "with other pairs"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("settings", [{"dtype": "bf16", "vram": "60%"}, {"dtype": "f16", "vram": "100%"},
                                      {"dtype": "bf16", "vram": "60%", "kv": "int8"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = saved(family, tmp_path)
    if settings.get("kv") and not all(mixer.int8_cache for mixer in open_model(path).config.mixers):
        pytest.skip("its cache has no int8")
    with engine_of(path, **settings) as asked:
        prompts = questions(IDS, LENGTHS)
        reused = check_asked_before(asked, prompts, 5)
        assert max(reused) == max(map(len, prompts)), "an exact repeat runs nothing"
        assert any(0 < count < len(IDS) and count % ROWS == 0 for count in reused)
        asked.store.check()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_0", "MXFP4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_quantised_weights(family: str, fmt: str, tmp_path: Path) -> None:
    with engine_of(packed(saved(family, tmp_path), tmp_path, fmt), vram="60%") as asked:
        check_asked_before(asked, questions(IDS, LENGTHS), 5)


def text_of(engine: Engine, kind: str) -> list[int]:
    """3,500 ids: of English text and code, whose routing is skewed, or drawn evenly."""
    if kind == "drawn":
        generator = torch.Generator().manual_seed(2)
        return torch.randint(100, engine.config.vocab, (3500,), generator=generator).tolist()
    assert engine.tokenizer is not None
    text = (ROOT / "README.md").read_text("utf-8") + (ROOT / "offmoe" / "engine.py").read_text("utf-8")
    return engine.tokenizer.encode(text * 3)[:3500]


@pytest.mark.parametrize("kind", ["text", "drawn"])
@pytest.mark.parametrize("settings", [{"dtype": "bf16", "vram": "50%"}, {"dtype": "f16", "vram": "100%"},
                                      {"dtype": "bf16", "vram": "100%", "kv": "int8"}], ids=str)  # fmt: skip
def test_long_prompts_in_real_blocks(settings: dict[str, Any], kind: str) -> None:
    """Chunks of 2,048 tokens cut in several places."""
    with Engine.load(str(DEMO), device="cuda", ctx=4096, chunk=2048, **settings) as engine:
        ids = text_of(engine, kind)
        reused = check_asked_before(engine, questions(ids, (300, 512, 513, 1100, 2049, 3400)), 8)
        assert {row_blocks.ROWS, 2 * row_blocks.ROWS} & set(reused)


@pytest.mark.parametrize("chunk", [4096, 512, 1000])
def test_the_size_of_a_chunk_changes_no_bit(chunk: int) -> None:
    """Multiples of a block: 512 tokens, and no others, are run in 1,000 too."""
    with (
        Engine.load(str(DEMO), device="cuda", ctx=4096, dtype="bf16", vram="50%", chunk=chunk) as engine,
        Engine.load(str(DEMO), device="cuda", ctx=4096, dtype="bf16", vram="100%", chunk=2048) as other,
    ):
        ids = text_of(engine, "text")
        for length in (40, 512, 700, 1537, 3000):
            got, want = ask(engine, ids[:length], 8), ask(other, ids[:length], 8)
            assert torch.equal(got.logits, want.logits), length
            assert got.tokens == want.tokens


def test_a_conversation_goes_on_as_if_it_began_anew() -> None:
    """Answers are run again with the next message, from the last block on."""
    settings = {"device": "cuda", "ctx": 4096, "dtype": "bf16"}
    with Engine.load(str(DEMO), vram="50%", **settings) as talking, Engine.load(str(DEMO), **settings) as other:
        turns: list[int] = []
        before, ids = 0, text_of(talking, "text")
        for turn in range(5):
            turns += ids[600 * turn : 600 * turn + 600]
            got = ask(talking, turns, 40)
            other.reset()
            want = ask(other, turns, 40, **GREEDY)
            assert torch.equal(got.logits, want.logits)
            assert got.tokens == want.tokens
            assert got.reused == before // row_blocks.ROWS * row_blocks.ROWS
            before = len(turns)
            turns += got.tokens
