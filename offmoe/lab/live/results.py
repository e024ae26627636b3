"""Result of one measurement, and the configuration that was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offmoe.prefetch import NONE
from offmoe.settings import format_size


@dataclass(frozen=True)
class Configuration:
    """Settings that are compared, as the user writes them."""

    vram: str  # a percentage, or bytes
    policy: str
    prefetch: str = NONE

    def __str__(self) -> str:
        return f"{self.budget} {self.method}"

    @property
    def budget(self) -> str:
        """Budget for people."""
        return self.vram if self.vram.endswith("%") else format_size(int(self.vram))

    @property
    def method(self) -> str:
        return self.policy if self.prefetch == NONE else f"{self.policy} + {self.prefetch}"


@dataclass(frozen=True)
class Measured:
    """One measurement of a configuration. Rates refer to the routed experts of `tokens` decode steps."""

    vram: str
    policy: str
    prefetch: str
    slots: int  # in all layers
    tokens: int
    prompts: int
    seconds: float  # of all steps
    routed: int  # experts per token, in all layers
    hit_rate: float
    covered: float
    late: float
    misses: float  # per token
    uploads: float  # experts per token copied into slots, including prefetched ones
    stall_ms: float  # per token
    parts: dict[str, float]  # ms per token, as far as they can be measured
    hits_by_layer: list[float]  # measured on the CPU, replayed on a GPU; empty if neither is possible
    simulated: float | None  # hit rate in replay; None: prefetching cannot be replayed without states
    same_misses: bool | None  # whether replay has the same misses in the same order; None: unknown on a GPU
    roof_ms: float
    roof: str  # the limiting resource
    token_bytes: float  # read from fast memory for a token in which every expert hits
    prompt_tok_s: float

    @property
    def configuration(self) -> Configuration:
        return Configuration(self.vram, self.policy, self.prefetch)

    @property
    def ms(self) -> float:
        return self.seconds / self.tokens * 1e3

    @property
    def replay_error(self) -> float:
        """Difference of the replayed hit rate from the measured one; 0 if nothing was replayed."""
        return 0.0 if self.simulated is None else abs(self.simulated - self.hit_rate)

    @property
    def floor_ms(self) -> float:
        return self.ms - self.stall_ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
