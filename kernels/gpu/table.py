"""Arrays of the residency table on the GPU, the mirror of cache.residency.Residency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offmoe.kernels.gpu.foretell import Past


@dataclass(frozen=True)
class Table:
    """Residency table on the GPU, int32: arrays over records and slots, and the policy's two arrays [records]."""

    slot_of: Tensor
    owner: Tensor
    arriving: Tensor
    fresh: Tensor  # prefetched and not used yet
    landed: Tensor
    progress: Tensor  # chunks of an arriving record, for page_in
    a: Tensor
    b: Tensor
    decay: Tensor  # float32
    clock: Tensor  # token, event
    candidates: Tensor  # [layers or 1, C]
    scratch: Tensor  # of `candidates`
    kind: str  # of the policy
    past: Past | None = None  # of policy echo
    use: Any = None  # of kind formula: functions of a kernel
    worth: Any = None

    @property
    def foretold(self) -> Tensor | None:
        return self.past.foretold if self.past else None

    def candidate_row(self, layer: int) -> Tensor:
        """Return the slots [C] to evict first for a record of MoE layer `layer`; with scope "global" layers share one
        row.
        """
        return self.candidates[layer if len(self.candidates) > 1 else 0]
