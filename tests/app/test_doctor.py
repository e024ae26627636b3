"""Doctor's findings on machines that differ from this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from offmoe.app import doctor
from offmoe.app.doctor import NOTE, OK, PROBLEM, Check, Finding
from offmoe.errors import OffmoeError


def test_every_problem_and_note_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(100_000))
    checks = doctor.run_checks(tmp_path)
    assert {"versions", "GPU", "RAM", "locked memory", "disk", "compiler", "triton", "downloads"} <= {
        check.name for check in checks
    }
    assert all(check.found for check in checks)
    assert not [check for check in checks if (check.status == OK) == bool(check.remedy)]


def test_a_check_that_fails_is_a_problem() -> None:
    def broken() -> Finding:
        raise OffmoeError("no disk")

    assert doctor.run_check("disk", broken).status == PROBLEM
    assert doctor.run_check("disk", broken).found == "not measured: no disk"


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "remedy"),
    [
        (None, None, NOTE, "install its driver"),
        ("580.1", None, PROBLEM, "install torch's CUDA build"),
        ("580.1", "13.0", PROBLEM, "update the driver"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, status: str, remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    finding = doctor.gpu()
    assert finding.status == status
    assert remedy in finding.remedy


@pytest.mark.parametrize(("capability", "status"), [((7, 5), NOTE), ((9, 0), OK)])
def test_a_gpu_without_bfloat16_is_noted(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "580.1")
    assert doctor.gpu().status == status
    assert "a card, compute capability" in doctor.gpu().found


@pytest.mark.parametrize(("gpu", "status"), [(True, PROBLEM), (False, NOTE)])
def test_a_missing_compiler_names_the_packages(monkeypatch: pytest.MonkeyPatch, gpu: bool, status: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.compiler().status == status
    assert "gcc python3-dev" in doctor.compiler().remedy


def test_a_missing_package_says_how_to_get_it() -> None:
    assert doctor.package("no_such_module", "pip install it") == Finding("not installed", NOTE, "pip install it")
    assert doctor.package("click", "").status == OK


def test_an_empty_folder_has_no_disk_to_measure(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path).status == NOTE


def test_the_table_shows_name_status_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=80).print(doctor.table([Check("GPU", PROBLEM, "none [red]", "buy one")]))
    assert capsys.readouterr().out.split() == ["GPU", "problem", "none", "[red]", "→", "buy", "one"]


def test_json() -> None:
    program = str(Path(sys.executable).with_name("offmoe"))
    result = subprocess.run([program, "doctor", "--json"], capture_output=True, timeout=120)
    checks = json.loads(result.stdout)
    assert set(checks[0]) == {"name", "status", "found", "remedy"}
    assert result.returncode == any(check["status"] == PROBLEM for check in checks)
