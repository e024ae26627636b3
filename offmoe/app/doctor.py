"""Checks of what this machine offers, with a remedy for everything that is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import resource
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from offmoe import __version__
from offmoe.errors import OffmoeError
from offmoe.machine.bandwidth import disk_bandwidth, memory_bandwidth, pcie_bandwidth, vram_bandwidth
from offmoe.plan import free_ram
from offmoe.settings import format_size

if TYPE_CHECKING:
    from rich.table import Table

OK, NOTE, PROBLEM = "ok", "note", "problem"
COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "red"}
PINNED_PROBE = 64 << 20


@dataclass(frozen=True)
class Check:
    """Result of one check. A note is harmless for this machine, a problem is not."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """Outcome of a check, without its name."""

    found: str
    status: str = OK
    remedy: str = ""


def run_checks(model: Path) -> list[Check]:
    """Run all checks; measuring takes about four seconds. The disk that holds `model` is measured."""
    checks: dict[str, Callable[[], Finding]] = {"versions": versions, "GPU": gpu}
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        checks |= {
            "VRAM": partial(vram, device),
            "pinned memory": pinned_memory,
            "link to the GPU": partial(gpu_link, device),
        }
    checks |= {
        "RAM": ram,
        "locked memory": locked_memory,
        "disk": partial(disk, model),
        "compiler": compiler,
        "triton": partial(package, "triton", "torch's CUDA build installs it, for compiled kernels on a GPU"),
        "llama-cpp-python": partial(package, "llama_cpp", "pip install 'offmoe[llama]', to pack K-quants"),
        "matplotlib": partial(package, "matplotlib", "pip install 'offmoe[lab]', to draw plots"),
        "downloads": downloads,
    }
    return [run_check(name, check) for name, check in checks.items()]


def run_check(name: str, check: Callable[[], Finding]) -> Check:
    """Run one check; an error that it raises becomes a problem."""
    try:
        finding = check()
    except (OSError, RuntimeError, OffmoeError) as error:
        finding = Finding(
            f"not measured: {str(error).splitlines()[0]}", PROBLEM, "fix this, then run offmoe doctor again"
        )
    return Check(name, finding.status, finding.found, finding.remedy)


def versions() -> Finding:
    return Finding(f"offmoe {__version__}, torch {torch.__version__}, Python {platform.python_version()}")


def gpu() -> Finding:
    """Report the first GPU, or whether the driver or torch is missing."""
    driver = nvidia_driver()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        name = torch.cuda.get_device_name(0)
        found = f"{name}, compute capability {major}.{minor}, driver {driver or 'unknown'}"
        return Finding(found) if major >= 8 else Finding(found, NOTE, "it does not support bfloat16: float16 is used")
    if driver is None:
        return Finding("no NVIDIA driver", NOTE, "everything runs on the CPU; with a GPU: install its driver")
    if torch.version.cuda is None:
        return Finding(f"driver {driver}, torch without CUDA", PROBLEM, "install torch's CUDA build")
    return Finding(
        f"driver {driver}, torch for CUDA {torch.version.cuda} sees no GPU",
        PROBLEM,
        "update the driver, then restart",
    )


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.partition("\n")[0].strip() or None


def vram(device: torch.device) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    found = f"{format_size(free)} of {format_size(total)} free, read at {format_rate(vram_bandwidth(device))}"
    return Finding(found) if free >= total / 2 else Finding(found, NOTE, "nvidia-smi shows what uses the rest")


def pinned_memory() -> Finding:
    torch.empty(PINNED_PROBE, dtype=torch.uint8, pin_memory=True)  # RuntimeError if it is refused
    return Finding(f"{format_size(PINNED_PROBE)} allocated")


def gpu_link(device: torch.device) -> Finding:
    rate = pcie_bandwidth(device)
    slow = Finding(format_rate(rate), NOTE, "slower than PCIe 3 x16: check that the GPU is in an x16 slot")
    return Finding(format_rate(rate)) if rate >= 10e9 else slow


def ram() -> Finding:
    total, free = psutil.virtual_memory().total, free_ram()
    found = f"{format_size(free)} of {format_size(total)} free, read at {format_rate(memory_bandwidth())}"
    if free < 0.95 * psutil.virtual_memory().available:  # a smaller difference is noise between two readings
        return Finding(f"{found}; a container allows no more", NOTE, "raise the container's memory limit")
    return Finding(found)


def locked_memory() -> Finding:
    """Report the limit of locked memory; CUDA is exempt from it, but a container may not be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Finding("no limit" if soft == resource.RLIM_INFINITY else f"limit {format_size(soft)} (CUDA is exempt)")


def disk(model: Path) -> Finding:
    """Measure the disk that holds the largest file of `model`."""
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    if not files:
        return Finding(f"no file in {model}", NOTE, "give a MODEL")
    rate, direct = disk_bandwidth(max(files, key=lambda path: path.stat().st_size))
    if direct:
        return Finding(f"{format_rate(rate)} with O_DIRECT")
    remedy = "put the model on ext4 or xfs if it does not fit in RAM"
    return Finding(f"{format_rate(rate)}, no O_DIRECT: partly the speed of the page cache", NOTE, remedy)


def compiler() -> Finding:
    """Look for a C compiler and Python.h: Triton compiles a small C extension the first time it runs on a GPU."""
    cc = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if cc and header.exists():
        return Finding(f"{cc}, {header}")
    missing = " and ".join(name for name, found in (("a C compiler", cc), ("Python.h", header.exists())) if not found)
    status = PROBLEM if torch.cuda.is_available() else NOTE
    return Finding(f"{missing} missing", status, "apt install gcc python3-dev (Triton needs them on a GPU)")


def package(module: str, remedy: str) -> Finding:
    """Report the version of an optional package."""
    if importlib.util.find_spec(module) is None:
        return Finding("not installed", NOTE, remedy)
    names = importlib.metadata.packages_distributions().get(module, [module])
    return Finding(importlib.metadata.version(names[0]))


def downloads() -> Finding:
    """Report the directory of the Hugging Face cache and its free space."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Finding(f"{folder}, {format_size(shutil.disk_usage(existing).free)} free")


def format_rate(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s"


def table(checks: list[Check]) -> Table:
    """Return the checks as a table for people."""
    from rich.table import Table
    from rich.text import Text

    lines = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        found = f"{check.found}\n→ {check.remedy}" if check.remedy else check.found
        lines.add_row(check.name, Text(check.status, COLOURS[check.status]), Text(found))
    return lines
