"""Bandwidths can be measured while a model fills the card."""

from __future__ import annotations

import pytest
import torch

from offmoe.machine.bandwidth import MIB, as_much_as_fits

CPU = torch.device("cpu")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.ones finds so many bytes free."""
    left, ones = {"bytes": 0}, torch.ones

    def limited(count: int, device: torch.device) -> torch.Tensor:
        if count * 4 > left["bytes"]:
            raise torch.OutOfMemoryError
        return ones(count, device=device)

    monkeypatch.setattr(torch, "ones", limited)
    return left


@pytest.mark.parametrize(("free", "got"), [(16, 16), (15, 8), (3, 2), (1, 1)])
def test_a_block_takes_what_is_free(room: dict[str, int], free: int, got: int) -> None:
    room["bytes"] = free * MIB
    assert as_much_as_fits(16 * MIB, CPU).nbytes == got * MIB


def test_less_than_a_sixteenth_measures_nothing(room: dict[str, int]) -> None:
    room["bytes"] = MIB - 4
    with pytest.raises(torch.OutOfMemoryError):
        as_much_as_fits(16 * MIB, CPU)
