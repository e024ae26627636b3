"""The roof of decode speed: each tier's bytes divided by its measured bandwidth, and the time without misses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from offmoe.machine.bandwidth import disk_bandwidth, link_bandwidth, slot_bandwidth
from offmoe.stats.stats import Roof


@dataclass(frozen=True)
class TokenCost:
    """Mean bytes that a decoded token moves from each tier, and its time without stalls."""

    vram_bytes: float
    pcie_bytes: float
    nvme_bytes: float
    floor_s: float


def roof(cost: TokenCost, device: torch.device, file: Path) -> Roof:
    """Return the bound set by the slowest resource, assuming perfect overlap. Bandwidths are measured on first use."""
    seconds = {"floor": cost.floor_s, "vram": cost.vram_bytes / slot_bandwidth(device)}
    if cost.pcie_bytes:
        seconds["pcie"] = cost.pcie_bytes / link_bandwidth(device)
    if cost.nvme_bytes:
        seconds["nvme"] = cost.nvme_bytes / disk_bandwidth(file)[0]
    limit = max(seconds, key=lambda name: seconds[name])
    return Roof(tok_s=1 / max(seconds[limit], 1e-9), limit=limit)
