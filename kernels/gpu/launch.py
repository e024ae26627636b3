"""What all launches share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def pdl_supported(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel starts while the one before it drains. sm_90 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(pdl: bool) -> dict[str, Any]:
    """Launch arguments of a kernel whose `PDL` is `pdl`."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
