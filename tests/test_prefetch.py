"""What --prefetch may say."""

from __future__ import annotations

import pytest

from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.prefetch import Gate


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("none", "none"),
        ("gate", "gate:d=1,p=0.05,n=2"),
        ("gate:d=2,p=0,n=1", "gate:d=2,p=0,n=1"),
        ("gate:n=3", "gate:d=1,p=0.05,n=3"),
    ],
)
def test_what_is_understood(spec: str, want: str) -> None:
    assert str(Gate.of(spec)) == want


@pytest.mark.parametrize(
    "spec",
    ["", "gates", "gate:", "gate:d=0", "gate:d=9", "gate:p=1.5", "gate:p=..", "gate:n=0", "gate:x=1", "gate:d=1.5"],
)
def test_what_is_not(spec: str) -> None:
    with pytest.raises(OffmoeError, match="is unknown: write none, or gate"):
        Gate.of(spec)


@pytest.mark.parametrize(
    ("scope", "slots", "most"), [("layer", 6, 2), ("layer", 5, 1), ("layer", 4, 0), ("global", 2, 2), ("global", 1, 0)]
)
def test_an_event_keeps_its_slots(scope: str, slots: int, most: int) -> None:
    table = Residency(4, 16, slots * 4, make_policy("lru", 64), scope)
    assert Gate.of("gate").within(table, 4).most == most


@pytest.mark.parametrize("settings", [{"prefetch": "gate"}, {"kv": "int8"}])
def test_the_cpu_refuses_what_only_a_gpu_can(settings: dict[str, str]) -> None:
    with pytest.raises(OffmoeError, match="works on a GPU, and the device is the CPU"):
        Engine.load(str(DEMO), device="cpu", **settings)
