"""The roof can be measured while a model fills the card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.machine.bandwidth import pcie_bandwidth, vram_bandwidth

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def nearly_full() -> Iterator[None]:
    """150 MiB more, and torch gives nothing."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + (150 << 20)) / total, DEVICE)
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.mark.usefixtures("nearly_full")
def test_bandwidths_on_a_full_card() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1 << 28, device=DEVICE)
    assert vram_bandwidth.__wrapped__(DEVICE) > 1e10
    assert pcie_bandwidth.__wrapped__(DEVICE) > 1e9
