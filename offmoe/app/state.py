"""Directory of what offmoe keeps for its user: the history of inputs, and chats."""

from __future__ import annotations

import os
from pathlib import Path


def state_directory(name: str = "") -> Path:
    """Return a directory below the user's state directory (XDG_STATE_HOME, ~/.local/state), made if it is missing and
    open to its owner only. Raises OSError, also if the user has no home directory.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # the XDG specification: ignored
        try:
            state = str(Path.home() / ".local" / "state")
        except RuntimeError:  # neither HOME nor an entry in /etc/passwd
            raise FileNotFoundError(None, "the user has no home directory") from None
    folder = Path(state, "offmoe", name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
