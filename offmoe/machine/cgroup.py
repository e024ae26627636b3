"""Memory that control groups leave to this process: versions 1 and 2, the process's own group and all its ancestors.

Files: `/proc/self/cgroup`, `/proc/self/mountinfo` and each group's limits (Linux, Documentation/admin-guide/cgroup-v1
and cgroup-v2.rst).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page for no limit


@dataclass(frozen=True)
class Version:
    """Names of a version's files and fields."""

    limits: tuple[str, ...]
    usage: str
    cache: str  # field of memory.stat: pages of files that the kernel drops first when the group needs memory
    inherited: str | None  # field of memory.stat: the least limit of the ancestors, visible or not


V1 = Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit")
V2 = Version(("memory.max", "memory.high"), "memory.current", "inactive_file", None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Return the bytes that the process may still allocate under its tightest group; None without a limit.

    Unused page cache of a group counts as free. `root` holds proc and sys.
    """
    left = [group_left(group, version) for group, version in groups(root)]
    return min((size for size in left if size is not None), default=None)


def groups(root: Path) -> Iterator[tuple[Path, Version]]:
    """Yield the directory of every group that the process is in, from its own up to the root of the mount."""
    own = own_paths(root)
    for line in read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), after.split() or [""]
        version = {"cgroup2": V2, "cgroup": V1}.get(kind)
        if version is None or len(fields) < 5 or (version is V1 and "memory" not in options.split(",")):
            continue
        path = own.get("" if version is V2 else "memory")
        if path is None:
            continue
        mount = root / unescaped(fields[4]).lstrip("/")
        group = mount / below(path, unescaped(fields[3]))
        if not group.is_dir():  # of another namespace: the mount shows at least the group that contains it
            group = mount
        yield from ((each, version) for each in (group, *group.parents) if each.is_relative_to(mount))


def own_paths(root: Path) -> dict[str, str]:
    """Return the path of the process's group by controller; "" is the hierarchy of version 2."""
    paths: dict[str, str] = {}
    for line in read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def below(path: str, mounted: str) -> PurePosixPath:
    """Return `path` relative to the group that is mounted; the mount itself where it lies elsewhere."""
    whole = PurePosixPath(path)
    if ".." in whole.parts or not whole.is_relative_to(mounted):
        return PurePosixPath()
    return whole.relative_to(mounted)


def group_left(group: Path, version: Version) -> int | None:
    """Return the bytes that one group leaves, at least 0; None if it has no limit or does not tell its usage."""
    stat = {name: value for name, _, value in (line.partition(" ") for line in read_lines(group / "memory.stat"))}
    limits = [number(text) for name in version.limits for text in read_lines(group / name)]
    if version.inherited:
        limits.append(number(stat.get(version.inherited, "")))
    limit = min((size for size in limits if size is not None), default=UNLIMITED)
    used = [number(text) for text in read_lines(group / version.usage)]
    if limit >= UNLIMITED or used in ([], [None]):
        return None
    return max(0, limit - max(0, (used[0] or 0) - (number(stat.get(version.cache, "")) or 0)))


def number(text: str) -> int | None:
    """Return a decimal number; None for "max" and for anything else."""
    return int(text) if text.isascii() and text.isdigit() else None


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text().splitlines()
    return []


def unescaped(path: str) -> str:
    r"""Return a path of mountinfo with its octal escapes (`\040` for a space) resolved."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
