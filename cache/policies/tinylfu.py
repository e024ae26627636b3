"""TinyLFU's admission (Einziger et al. 2017) before CRF: who misses enters only if hotter than who would leave."""

from __future__ import annotations

from offmoe.cache.policies.crf import CRF


class TinyLFU(CRF):
    """Scores as CRF. For where a miss can be computed without a slot: in replay only, so far."""

    state = ()  # a device admits every miss
    bypass = True

    def __init__(self, records: int, name: str = "crf+tinylfu:h=64", h: int = 64) -> None:
        super().__init__(records, name, h)
