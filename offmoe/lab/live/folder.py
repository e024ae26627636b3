"""A run's folder: run.json says what is measured, cells/ holds a file a finished measurement. All writes are atomic."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from offmoe.cache.files import whole_file
from offmoe.errors import OffmoeError
from offmoe.lab.live.measure import Configuration, Measured

RUN = "run.json"


def write_file(path: Path, content: str | bytes) -> None:
    """The whole file or none of it; OffmoeError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OffmoeError(f"cannot write {path}: {error.strerror}; what was written before is kept") from error


def check_writable(folder: Path) -> None:
    """Make `folder`; OffmoeError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OffmoeError(f"cannot write {folder}: {error.strerror}") from None


@dataclass(frozen=True)
class Cell:
    """One measurement to make: a configuration's turn in a round; `again`: the baseline, repeated last."""

    index: int
    round: int
    configuration: Configuration
    again: bool = False

    @property
    def file(self) -> str:
        words = str(self.configuration).replace("%", "pct").replace("=", "")
        slug = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in words)
        return f"{self.index:03}-r{self.round}-{slug}{'-again' if self.again else ''}.json"


class Folder:
    """The results of one run, some perhaps from an earlier start."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """`run`: all that must be the same for results to be one run's. OffmoeError where the folder is another's."""
        self.path, self.run, self.broken = path, run, list[Path]()
        self.key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
        found = self._found()
        if found is None:
            write_file(path / RUN, json.dumps({"key": self.key, **run}, indent=1, ensure_ascii=False))
        elif found != self.key:
            raise OffmoeError(
                f"{path} holds another run's results (other options, model, machine or version): give another -o, "
                "or delete it"
            )
        check_writable(path)

    def _found(self) -> str | None:
        """The key of the run in the folder; None where it is empty or not there."""
        try:
            if not self.path.exists() or not any(self.path.iterdir()):
                return None
            return str(json.loads((self.path / RUN).read_bytes())["key"])
        except OSError as error:
            if (self.path / RUN).exists() or not self.path.is_dir():
                raise OffmoeError(f"cannot use {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise OffmoeError(f"{self.path / RUN} is damaged: give another -o, or delete the folder") from None
        raise OffmoeError(f"{self.path} is not empty and holds no run of `bench latency`: give another -o")

    def read(self, cell: Cell) -> Measured | None:
        """What was measured; None: not yet, or its file is damaged and listed in `broken`."""
        path = self.path / "cells" / cell.file
        try:
            document = json.loads(path.read_bytes())
            if document.pop("run") != self.key or set(document) != {field.name for field in fields(Measured)}:
                raise ValueError("it is of another run")
            return Measured(**document)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.broken.append(path)
            return None

    def write(self, cell: Cell, measured: Measured) -> None:
        document = {"run": self.key, **measured.as_json()}
        write_file(self.path / "cells" / cell.file, json.dumps(document, indent=1))
