"""From what a person writes, `crf:h=64` or `./mine.py:MyPolicy,h=64`, to a policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offmoe.cache.plugin import built, guarded, is_plugin, load_plugin
from offmoe.cache.policies import POLICIES, REPLAY_ONLY
from offmoe.cache.policies.base import File, Parameter, Policy

if TYPE_CHECKING:
    from offmoe.cache.trace import Trace

__all__ = ["Policy", "make_policy", "policy_for"]

Known = Mapping[str, type[Policy]]


def make_policy(spec: str, records: int) -> Policy:
    """The policy that `spec` (`name[:key=value,…]`) names, for `records` records of an engine; ValueError if none."""
    kind, name, values = understand(spec, POLICIES)
    if not is_plugin(spec):
        return kind(records, name, **values)
    if kind.bypass:
        raise ValueError(f"policy {spec!r} leaves misses without a slot: it runs in replay only")
    return built(lambda: guarded(kind)(records, name, **values), name)


def policy_for(trace: Trace, spec: str) -> Policy:
    """The policy that `spec` names, to replay `trace`: those that only a replay can run too."""
    kind, name, values = understand(spec, {**POLICIES, **REPLAY_ONLY})
    if not is_plugin(spec):
        return kind.for_trace(trace, name, **values)
    return built(lambda: guarded(kind).for_trace(trace, name, **values), name)


def understand(spec: str, known: Known) -> tuple[type[Policy], str, dict[str, Any]]:
    """Class, canonical spec and the values of its parameters; ValueError for what does not exist."""
    if is_plugin(spec):
        kind, head, rest = load_plugin(spec, Policy)  # type: ignore[type-abstract]
        known, mark = {head: kind}, ","
    else:
        head, colon, rest = spec.partition(":")
        rest, mark = rest if colon else None, ":"
    if head in REPLAY_ONLY and head not in known:
        raise ValueError(f"policy {spec!r} runs in replay only: choose {', '.join(known)}")
    if head not in known:
        raise ValueError(f"policy {spec!r} is unknown: choose {', '.join(usage(n, known[n]) for n in known)}")
    kind = known[head]
    write = usage(head, kind, mark)
    given = [] if rest is None else [pair.partition("=") for pair in rest.split(",")]
    values = {key: parse(spec, key, value, kind, write) for key, _, value in given}
    if len(values) < len(given):
        raise ValueError(f"policy {spec!r} sets a parameter twice: write {write}")
    full = {key: values.get(key, getattr(p, "default", "")) for key, p in kind.parameters.items()}
    shown = ",".join(f"{key}={value}" for key, value in full.items() if value != "")
    return kind, head + (mark if shown else "") + shown, full


def parse(spec: str, key: str, value: str, kind: type[Policy], write: str) -> int | str:
    """The value of one parameter; ValueError if the policy has no such parameter or value."""
    parameter = kind.parameters.get(key)
    if parameter is None:
        raise ValueError(f"policy {spec!r} has no parameter {key!r}: write {write}")
    if isinstance(parameter, File):
        if not value:
            raise ValueError(f"policy {spec!r}: {key} is empty: write {write}")
        return value
    if not re.fullmatch("[0-9]{1,9}", value) or not parameter.low <= int(value) <= parameter.high:
        raise ValueError(f"policy {spec!r}: {key} is {value!r}: write {write}")
    return int(value)


def usage(name: str, kind: type[Policy], mark: str = ":") -> str:
    """How to write a policy, with its ranges: `crf:h=1…4096`."""
    ranges = [f"{key}={p.low}…{p.high}" if isinstance(p, Parameter) else f"{key}=FILE" for key, p in
              kind.parameters.items()]  # fmt: skip
    return name + (mark if ranges else "") + ",".join(ranges)
