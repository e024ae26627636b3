"""The residency table on the device: a mirror of the host's, moved whole when an answer begins and ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.policies.crf import decay_table
from offmoe.cache.policies.echo import NEAREST, Echo
from offmoe.cache.policies.formula import Formula
from offmoe.cache.residency import Residency
from offmoe.decode.device_formula import device_formula
from offmoe.errors import OffmoeError
from offmoe.kernels.gpu.foretell import Past, parts_of
from offmoe.kernels.gpu.resolve import scratch_size
from offmoe.kernels.gpu.table import Table


def reach(residency: Residency, k: int, most: int) -> int:
    """Candidates that are enough for an event of k and a prediction of up to k records, of which `most` are fetched.

    Each passes over what it asks for itself: the event takes or passes over k. Under layer scope the prediction came
    before it, and what that took stays; under global scope it comes after, and may take or pass over k others.
    """
    if not most:
        return k
    return k + most if residency.scope == "layer" else 2 * k


def device_table(residency: Residency, reach: int, device: torch.device) -> Table:
    """An empty mirror, with lists of `reach` candidates."""
    policy = residency.policy
    if not policy.state:
        raise OffmoeError(f"policy {policy.name!r} has no score for a GPU: choose lru, crf, lfu, lfru or echo")
    records, slots = len(residency.slot_of), residency.slots

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    decay = getattr(policy, "decay", decay_table(1))
    use, worth = device_formula(policy, device) if isinstance(policy, Formula) else (None, None)
    return Table(
        slot_of=ints(records), owner=ints(slots), arriving=ints(slots), fresh=ints(slots), landed=ints(slots),
        progress=ints(slots), a=ints(records), b=ints(records), decay=torch.from_numpy(decay).to(device),
        clock=ints(2), candidates=ints(residency.pools, reach), scratch=ints(scratch_size(slots, reach)),
        kind=policy.name.partition(":")[0] if worth is None else "formula", use=use, worth=worth,
        past=past(policy, device) if isinstance(policy, Echo) else None,
    )  # fmt: skip


def past(policy: Echo, device: torch.device) -> Past:
    """Nothing yet."""

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Past(
        rows=ints(*policy.rows.shape), filled=ints(1), weights=torch.from_numpy(policy.weights).to(device),
        foretold=ints(policy.records, dtype=torch.float32), nearest=ints(NEAREST),
        keys=ints(parts_of(len(policy.rows)) * NEAREST, dtype=torch.int64), ticket=ints(1),
    )  # fmt: skip


def push(residency: Residency, table: Table, now: int) -> None:
    """Host → device. The next token is number `now`."""
    policy = residency.policy
    arrays = [getattr(policy, name) for name in policy.state]
    a = arrays[0].view(np.int32) if arrays[0].dtype == np.float32 else arrays[0]
    b = arrays[1] if len(arrays) > 1 else np.zeros(policy.records, np.int64)
    sent = (
        (table.slot_of, residency.slot_of), (table.owner, residency.owner), (table.arriving, residency.arriving),
        (table.fresh, residency.prefetched), (table.a, a), (table.b, b), (table.clock, np.array([now, policy.event])),
    )  # fmt: skip
    for target, source in sent:
        target.copy_(torch.from_numpy(whole(source)))
    table.landed.zero_()
    if table.past and isinstance(policy, Echo):
        table.past.rows.copy_(torch.from_numpy(policy.rows))
        table.past.filled.fill_(policy.filled)
        table.past.foretold.copy_(torch.from_numpy(policy.foretell()))


def whole(array: NDArray[Any]) -> NDArray[np.int32]:
    """As int32, which holds every counter for two billion uses."""
    assert array.size == 0 or array.max() < 2**31, f"a counter is {array.max()}, too large for the device"
    return array.astype(np.int32)


def pull(residency: Residency, table: Table) -> int:
    """Device → host; returns the number of the next token. What still arrives has been waited for."""
    policy = residency.policy
    residency.slot_of[:] = table.slot_of.cpu().numpy()
    residency.owner[:] = table.owner.cpu().numpy()
    residency.arriving[:] = False
    residency.prefetched[:] = table.fresh.cpu().numpy() != 0
    for name, source in zip(policy.state, (table.a, table.b), strict=False):
        values = source.cpu().numpy()
        target = getattr(policy, name)
        target[:] = values.view(np.float32) if target.dtype == np.float32 else values
    now, policy.event = table.clock.tolist()
    if table.past and isinstance(policy, Echo):
        policy.resume(table.past.rows.cpu().numpy(), int(table.past.filled), int(now) - 1)
    residency.now = max(residency.now, now - 1)
    return int(now)


def lose(residency: Residency, miss_records: Tensor, miss_slots: Tensor) -> None:
    """After `pull` of a step that was aborted: what its last event admitted may never have been filled; it is absent.

    How many of the pairs [k] are that event's is not known any more, so those of earlier ones go too.
    """
    records, slots = np.unique(torch.stack((miss_records, miss_slots)).cpu().numpy(), axis=1)
    mine = slots[residency.slot_of[records] == slots]
    residency.arriving[mine] = True
    residency.abandon(mine)
