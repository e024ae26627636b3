"""Residency on the device: what `offmoe.cache` keeps in arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offmoe.kernels.gpu.foretell import Past


@dataclass(frozen=True)
class Table:
    """Residency on the device, all int32: [records], [slots], and the policy's two arrays [records]."""

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
        """Who may leave for a record of `layer` [C]: all layers share one row where they share their slots."""
        return self.candidates[layer if len(self.candidates) > 1 else 0]
