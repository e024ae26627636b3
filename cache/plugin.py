"""A policy or predictor out of a person's own Python file: `./mine.py:MyPolicy,h=64`.

Only the command line names such files, never a checkpoint. Whatever goes wrong in them is a PluginError of one line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from offmoe.cache.arrays import Ints, Numbers
from offmoe.cache.policies.base import File, Parameter, Policy, Share, Slots

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = re.compile(r"(?P<head>(?P<path>[^:]+\.py):(?P<name>\w+))(?:,(?P<rest>.*))?", re.DOTALL)
T = TypeVar("T")


class PluginError(ValueError):
    """One line: the file, what went wrong in it."""


def is_plugin(spec: str) -> bool:
    """Whether it names a file, rightly written or not."""
    return ".py" in spec.partition(",")[0]


def load_plugin(spec: str, base: type[T]) -> tuple[type[T], str, str | None]:
    """The class that `spec` names, `PATH.py:CLASS`, and the text behind its comma."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise PluginError(f"{spec!r} is no plug-in: write ./mine.py:{base.__name__}Class,key=value,…")
    path = Path(match["path"])
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise PluginError(f"plug-in {path}: {error.strerror}") from None
    found = vars(module_of(path.resolve(), stamp)).get(match["name"])
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"plug-in {path} has no class {match['name']} that is a {base.__name__}: see docs/policies.md"
        )
    settings = getattr(found, "parameters", None)
    if not isinstance(settings, Mapping) or not all(
        isinstance(each, Parameter | Share | File) for each in settings.values()
    ):
        raise PluginError(f"plug-in {path}: {match['name']}.parameters is no dict of Parameter(…) and Share(…)")
    if isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))  # type: ignore[attr-defined]
        raise PluginError(f"plug-in {path}: {match['name']} lacks {missing}")
    return found, match["head"], match["rest"]


@cache
def module_of(path: Path, stamp: int) -> object:
    """Run the file, once for every version of it."""
    spec = spec_from_file_location(f"offmoe_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with failing_in(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def failing_in(where: str) -> Iterator[None]:
    """Turn an exception inside into a PluginError of one line that says where it was raised."""
    try:
        yield
    except (PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: a plug-in does not end the program
        what = ((str(error) or "no message").splitlines() or ["no message"])[0]
        raise PluginError(f"plug-in {where} raised {type(error).__name__}: {what}") from error


class Guard(Policy):
    """Comes before a plug-in's class, and looks at what it answers."""

    def attach(self, table: Slots) -> None:
        with failing_in(f"{self.name}: attach()"):
            super().attach(table)

    def touch(self, records: Ints, now: int, uses: Ints | int = 1) -> None:
        uses = read_only(uses) if isinstance(uses, np.ndarray) else uses
        with failing_in(f"{self.name}: touch()"):
            super().touch(read_only(records), now, uses)  # type: ignore[safe-super]

    def score(self, records: Ints, now: int) -> Numbers:
        with failing_in(f"{self.name}: score()"):
            scores: Numbers = np.array(super().score(read_only(records), now))  # type: ignore[safe-super]
        if scores.shape != records.shape or scores.dtype.kind not in "iufb":
            raise PluginError(
                f"plug-in {self.name}: score() gave {scores.dtype} {list(scores.shape)}: expected a number for each of "
                f"{len(records)} records"
            )
        wrong = (np.isnan(scores) | np.isposinf(scores)) & (records >= 0)
        if wrong.any():
            raise PluginError(
                f"plug-in {self.name}: score() gave {scores[wrong][0]} for record {records[wrong][0]} at token {now}: "
                "expected a number, or -inf"
            )
        return scores


def read_only(array: Ints) -> Ints:
    """Return a view of `array` that a plug-in cannot write to."""
    view = array.view()
    view.flags.writeable = False
    return view


def guarded(kind: type[Policy]) -> type[Policy]:
    """The class with a guard before it."""
    return type(kind.__name__, (Guard, kind), {})


def built(make: Callable[[], T], name: str) -> T:
    """Return `make()`, an instance of a plug-in's class; mistakes become PluginErrors."""
    with failing_in(name):
        return make()
