"""What one answer cost, and the roof it ran under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Roof:
    """The speed no decode at this hit rate can pass: `tok_s`, and which resource sets it."""

    tok_s: float
    limit: str  # vram, pcie, cpu, nvme or floor (the measured time with all hits)


@dataclass(frozen=True)
class Stats:
    """One answer. Rates are over the routed records of decoded tokens."""

    tokens: int  # generated
    finish_reason: str  # stop, length (max_tokens), context (KV full) or cancelled
    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the KV cache
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float  # from the prompt's submission
    hit_rate: float
    covered: float
    late: float
    misses_per_token: float
    pcie_bytes_per_token: float  # VRAM ← RAM; on the CPU device what a GPU would move
    nvme_bytes_per_token: float  # read from disk, alignment included
    nvme_record_bytes_per_token: float  # of these the records' own
    stall_ms_per_token: float  # time in which the step waited for records
    roof: Roof | None  # None: nothing was decoded
    policy: str  # "crf:h=64 global"
    vram_bytes: int  # of expert slots
    ram_bytes: int  # of the RAM tier

    def as_dict(self) -> dict[str, Any]:
        """The numbers of `offmoe run --json`."""
        flat = dict(vars(self))
        flat["bytes_per_token"] = {tier: flat.pop(f"{tier}_bytes_per_token") for tier in ("pcie", "nvme")}
        flat["roof"] = vars(self.roof) if self.roof else None
        return flat
