"""Memory limits of control groups, read from simulated roots."""

from __future__ import annotations

from pathlib import Path

import pytest

from offmoe.machine.cgroup import memory_left

MIB = 1 << 20
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
NO_LIMIT_V1 = 9223372036854771712


class Root:
    """A root directory with proc and sys of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file("proc/self/mountinfo", OTHER_MOUNTS)
        self.file("proc/self/cgroup", "")

    def file(self, name: str, text: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a") as file:
            file.write(text)

    def v2(self, path: str, mounted: str = "/") -> None:
        self.file("proc/self/cgroup", f"0::{path}\n")
        self.file("proc/self/mountinfo", V2_MOUNT.format(root=mounted))

    def v1(self, path: str, mounted: str = "/") -> None:
        self.file("proc/self/cgroup", f"3:cpu,cpuacct:/elsewhere\n4:memory:{path}\n")
        self.file("proc/self/mountinfo", V1_MOUNT.format(root=mounted))

    def group2(self, path: str, limit: str = "max", used: int = 0, cache: int = 0, high: str = "max") -> None:
        folder = f"sys/fs/cgroup/{path}"
        for name, text in (("max", limit), ("high", high), ("current", str(used))):
            self.file(f"{folder}/memory.{name}", f"{text}\n")
        self.file(f"{folder}/memory.stat", f"anon 1\nactive_file 5\ninactive_file {cache}\n")

    def group1(self, path: str, limit: int, used: int = 0, cache: int = 0, inherited: int = NO_LIMIT_V1) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.file(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.file(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\nhierarchical_memory_limit {inherited}\ntotal_inactive_file {cache}\n"
        self.file(f"{folder}/memory.stat", stat)

    @property
    def left(self) -> int | None:
        return memory_left(self.path)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_no_groups_and_no_limits(root: Root) -> None:
    assert root.left is None
    root.v2("/user.slice/session")
    root.group2("user.slice/session", used=5 * MIB)
    assert root.left is None


def test_nothing_of_proc_can_be_read(tmp_path: Path) -> None:
    assert memory_left(tmp_path) is None


def test_a_container_with_its_own_namespace(root: Root) -> None:
    root.v2("/")
    root.group2("", str(256 * MIB), used=100 * MIB)
    assert root.left == 156 * MIB


def test_a_unit_of_systemd_with_memory_max(root: Root) -> None:
    root.v2("/system.slice/offmoe.service")
    root.group2("system.slice/offmoe.service", str(256 * MIB), used=56 * MIB)
    root.group2("system.slice", used=9000 * MIB)
    assert root.left == 200 * MIB


@pytest.mark.parametrize("tightest", ["own", "parent", "top"])
def test_the_tightest_ancestor_counts(root: Root, tightest: str) -> None:
    root.v2("/top/parent/own")
    for path in ("top", "top/parent", "top/parent/own"):
        root.group2(path, str(100 * MIB if path.endswith(tightest) else 500 * MIB), used=10 * MIB)
    assert root.left == 90 * MIB


def test_a_group_that_others_fill(root: Root) -> None:
    root.v2("/shared/own")
    root.group2("shared", str(1000 * MIB), used=980 * MIB)
    root.group2("shared/own", str(500 * MIB), used=MIB)
    assert root.left == 20 * MIB


def test_page_cache_is_free(root: Root) -> None:
    root.v2("/own")
    root.group2("own", str(256 * MIB), used=256 * MIB, cache=200 * MIB)
    assert root.left == 200 * MIB


def test_memory_high_limits_too(root: Root) -> None:
    root.v2("/own")
    root.group2("own", str(256 * MIB), used=10 * MIB, high=str(128 * MIB))
    assert root.left == 118 * MIB


def test_more_used_than_allowed_is_nothing_left(root: Root) -> None:
    root.v2("/own")
    root.group2("own", str(100 * MIB), used=130 * MIB)
    assert root.left == 0


def test_version_1(root: Root) -> None:
    root.v1("/docker/abc")
    root.group1("docker/abc", 512 * MIB, used=300 * MIB, cache=100 * MIB)
    root.group1("docker", NO_LIMIT_V1, used=900 * MIB)
    assert root.left == 312 * MIB


def test_version_1_without_a_limit(root: Root) -> None:
    root.v1("/own")
    root.group1("own", NO_LIMIT_V1, used=300 * MIB)
    assert root.left is None


def test_version_1_in_a_container_without_a_namespace(root: Root) -> None:
    """The path is the host's, and the mount shows the container's group alone, under its root."""
    root.v1("/docker/abc", mounted="/docker/abc")
    root.group1("", 512 * MIB, used=12 * MIB)
    assert root.left == 500 * MIB


def test_version_1_with_a_limit_of_an_invisible_ancestor(root: Root) -> None:
    root.v1("/docker/abc", mounted="/docker/abc")
    root.group1("", NO_LIMIT_V1, used=12 * MIB, inherited=112 * MIB)
    assert root.left == 100 * MIB


@pytest.mark.parametrize("path", ["/../../other", "/not/there"])
def test_a_path_of_another_namespace_means_the_mount(root: Root, path: str) -> None:
    root.v2(path)
    root.group2("", str(256 * MIB), used=56 * MIB)
    assert root.left == 200 * MIB


def test_both_versions_are_mounted(root: Root) -> None:
    root.v1("/own")
    root.group1("own", 300 * MIB)
    root.v2("/unified")
    root.group2("unified", str(200 * MIB))
    assert root.left == 200 * MIB


def test_a_mount_point_with_a_space(root: Root) -> None:
    root.file("proc/self/cgroup", "0::/own\n")
    root.file("proc/self/mountinfo", r"30 23 0:26 / /sys/my\040groups rw - cgroup2 cgroup2 rw" + "\n")
    root.file("sys/my groups/own/memory.max", f"{64 * MIB}\n")
    root.file("sys/my groups/own/memory.current", "0\n")
    assert root.left == 64 * MIB


@pytest.mark.parametrize("text", ["", "-1", "many", "1e9"])
def test_damaged_limits_are_no_limits(root: Root, text: str) -> None:
    root.v2("/own")
    root.group2("own", text, used=1)
    assert root.left is None
