"""Directories of the user for settings and for state (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path

from offmoe.errors import OffmoeError


def config_folder() -> Path:
    """Return offmoe's directory of settings. Raises OffmoeError if the user has no home directory."""
    return user_folder("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """Return offmoe's directory of histories and chats. Raises OffmoeError if the user has no home directory."""
    return user_folder("XDG_STATE_HOME", ".local/state")


def user_folder(variable: str, default: str) -> Path:
    """Return the directory `offmoe` in the one that `variable` names, or in `default` of the home directory.

    A relative path in the variable is ignored, as the specification demands.
    """
    named = os.environ.get(variable, "")
    if os.path.isabs(named):
        return Path(named) / "offmoe"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # a container's user without HOME and without an entry in /etc/passwd
        raise OffmoeError(f"there is no home directory: set HOME or {variable}")
    return Path(home) / default / "offmoe"
