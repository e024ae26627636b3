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


def open_state_folder(name: str = "") -> Path:
    """Return a directory in that of the state; it is made, open to its owner only, if it is missing.

    Raises OffmoeError if that is impossible.
    """
    folder = state_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OffmoeError(f"{folder}: {error.strerror}") from None
    return folder


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
