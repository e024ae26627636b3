"""Statistics of one answer, and its roof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Roof:
    """Upper bound of the decode speed at this hit rate, and the resource that sets it."""

    tok_s: float
    limit: str  # vram, pcie, nvme or floor (the time of a token with all hits)
    source: str  # where the bound comes from, in words


@dataclass(frozen=True)
class Stats:
    """Statistics of one answer. Rates are shares of the records that decoded tokens were routed to."""

    tokens: int  # generated
    finish_reason: str  # stop, length (max_tokens), context (KV full) or cancelled
    prompt_tokens: int
    reused_tokens: int  # prompt tokens that the KV cache held already
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float  # time to first token, from the prompt's submission
    hit_rate: float
    covered: float  # hits on records that prefetching brought
    late: float  # misses whose prefetch was still under way
    misses_per_token: float
    pcie_bytes_per_token: float  # RAM → VRAM; on the CPU device, the bytes that a GPU would move
    nvme_bytes_per_token: float  # read from disk, alignment included
    nvme_record_bytes_per_token: float  # the records' own part of them
    stall_ms_per_token: float  # time that the step waited for records
    roof: Roof | None  # None: nothing was decoded
    policy: str  # "crf:h=64 global"
    vram_bytes: int  # budget of the expert slots
    ram_bytes: int  # size of the RAM tier

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers that `offmoe run --json` prints."""
        flat = dict(vars(self))
        flat["bytes_per_token"] = {tier: flat.pop(f"{tier}_bytes_per_token") for tier in ("pcie", "nvme")}
        flat["roof"] = vars(self.roof) if self.roof else None
        return flat
