"""Timers and counters of one answer, and the Stats computed from them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from offmoe.experts.store import Counters, ExpertStore
from offmoe.plan import Plan
from offmoe.stats.roof import TokenCost
from offmoe.stats.stats import Roof, Stats


@dataclass
class Meter:
    """Measurements of a running answer: `prefilled` and `first` are called once, then `stepped` for every token."""

    store: ExpertStore
    submitted: float  # time.perf_counter() when the prompt was submitted
    prompt_tokens: int
    reused_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    context: int = 0  # tokens attended to, summed over the steps
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    least_s: float = math.inf  # time of the fastest step, without its stalls
    finish_reason: str = "cancelled"
    decoded: Counters = field(default_factory=Counters)
    _before: Counters = field(default_factory=Counters)
    _paused_s: float = 0.0  # suspended since the last phase or step

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` in which the process was suspended."""
        self.submitted += seconds
        self._paused_s += seconds

    def prefilled(self, began: float) -> None:
        self.prefill_s = time.perf_counter() - began - self._paused_s
        self._paused_s = 0.0
        self._before = self.store.counters

    def first(self) -> None:
        """Note the first token, which counts as part of the prompt."""
        self.ttft_s = time.perf_counter() - self.submitted

    def stepped(self, seconds: float, context: int) -> None:
        """Note a decoded token that took `seconds`, with `context` positions attended to."""
        paused, self._paused_s = self._paused_s, 0.0
        self.decode_s += seconds - paused if seconds > paused else seconds  # else the pause was between two steps
        self.steps += 1
        self.context += context
        stalled = self.decoded.stall_s
        self.decoded = self.store.counters.since(self._before)
        if not paused:
            self.least_s = min(self.least_s, seconds - (self.decoded.stall_s - stalled))

    def floored(self, floor_s: float | None) -> None:
        """Set the stall time: the decode time beyond `floor_s` a step, the measured time of a step without misses."""
        if floor_s is not None:
            self.decoded.stall_s = max(0.0, self.decode_s - floor_s * self.steps)
            self.least_s = min(self.least_s, floor_s)

    def cost(self, plan: Plan, trunk_bytes: int, used_record_bytes: float) -> TokenCost | None:
        """Return the mean cost of a decoded token; `used_record_bytes`: one record's bytes as computed with."""
        if not self.steps:
            return None
        kv_bytes = self.context / self.steps * plan.kv_bytes / plan.ctx + 2 * plan.state_bytes
        return TokenCost(
            vram_bytes=trunk_bytes + kv_bytes + self.decoded.routed / self.steps * used_record_bytes,
            pcie_bytes=self.decoded.pcie_bytes / self.steps,
            nvme_bytes=self.decoded.nvme_bytes / self.steps,
            mean_s=self.decode_s / self.steps,
            floor_s=self.least_s,
        )

    def stats(self, plan: Plan, roof: Roof | None) -> Stats:
        steps, routed = max(self.steps, 1), max(self.decoded.routed, 1)
        computed = self.prompt_tokens - self.reused_tokens
        return Stats(
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            prefill_tok_s=computed / self.prefill_s if self.prefill_s else 0.0,
            decode_tok_s=self.steps / self.decode_s if self.decode_s else 0.0,
            ttft_s=self.ttft_s,
            hit_rate=self.decoded.hits / routed,
            covered=self.decoded.covered / routed,
            late=self.decoded.late / routed,
            misses_per_token=(self.decoded.routed - self.decoded.hits) / steps,
            pcie_bytes_per_token=self.decoded.pcie_bytes / steps,
            nvme_bytes_per_token=self.decoded.nvme_bytes / steps,
            nvme_record_bytes_per_token=self.decoded.nvme_record_bytes / steps,
            stall_ms_per_token=self.decoded.stall_s / steps * 1e3,
            roof=roof,
            policy=f"{plan.policy} {plan.scope}",
            vram_bytes=plan.vram_bytes,
            ram_bytes=plan.ram_bytes,
        )
