"""The roof: set by the slowest resource of the session, above every answer, and not lowered by a disturbed one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from offmoe.experts.store import Counters, ExpertStore
from offmoe.stats import roof as module
from offmoe.stats.meter import Meter
from offmoe.stats.roof import FASTEST, MEASURED, REACHED, Bounds, TokenCost

COST = TokenCost(vram_bytes=4e6, pcie_bytes=1e6, nvme_bytes=0.0, mean_s=0.020, floor_s=0.008)


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """Limits of a machine with 1 GB/s of memory, 100 MB/s of link and 10 MB/s of disk."""
    for name, rate in (("slot_bandwidth", 1e9), ("link_bandwidth", 1e8), ("disk_bandwidth", (1e7, True))):
        monkeypatch.setattr(module, name, lambda _, rate=rate: rate)
    return Bounds(torch.device("cpu"), Path("model.gguf"))


@pytest.mark.parametrize(
    ("change", "limit", "seconds", "source"),
    [
        ({}, "pcie", 0.010, MEASURED),
        ({"pcie_bytes": 0.0}, "floor", 0.008, FASTEST),
        ({"vram_bytes": 16e6}, "vram", 0.016, MEASURED),
        ({"nvme_bytes": 15e4}, "nvme", 0.015, MEASURED),
        ({"pcie_bytes": 4e6}, "pcie", 0.020, REACHED),  # 4 MB in 20 ms: 200 MB/s
    ],
)
def test_the_slowest_resource_sets_it(
    bounds: Bounds, change: dict[str, float], limit: str, seconds: float, source: str
) -> None:
    found = bounds.roof(replace(COST, **change))
    assert (found.limit, found.source) == (limit, source)
    assert found.tok_s == pytest.approx(1 / seconds)


def test_no_answer_passes_it_and_none_lowers_it(bounds: Bounds) -> None:
    hits = replace(COST, pcie_bytes=0.0)
    quiet = bounds.roof(hits)
    disturbed = bounds.roof(replace(hits, mean_s=0.100, floor_s=0.050))
    assert disturbed == quiet, "a slow answer says nothing about what is possible"
    for mean_s in (0.009, 0.006, 0.004, 0.007):
        assert bounds.roof(replace(hits, mean_s=mean_s, floor_s=0.9 * mean_s)).tok_s >= 1 / mean_s
    assert bounds.roof(hits).tok_s == pytest.approx(1 / 0.004), "16 MB/s of memory are known to be possible"


def test_a_bandwidth_that_was_reached_is_remembered(bounds: Bounds) -> None:
    bounds.roof(replace(COST, pcie_bytes=4e6))
    assert bounds.roof(COST).tok_s == pytest.approx(1 / 0.008), "1 MB takes 5 ms at 200 MB/s: the floor is slower"


def metered(*steps: tuple[float, float]) -> Meter:
    """Meter of an answer whose steps took (seconds, stall in them)."""
    store = SimpleNamespace(counters=Counters())
    meter = Meter(cast(ExpertStore, store), submitted=0.0, prompt_tokens=1)
    meter.prefilled(0.0)
    for seconds, stall in steps:
        store.counters = replace(store.counters, stall_s=store.counters.stall_s + stall, routed=1)
        meter.stepped(seconds, context=1)
    return meter


def cost(meter: Meter) -> TokenCost:
    plan: Any = SimpleNamespace(kv_bytes=0, ctx=1, state_bytes=0)
    found = meter.cost(plan, trunk_bytes=1, used_record_bytes=0.0)
    assert found is not None
    return found


def test_the_floor_is_the_fastest_step_without_its_stall() -> None:
    found = cost(metered((0.010, 0.001), (0.030, 0.024), (0.012, 0.0), (5.0, 0.0)))
    assert found.floor_s == pytest.approx(0.006)
    assert found.mean_s == pytest.approx(5.052 / 4)


def test_a_measured_floor_gives_the_stall_and_bounds_the_roof() -> None:
    meter = metered((0.010, 0.0), (0.012, 0.0))
    meter.floored(0.008)
    assert meter.decoded.stall_s == pytest.approx(0.006)
    assert cost(meter).floor_s == pytest.approx(0.008)
    slow = metered((0.010, 0.0))
    slow.floored(0.020)
    assert slow.decoded.stall_s == 0.0
    assert cost(slow).floor_s == pytest.approx(0.010)
