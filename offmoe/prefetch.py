"""The gate-ahead predictor's parameters, as `--prefetch` names them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from offmoe.cache.residency import Residency
from offmoe.errors import OffmoeError

NONE = "none"
SPEC = re.compile(r"gate(?::([a-z]=[\d.]+(?:,[a-z]=[\d.]+)*))?")
USAGE = "write none, or gate:d=1…4,p=0…1,n=1…8 (layers ahead, least probability, records a layer)"


@dataclass(frozen=True)
class Gate:
    """Gate-ahead prediction: a later layer's norm and router applied to the current hidden state. most = 0: off."""

    ahead: int = 1  # layers to look ahead
    least: float = 0.05  # router probability below which an expert is not fetched
    most: int = 0  # records to fetch a layer: a copy that has started cannot be cancelled

    @classmethod
    def of(cls, spec: str) -> Gate:
        """Parse `none` or `gate:d=…,p=…,n=…`. Raises OffmoeError for what is unknown or out of range."""
        if spec == NONE:
            return cls()
        match = SPEC.fullmatch(spec)
        given = dict(pair.split("=") for pair in match[1].split(",")) if match and match[1] else {}
        try:
            gate = cls(int(given.pop("d", "1")), float(given.pop("p", "0.05")), int(given.pop("n", "2")))
        except ValueError:
            match, gate = None, cls()
        if match is None or given or not (1 <= gate.ahead <= 4 and 0 <= gate.least <= 1 and 1 <= gate.most <= 8):
            raise OffmoeError(f"prefetch {spec!r} is unknown: {USAGE}")
        return gate

    def within(self, table: Residency, k: int) -> Gate:
        """Return this gate with `most` limited so that k experts of a layer keep their slots; possibly 0."""
        room = (table.capacity - k) // (1 if table.scope == "layer" else self.ahead + 1)
        return replace(self, most=max(0, min(self.most, k, room)))

    def __str__(self) -> str:
        return f"gate:d={self.ahead},p={self.least:g},n={self.most}" if self.most else NONE
