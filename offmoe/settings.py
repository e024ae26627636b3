"""Everything a user can choose, parsed and checked once by `Settings.of` and `Sampling.of`, then frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from offmoe.errors import OffmoeError, users_mistakes

if TYPE_CHECKING:
    from offmoe.cache.policy import PolicySpec
    from offmoe.prefetch import Gate

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Bytes, or a share of all routed records; exactly one of the two is set."""

    bytes: int | None = None
    percent: float | None = None

    def __str__(self) -> str:
        return format_size(self.bytes) if self.bytes is not None else f"{self.percent:g}%"


def parse_size(text: str | int) -> int:
    """`8GiB`, `512M`, `1000000` → bytes. Binary units unless the unit is kB, MB, GB, TB."""
    match = SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in UNITS:
        raise OffmoeError(f"{str(text)!r} is not a size: write for example 8GiB, 512MiB or 0")
    size = float(match[1]) * UNITS[match[2].lower()]
    if size >= 2**63:
        raise OffmoeError(f"{str(text)!r} is larger than any memory")
    return int(size)


def parse_budget(text: str | int | Budget) -> Budget:
    """A size, or `50%` of all routed records."""
    if isinstance(text, Budget):
        return text
    if isinstance(text, str) and text.strip().endswith("%"):
        number = text.strip()[:-1]
        if not re.fullmatch(r"\d+(\.\d+)?", number) or not 0 < float(number) <= 100:
            raise OffmoeError(f"{text!r} is not a share: write a number above 0 and up to 100, as in 50%")
        return Budget(percent=float(number))
    return Budget(bytes=parse_size(text))


def parse_policy(text: str | PolicySpec) -> PolicySpec:
    """Parse the name of a policy, as `offmoe.cache.policy.parse_policy` does; mistakes are OffmoeErrors."""
    from offmoe.cache.policy import PolicySpec, parse_policy  # imports numpy: not before a policy is named

    if not isinstance(text, str | PolicySpec):
        raise OffmoeError(f"policy {text!r} is unknown: write for example lru or crf:h=64")
    with users_mistakes():
        return parse_policy(text)


def parse_prefetch(text: str | Gate) -> Gate:
    """Parse `none` or `gate:d=…,p=…,n=…`."""
    from offmoe.prefetch import Gate

    return text if isinstance(text, Gate) else Gate.of(text)


def format_size(size: float) -> str:
    """Bytes for people: 29.9 MiB, 1.25 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


@dataclass(frozen=True)
class Settings:
    """How a model is placed and run. None: chosen from what the machine has free.

    `Settings.of` takes texts (`vram="8GiB"`, `policy="crf:h=64"`); the fields hold what they mean.
    """

    vram: Budget | None = None  # for expert slots
    ram: int | None = None  # bytes of (pinned) memory for records
    policy: PolicySpec | None = None
    scope: str | None = None  # "layer" or "global"
    device: str | None = None  # "cpu", "cuda", "cuda:1"
    dtype: str | None = None  # "f32", "bf16", "f16": of activations, trunk and KV
    ctx: int | None = None  # tokens of KV reserved at start, outside vram
    chunk: int | None = None  # tokens of a prompt run at once; greedy tokens are compared at one chunk size
    kv: str | None = None  # "same" as dtype, or "int8": half the memory, not lossless (GPU only)
    prefetch: Gate | None = None  # GPU only

    def __post_init__(self) -> None:
        expect("scope", self.scope, ("layer", "global"))
        expect("dtype", self.dtype, ("f32", "bf16", "f16"))
        expect("kv", self.kv, ("same", "int8"))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,2})?", str(self.device)):
            raise OffmoeError(f"device {self.device!r} is unknown: write cpu, cuda or cuda:N")
        at_least("ctx", self.ctx, 16)
        at_least("chunk", self.chunk, 1)

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Parse settings by name. An unknown name is an OffmoeError; None keeps the default."""
        parsers: dict[str, Callable[[Any], Any]] = {
            "vram": parse_budget,
            "ram": parse_size,
            "policy": parse_policy,
            "prefetch": parse_prefetch,
        }
        given = known(cls, values)
        return cls(**{name: parsers[name](value) if name in parsers else value for name, value in given.items()})


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. None: the model's own default (`generation_config`)."""

    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # 0: off
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None  # None: a fresh one each answer
    max_tokens: int | None = None  # None: until the context is full
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "repeat_penalty": (0.01, 100)}
        for name, (low, high) in ranges.items():
            in_range(name, plain(getattr(self, name)), low, high)
        for name, least in {"top_k": 0, "seed": 0, "max_tokens": 1}.items():
            at_least(name, plain(getattr(self, name)), least)
        for name in (*ranges, "top_k", "seed", "max_tokens"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "stop", texts("stop", self.stop))
        if "" in self.stop:
            raise OffmoeError("a stop string is empty: give at least one character")

    @classmethod
    def of(cls, **values: Any) -> Sampling:
        """Sampling by name; an unknown name is an error, None keeps the default."""
        return cls(**known(cls, values))

    def merged(self, defaults: Sampling) -> Sampling:
        """Self, with what is None taken from `defaults`."""
        gaps = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) in (None, ())}
        return replace(self, **gaps)


def known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` without None; refuses names that `cls` does not have."""
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            raise OffmoeError(f"unknown setting {name!r}: known are {', '.join(names)}")
    return {name: value for name, value in values.items() if value is not None}


def expect(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise OffmoeError(f"{name} {value!r} is unknown: choose {' or '.join(choices)}")


def at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63):
        raise OffmoeError(f"{name} is {value!r}: expected a whole number, at least {low} and below 2^63")


def plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return one text or several as a tuple. Raises OffmoeError."""
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        raise OffmoeError(f"{name} is of type {type(value).__name__}: expected texts")
    values = tuple(values)
    if wrong := [item for item in values if not isinstance(item, str)]:
        raise OffmoeError(f"{name} has an element of type {type(wrong[0]).__name__}: expected texts")
    return values


def in_range(name: str, value: float | None, low: float, high: float) -> None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (known and low <= value <= high):  # NaN fails too
        raise OffmoeError(f"{name} is {value!r}: expected a number from {low} to {high}")


SAMPLING_DEFAULTS = Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0)
