"""A prompt's chunk through the GPU's path, its kernels interpreted: experts that stream past, stay or were there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exhaustive import cases
from tiny_models import FAMILIES, TELLING, reference, saved

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the engine itself", allow_module_level=True)

from interpreted_prefill import IDS, prefill

from offmoe.experts.vram_store import VramStore
from offmoe.kernels import row_blocks
from offmoe.mixers.heads import cache as head_cache

pytestmark = pytest.mark.usefixtures("whole_model")


@pytest.mark.parametrize(
    ("chunk", "batch", "vram"), cases([(10, 2, "50%"), (4, 8, "60%"), (5, 3, "100%")], [(10, 2, "50%"), (4, 8, "60%")])
)
@pytest.mark.parametrize(
    "family",
    cases(
        FAMILIES,
        TELLING,
    ),
)
def test_logits_are_those_of_transformers(family: str, chunk: int, batch: int, vram: str, tmp_path: Path) -> None:
    reference(family, IDS).check_logits(prefill(saved(family, tmp_path), chunk, batch, vram=vram))


@pytest.mark.parametrize("scope", cases(["layer", "global"], ["global"]))
def test_what_is_resident_changes_no_bit(scope: str, tmp_path: Path) -> None:
    path = saved("qwen3_moe", tmp_path)
    rows = [prefill(path, 5, batch, vram=vram, scope=scope) for batch, vram in ((1, "40%"), (3, "75%"), (8, "100%"))]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0], prefill(path, 5, 2, vram="50%", ram=0)), "out of a RAM tier that is too small"


def test_with_all_in_slots_the_host_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so has no need to wait for a router."""
    asked, access = [], VramStore.access
    monkeypatch.setattr(
        VramStore, "access", lambda self, layer, *rest: asked.append(layer) or access(self, layer, *rest)
    )
    prefill(saved("qwen3_moe", tmp_path), 5, 3, vram="100%")
    assert asked == sorted(set(asked)), "once a layer, when the slots were filled"


# A sigmoid over 12 experts: on the CPU, torch rounds it otherwise at the end of a tensor, which 10 · 12 values reach.
CUT = [family for family in FAMILIES if family != "glm4_moe-groups"]


@pytest.mark.parametrize("family", cases(CUT, TELLING))
def test_where_a_prompt_is_cut_changes_no_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between blocks of rows: what a later prompt has in common with this one need not be run again."""
    monkeypatch.setattr(row_blocks, "ROWS", 4)
    monkeypatch.setattr(head_cache, "SLACK", 6)  # rings that a prompt passes
    path = saved(family, tmp_path)
    whole = prefill(path, 10, 8, vram="100%")
    assert torch.equal(whole, prefill(path, 4, 8, vram="100%"))
    assert torch.equal(whole, prefill(path, 8, 3, vram="60%"))
