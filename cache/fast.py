"""The compiled twin of Residency and the score policies, for replaying: the same choices, 10 × as fast.

Needs numba; without it `replay_fast` says None, and the engine's own objects are used.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmoe.cache.arrays import Flags, Ints
from offmoe.cache.policies.base import Policy
from offmoe.cache.policies.belady import Belady, BeladyBypass, records_of
from offmoe.cache.policies.crf import CRF, decay_table
from offmoe.cache.policies.lfru import LFRU
from offmoe.cache.policies.lfu import LFU
from offmoe.cache.policies.lru import LRU
from offmoe.cache.policies.tinylfu import TinyLFU
from offmoe.cache.trace import Trace

KINDS: dict[type[Policy], int] = {LRU: 0, LFU: 1, LFRU: 2, CRF: 3, TinyLFU: 3, Belady: 4, BeladyBypass: 4}
KNOWING = 4


def replay_fast(trace: Trace, policy: Policy, slots: int, scope: str) -> tuple[Flags, Flags] | None:
    """Hit and uploaded of every routed record; None where there is no numba, or no twin of the policy."""
    kind, run = KINDS.get(type(policy)), compiled()
    if kind is None or run is None:
        return None
    records = records_of(trace)
    layers = records.shape[1]
    pools = layers if scope == "layer" else 1
    decay = getattr(policy, "decay", decay_table(1))
    future = next_uses(records) if kind == KNOWING else np.zeros((1, 1, 1), np.int64)
    hit, uploaded = np.zeros(records.shape, np.bool_), np.zeros(records.shape, np.bool_)
    run(records, future, trace.records, slots * layers, pools, kind, policy.bypass, decay, hit, uploaded)
    return hit, uploaded


def next_uses(records: Ints) -> NDArray[np.int64]:
    """The event of each record's next use [tokens, layers, k]; beyond all events: there is none."""
    used = records.reshape(-1)
    order = np.argsort(used, kind="stable")
    found = np.full(used.size, used.size)
    again = used[order[1:]] == used[order[:-1]]
    found[order[:-1][again]] = order[1:][again] // records.shape[-1]
    return found.reshape(records.shape)


@cache
def compiled() -> Any:
    """`run_events` in machine code, or None; compiled once a machine (3 s), then read from a file."""
    try:
        jit = import_module("numba").njit
    except ImportError:  # absent, or not of this NumPy
        return None
    try:
        return jit(cache=True)(run_events)
    except RuntimeError:  # there is no place for the file
        return jit(run_events)


def run_events(
    ids: NDArray[np.int64], future: NDArray[np.int64], records: int, slots: int, pools: int, kind: int, bypass: bool,
    decay: NDArray[np.float32], hit: Flags, uploaded: Flags,
) -> None:  # fmt: skip
    """All events in order. Only what numba compiles; a key orders as Policy.score does.

    ids [tokens, layers, k] records, -1: none; future: of each the event of its next use; hit, uploaded: as ids, out.
    """
    tokens, layers, k = ids.shape
    capacity = slots // pools
    owner, slot_of = np.full(slots, -1), np.full(records, -1)
    value, last, uses = np.zeros(records, np.float32), np.zeros(records, np.int64), np.zeros(records, np.int64)
    keys, missed, place = np.empty(capacity), np.empty(k, np.int64), np.empty(k, np.int64)
    worth = np.empty(k)
    oldest = len(decay) - 1
    for token in range(tokens):
        for layer in range(layers):
            start = layer * capacity if pools > 1 else 0
            misses = 0
            for j in range(k):
                record = ids[token, layer, j]
                if record < 0:
                    continue
                hit[token, layer, j] = slot_of[record] >= 0
                if slot_of[record] < 0:  # ascending by record
                    i = misses
                    while i > 0 and missed[i - 1] > record:
                        missed[i], place[i] = missed[i - 1], place[i - 1]
                        i -= 1
                    missed[i], place[i] = record, j
                    misses += 1
                if kind == 0:
                    last[record] = token * layers + layer + 1
                elif kind == 4:
                    last[record] = future[token, layer, j]
                else:
                    if kind == 3:
                        faded = value[record] * decay[min(token - last[record], oldest)]
                        value[record] = faded + np.float32(1)
                    uses[record] += 1
                    last[record] = token
            if misses == 0:
                continue
            for n in range(capacity + misses):  # the keys of the slots, then the worth of what was missed
                record = owner[start + n] if n < capacity else missed[n - capacity]
                key = -np.inf
                if record >= 0:
                    if kind == 0:
                        key = float(last[record])
                    elif kind == 1:
                        key = float(uses[record])
                    elif kind == 2:
                        key = uses[record] / (token - last[record] + 1)
                    elif kind == 3:
                        key = float(value[record] * decay[min(token - last[record], oldest)])
                    else:
                        key = -float(last[record])
                if n < capacity:
                    keys[n] = key
                else:
                    worth[n - capacity] = key
            if not bypass:
                for j in range(k):
                    record = ids[token, layer, j]
                    if record >= 0 and slot_of[record] >= 0:
                        keys[slot_of[record] - start] = np.inf
            for n in range(misses):  # the lowest in turn, ties by slot
                first = 0
                for slot in range(1, capacity):
                    if keys[slot] < keys[first]:
                        first = slot
                if bypass:  # the worthiest is asked first, ties by record
                    best = 0
                    for i in range(1, misses):
                        if worth[i] > worth[best]:
                            best = i
                    if not worth[best] > keys[first]:
                        break
                    worth[best] = -np.inf
                else:
                    best = n
                keys[first] = np.inf
                slot = start + first
                if owner[slot] >= 0:
                    slot_of[owner[slot]] = -1
                owner[slot] = missed[best]
                slot_of[missed[best]] = slot
                uploaded[token, layer, place[best]] = True
