"""The rule for written files: checked first, whole or not at all, and never in place of what is no regular file."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from offmoe.cache.files import check_output, draft, whole_file


def write(path: Path, content: bytes = b"new") -> None:
    with whole_file(path) as file:
        file.write(content)


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_an_existing_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "out"
    path.touch()
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_new_file_follows_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
        with whole_file(tmp_path / "private", mode=0o600) as file:
            file.write(b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == expected
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_one(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["target"]


def test_a_device_is_written_to() -> None:
    before = os.stat("/dev/null")
    check_output("/dev/null")
    write(Path("/dev/null"))
    after = os.stat("/dev/null")
    assert (after.st_rdev, after.st_mode, after.st_ino) == (before.st_rdev, before.st_mode, before.st_ino)


def test_a_link_to_a_device_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    write(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "/dev/null"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device_is_an_error_of_one_line() -> None:
    with pytest.raises(ValueError, match=r"^cannot write /dev/full: No space left on device$"):
        write(Path("/dev/full"))


def test_a_pipe_with_a_reader_gets_everything(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    content = bytes(range(256)) * 4096  # more than a pipe holds
    while True:
        try:
            write(pipe, content)
            break
        except ValueError:  # the reader has not opened it yet
            continue
    reader.join()
    assert found == [content]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_without_a_reader_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot write"):
        write(tmp_path / "pipe")


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        (tmp_path / "folder").mkdir()
        for name, what in (("s", "a socket"), ("folder", "a directory")):
            for act in (write, check_output):
                with pytest.raises(ValueError, match=f"^{name} is {what}: give the name of a file$"):
                    act(Path(name))
            assert Path(name).exists()


def test_the_check_comes_before_the_work(tmp_path: Path) -> None:
    existing = tmp_path / "there.csv"
    existing.write_bytes(b"old")
    for path, force, suffixes, reason in (
        (existing, False, (), "there.csv exists: choose another name, or overwrite it with --force"),
        (existing, True, (".npz",), "there.csv ends with '.csv': expected .npz"),
        (tmp_path / "no" / "x", False, (), "no is not a directory: create it first"),
        (tmp_path / ("n" * 300), False, (), "cannot write .*: File name too long"),
        (Path("/proc/offmoe"), False, (), "cannot write /proc/offmoe: "),
    ):
        with pytest.raises(ValueError, match=reason):
            check_output(path, force, *suffixes)
    check_output(existing, True, ".csv")
    check_output(tmp_path / "new.csv")
    assert os.listdir(tmp_path) == ["there.csv"]


def test_a_name_of_the_longest_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path)
    assert path.read_bytes() == b"new"


def test_a_loop_of_links_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="cannot write"):
        check_output(tmp_path / "a")


def test_a_draft_is_removed_on_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), draft(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
