"""Policies by name: `crf:h=64` or `./mine.py:MyPolicy,h=64`, parsed once into a PolicySpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offmoe.cache.plugin import built, guarded, is_plugin, load_plugin
from offmoe.cache.policies import POLICIES, REPLAY_ONLY
from offmoe.cache.policies.base import Policy
from offmoe.cache.spec import read, usage

if TYPE_CHECKING:
    from offmoe.cache.trace import Trace

__all__ = ["Policy", "PolicySpec", "make_policy", "parse_policy", "policy_for"]


@dataclass(frozen=True)
class PolicySpec:
    """A parsed policy that an engine can run: its class, its canonical name and the values of its parameters."""

    name: str
    kind: type[Policy]
    values: Mapping[str, Any]
    plugin: bool

    def __str__(self) -> str:
        return self.name

    def make(self, records: int) -> Policy:
        """Build the policy for `records` records."""
        if not self.plugin:
            return self.kind(records, self.name, **self.values)
        return built(lambda: guarded(self.kind)(records, self.name, **self.values), self.name)


def parse_policy(spec: str | PolicySpec) -> PolicySpec:
    """Parse `name[:key=value,…]` or `FILE.py:CLASS[,key=value,…]`; ValueError for what no engine can run."""
    if isinstance(spec, PolicySpec):
        return spec
    kind, name, values = understand(spec, POLICIES)
    plugin = is_plugin(spec)
    if plugin:
        if kind.bypass:
            raise ValueError(f"policy {spec!r} leaves misses without a slot: it runs in replay only")
        built(lambda: guarded(kind)(1, name, **values), name)  # its mistakes are told before a model is read
    return PolicySpec(name, kind, values, plugin)


def make_policy(spec: str, records: int) -> Policy:
    """Build the policy that `spec` names for `records` records of an engine; ValueError if there is none."""
    return parse_policy(spec).make(records)


def policy_for(trace: Trace, spec: str) -> Policy:
    """The policy that `spec` names, to replay `trace`: those that only a replay can run too."""
    kind, name, values = understand(spec, {**POLICIES, **REPLAY_ONLY})
    if not is_plugin(spec):
        return kind.for_trace(trace, name, **values)
    return built(lambda: guarded(kind).for_trace(trace, name, **values), name)


def understand(spec: str, known: Mapping[str, type[Policy]]) -> tuple[type[Policy], str, dict[str, Any]]:
    """Class, canonical spec and the values of its parameters; ValueError for what does not exist."""
    if is_plugin(spec):
        kind, head, rest = load_plugin(spec, Policy)  # type: ignore[type-abstract]
        return kind, *read("policy", spec, head, ",", rest, kind.parameters)
    head, colon, after = spec.partition(":")
    if head in known:
        return known[head], *read("policy", spec, head, ":", after if colon else None, known[head].parameters)
    if head in REPLAY_ONLY:
        raise ValueError(f"policy {spec!r} runs in replay only: choose {', '.join(known)}")
    every = ", ".join(usage(name, kind.parameters) for name, kind in known.items())
    raise ValueError(f"policy {spec!r} is unknown: choose {every}")
