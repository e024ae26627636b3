"""The roof of decode speed: each tier's bytes divided by its bandwidth, and the time of a token without misses.

The bounds of an answer are not taken from that answer alone: the floor is the fastest token of the session so far, and
a bandwidth is the one that was measured or, where an answer moved its bytes faster, that answer's. So no answer passes
its own roof, and a slow answer does not lower it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offmoe.machine.bandwidth import disk_bandwidth, link_bandwidth, slot_bandwidth
from offmoe.stats.stats import Roof

FASTEST = "the fastest token of this session"
MEASURED = "bytes of a token ÷ the measured bandwidth"
REACHED = "bytes of a token ÷ the best bandwidth that an answer reached, which is above the measured one"


@dataclass(frozen=True)
class TokenCost:
    """Bytes that a decoded token moves from each tier, on average over an answer, and its times in seconds."""

    vram_bytes: float
    pcie_bytes: float
    nvme_bytes: float
    mean_s: float  # mean time of a token
    floor_s: float  # time of the fastest token without its stalls


@dataclass
class Bounds:
    """Limits of one engine on this machine, as far as the session knows them."""

    device: torch.device
    file: Path  # of the model, on the disk tier
    floor_s: float = math.inf
    reached: dict[str, float] = field(default_factory=dict)  # best bytes/s of an answer, by tier

    def roof(self, cost: TokenCost) -> Roof:
        """Return the bound that the slowest resource sets to an answer of this cost, with perfect overlap.

        Bandwidths are measured when they are first needed.
        """
        self.floor_s = min(self.floor_s, cost.floor_s)
        seconds, sources = {"floor": self.floor_s}, {"floor": FASTEST}
        for tier, nbytes in (("vram", cost.vram_bytes), ("pcie", cost.pcie_bytes), ("nvme", cost.nvme_bytes)):
            if nbytes:
                measured = self._bandwidth(tier)
                rate = self.reached[tier] = max(self.reached.get(tier, measured), nbytes / cost.mean_s)
                seconds[tier], sources[tier] = nbytes / rate, REACHED if rate > measured else MEASURED
        limit = max(seconds, key=lambda name: seconds[name])
        return Roof(tok_s=1 / max(seconds[limit], 1e-9), limit=limit, source=sources[limit])

    def _bandwidth(self, tier: str) -> float:
        if tier == "nvme":
            return disk_bandwidth(self.file)[0]
        return slot_bandwidth(self.device) if tier == "vram" else link_bandwidth(self.device)
