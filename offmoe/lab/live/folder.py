"""Directory of a run: run.json describes what is measured, cells/ has one file per finished measurement.

All writes are atomic.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from offmoe.cache.files import naming, whole_file
from offmoe.errors import OffmoeError
from offmoe.lab.live.results import Configuration, Measured

RUN = "run.json"


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, and its directory if there is none; see `whole_file`. Raises OffmoeError."""
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except ValueError as error:
        raise OffmoeError(f"{error}; files written before are kept") from error


def check_writable(folder: Path) -> None:
    """Create `folder`. Raises OffmoeError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OffmoeError(f"cannot write {folder}: {error.strerror}") from None


@dataclass(frozen=True)
class Cell:
    """One measurement to make: a configuration in a round. `again`: the baseline, repeated at the end of the round."""

    index: int
    round: int
    configuration: Configuration
    again: bool = False

    @property
    def file(self) -> str:
        text = str(self.configuration).replace("%", "pct").replace("=", "")
        slug = "".join(char if char.isalnum() or char == "." else "-" for char in text)
        return f"{self.index:03}-r{self.round}-{slug}{'-again' if self.again else ''}.json"


class Folder:
    """Results of one run, some of them perhaps from an earlier start."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """`run` is everything that must be equal for results to belong to the same run.

        Raises OffmoeError if `path` belongs to another run.
        """
        self.path, self.run, self.broken = path, run, list[Path]()
        self.key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
        existing = self._existing_key()
        if existing is None:
            write_file(path / RUN, json.dumps({"key": self.key, **run}, indent=1, ensure_ascii=False))
        elif existing != self.key:
            raise OffmoeError(
                f"{path} has the results of another run (other options, model, machine or version): give another -o, "
                "or delete it"
            )
        check_writable(path)

    def _existing_key(self) -> str | None:
        """Return the key of the run in the directory, or None if it is empty or does not exist."""
        try:
            if not self.path.exists() or not any(self.path.iterdir()):
                return None
            return str(json.loads((self.path / RUN).read_bytes())["key"])
        except OSError as error:
            if (self.path / RUN).exists() or not self.path.is_dir():
                raise OffmoeError(f"cannot use {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise OffmoeError(f"{self.path / RUN} is damaged: give another -o, or delete the folder") from None
        raise OffmoeError(f"{self.path} is not empty and has no run of `bench latency`: give another -o")

    def read(self, cell: Cell) -> Measured | None:
        """Return a measurement, or None if there is none or its file is damaged; the file is then added to `broken`."""
        path = self.path / "cells" / cell.file
        try:
            document = json.loads(path.read_bytes())
            if document.pop("run") != self.key or set(document) != {field.name for field in fields(Measured)}:
                raise ValueError("it belongs to another run")
            return Measured(**document)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.broken.append(path)
            return None

    def write(self, cell: Cell, measured: Measured) -> None:
        """Write a measurement."""
        document = {"run": self.key, **measured.as_json()}
        write_file(self.path / "cells" / cell.file, json.dumps(document, indent=1))
