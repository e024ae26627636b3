"""Where settings and state are kept, and what happens without a home directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offmoe.app.profile import read_profile
from offmoe.app.user_folders import config_folder, state_folder
from offmoe.checkpoint.find_model import DEMO
from offmoe.errors import OffmoeError


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process one of a container's user without HOME and without an entry in /etc/passwd."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def test_the_variables_of_the_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert config_folder() == tmp_path / ".config" / "offmoe"
    assert state_folder() == Path("/var/state/offmoe")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory() -> None:
    for folder, variable in ((config_folder, "XDG_CONFIG_HOME"), (state_folder, "XDG_STATE_HOME")):
        with pytest.raises(OffmoeError, match=f"^there is no home directory: set HOME or {variable}$"):
            folder()
    assert read_profile(DEMO) is None
