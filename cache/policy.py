"""From what a person writes, `crf:h=64`, to a policy."""

from __future__ import annotations

import re

from offmoe.cache.policies import POLICIES
from offmoe.cache.policies.base import Policy

__all__ = ["Policy", "make_policy"]


def make_policy(spec: str, records: int) -> Policy:
    """The policy that `spec` (`name[:key=value,…]`) names, for `records` records; ValueError if none."""
    name, colon, rest = spec.partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy {spec!r} is unknown: choose {', '.join(map(usage, POLICIES))}")
    given = [pair.partition("=") for pair in rest.split(",")] if colon else []
    values = {key: parse(spec, name, key, value) for key, _, value in given}
    if len(values) < len(given):
        raise ValueError(f"policy {spec!r} sets a parameter twice: write {usage(name)}")
    parameters = POLICIES[name].parameters
    full = {key: values.get(key, parameter.default) for key, parameter in parameters.items()}
    canonical = name + (":" if full else "") + ",".join(f"{key}={value}" for key, value in full.items())
    return POLICIES[name](records, canonical, **full)


def parse(spec: str, name: str, key: str, value: str) -> int:
    """The value of one parameter of policy `name`; ValueError if it has no such parameter or value."""
    parameter = POLICIES[name].parameters.get(key)
    if parameter is None:
        raise ValueError(f"policy {spec!r} has no parameter {key!r}: write {usage(name)}")
    if not re.fullmatch("[0-9]{1,9}", value) or not parameter.low <= int(value) <= parameter.high:
        raise ValueError(f"policy {spec!r}: {key} is {value!r}: write {usage(name)}")
    return int(value)


def usage(name: str) -> str:
    """How to write a policy, with its ranges: `crf:h=1…4096`."""
    ranges = [f"{key}={p.low}…{p.high}" for key, p in POLICIES[name].parameters.items()]
    return name + (":" if ranges else "") + ",".join(ranges)
