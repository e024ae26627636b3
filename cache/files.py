"""The rule for every file that offmoe writes.

A target is checked before the work that fills it (`check_output`) and appears whole or not at all (`whole_file`). A
symbolic link is followed and stays a link, an existing file keeps its mode, and a device or a pipe is written to, never
replaced by a file. Failures are ValueErrors of one line that name the path as the user gave it.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

REFUSED = ((stat.S_ISDIR, "a directory"), (stat.S_ISBLK, "a block device"), (stat.S_ISSOCK, "a socket"))


def check_output(path: str | Path, force: bool = False, *suffixes: str) -> None:
    """Raise ValueError unless `path` can be written: its suffix is one of `suffixes` (if any are given), its directory
    is writable, and no file is lost without `force`.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} ends with {path.suffix or 'no suffix'!r}: expected {' or '.join(suffixes)}")
    with naming(path):
        if is_stream(path):
            return
        target = target_of(path)
        if not target.parent.is_dir():
            raise ValueError(f"{target.parent} is not a directory: create it first, or choose another name")
        if target.exists() and not force:
            raise ValueError(f"{path} exists: choose another name, or overwrite it with --force")
        if target.exists() and not os.access(target, os.W_OK):
            raise ValueError(f"{path} is write-protected: choose another name, or change its mode")
        with tempfile.TemporaryFile(dir=target.parent):
            pass


@contextmanager
def whole_file(path: str | Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file whose content appears at `path` when the block ends without an exception; else nothing changes.

    `mode`: permission bits of a new file, by default those that the umask leaves of 0o666. Raises ValueError.
    """
    with naming(path):
        if is_stream(Path(path)):
            with tempfile.SpooledTemporaryFile(1 << 24) as spool:
                yield spool  # type: ignore[misc]
                spool.seek(0)
                copy_to_stream(spool, path)
            return
        with draft(path, mode) as temporary, open(temporary, "r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def draft(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file in the directory of `path`, renamed to it at the end of the block; see
    `whole_file`.
    """
    target = target_of(path)
    if target.exists():
        is_stream(target)  # refuses what is no file
        mode = stat.S_IMODE(target.stat().st_mode)
    elif mode is None:
        mode = 0o666 & ~current_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".offmoe-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def target_of(path: str | Path) -> Path:
    """Return the file that `path` is or links to. Raises OSError on a loop of links."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def is_stream(path: Path) -> bool:
    """Return whether `path` is a character device or a pipe, or one of this process's descriptors (/dev/stdout).

    Raises ValueError for directories, block devices and sockets.
    """
    if not path.exists():
        return False
    mode = path.stat().st_mode
    for kind, name in REFUSED:
        if kind(mode):
            raise ValueError(f"{path} is {name}: give the name of a file")
    return not stat.S_ISREG(mode) or path.is_relative_to("/dev") or path.is_relative_to("/proc")


def copy_to_stream(source: tempfile.SpooledTemporaryFile[bytes], path: str | Path) -> None:
    """Write all of `source` to a device or pipe. Raises OSError if a pipe has no reader."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as stream:
        while block := source.read(1 << 20):
            stream.write(block)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def current_umask() -> int:
    """Return the process's umask, read where no other thread can see it change."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
