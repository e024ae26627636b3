"""Profiles: the fastest settings that `offmoe tune` found for a model on this machine, as TOML files in the user's
config directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.app.user_folders import config_folder
from offmoe.errors import OffmoeError
from offmoe.settings import Budget, Settings, parse_budget, parse_policy, parse_prefetch

if TYPE_CHECKING:
    from offmoe.cache.policy import PolicySpec
    from offmoe.prefetch import Gate

VERSION = 1  # of the file format
HEAD_BYTES = 1 << 20  # hashed of each file: a GGUF's metadata and first tensors


@dataclass(frozen=True)
class Profile:
    """A tuned profile. `policy` and `prefetch` are settings of the engine; None means the default."""

    path: Path
    vram: Budget | None  # budget of the measurement; None: the free memory
    device: str  # "cpu" or "cuda"
    policy: PolicySpec | None
    prefetch: Gate | None
    gain: float  # time per token saved, as a share of the default's
    spread: float  # uncertainty of `gain`

    @property
    def summary(self) -> str:
        """One line for people."""
        at = f"tuned at --vram {self.vram}" if self.vram else "tuned"
        if self.policy is None and self.prefetch is None:
            return f"profile: the defaults, nothing was faster ({at})"
        chosen = " + ".join(str(part) for part in (self.policy, self.prefetch) if part)
        faster = f"{self.gain:.1%} ± {self.spread:.1%} less time per token"
        return f"profile: {chosen}, {faster} ({at}); --no-profile ignores it"


def model_key(path: Path) -> str:
    """Return a hash of a model's files: names, sizes and first bytes.

    Unreadable files are skipped: the loader reports them.
    """
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():  # a FIFO would hang
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with suppress(OSError), file.open("rb") as content:
                digest.update(content.read(HEAD_BYTES))
    return digest.hexdigest()[:16]


def machine_name() -> str:
    """Return the names of the processor and the GPUs, without importing torch."""
    gpus = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        gpus += [
            summary.partition(":")[2].strip()
            for summary in file.read_text().splitlines()
            if summary.startswith("Model:")
        ]
    return " · ".join([f"{os.cpu_count()} × {processor()}", *gpus])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (summary.partition(":")[2].strip() for summary in lines if summary.startswith("model name")), platform.machine()
    )


def profile_path(model: Path) -> Path:
    """Return the path of the profile for this model on this machine, whether or not it exists.

    Raises OffmoeError if the user has no home directory.
    """
    machine = hashlib.sha256(machine_name().encode()).hexdigest()[:8]
    return config_folder() / "profiles" / f"{model.stem}-{model_key(model)}-{machine}.toml"


def read_profile(model: Path) -> Profile | None:
    """Return the model's profile, or None if there is none.

    Raises OffmoeError, with the file's name, if it is damaged.
    """
    try:
        path = profile_path(model)
    except OffmoeError:  # no home directory: tune could not have written one
        return None
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OffmoeError(f"cannot read the profile {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise damaged_profile(path, str(error)) from None
    return parse_profile(path, document)


def parse_profile(path: Path, document: dict[str, Any]) -> Profile:
    """Validate the document of a profile."""
    if document.get("version") != VERSION:
        raise damaged_profile(path, f"its version is {document.get('version')!r}, expected {VERSION}")
    settings, evidence = document.get("settings"), document.get("evidence")
    if not isinstance(settings, dict) or not isinstance(evidence, dict):
        raise damaged_profile(path, "expected the tables settings and evidence")
    if unknown := set(settings) - {"policy", "prefetch"}:
        raise damaged_profile(path, f"settings has {sorted(unknown)[0]!r}: expected policy or prefetch")
    texts = {
        "policy": settings.get("policy"),
        "prefetch": settings.get("prefetch"),
        "vram": evidence.get("vram"),
        "device": evidence.get("device"),
    }
    numbers = {name: evidence.get(name) for name in ("gain", "spread")}
    for name, text in texts.items():
        if not isinstance(text, str | None) or (name == "device" and text not in ("cpu", "cuda")):
            raise damaged_profile(path, f"{name} is {text!r}")
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise damaged_profile(path, f"{name} is {number!r}, expected a number")
    parsers: dict[str, Callable[[Any], Any]] = {
        "policy": parse_policy,
        "prefetch": parse_prefetch,
        "vram": parse_budget,
        "device": str,
    }
    try:
        parsed = {name: None if text is None else parsers[name](text) for name, text in texts.items()}
    except OffmoeError as error:
        raise damaged_profile(path, str(error)) from None
    return Profile(path=path, **parsed, **numbers)  # type: ignore[arg-type]


def damaged_profile(path: Path, reason: str) -> OffmoeError:
    """Return the error for a damaged profile."""
    reason = " ".join(reason.split())
    return OffmoeError(
        f"the profile {path} is damaged and ignored ({reason}): "
        "run `offmoe tune` to write it again, or add --forget to delete it"
    )


def apply_profile(model: Path, settings: Settings) -> tuple[Settings, str | None]:
    """Return `settings` completed from the model's profile, and a line about it; explicit options take precedence."""
    try:
        profile = read_profile(model)
    except OffmoeError as error:
        return settings, str(error)
    if profile is None or not matches_device(profile, settings):
        return settings, None
    if profile.vram is not None and settings.vram is not None and settings.vram != profile.vram:
        return settings, f"profile: ignored, it was tuned at --vram {profile.vram} and not at {settings.vram}"
    if settings.policy is not None or settings.prefetch is not None:
        return settings, "profile: ignored, because --policy or --prefetch is given"
    return replace(settings, policy=profile.policy, prefetch=profile.prefetch), profile.summary


def matches_device(profile: Profile, settings: Settings) -> bool:
    """Return whether the engine will run on the kind of device that was measured."""
    if settings.device is not None:
        return settings.device.startswith(profile.device)
    import torch  # the engine imports it next anyway

    return profile.device == ("cuda" if torch.cuda.is_available() else "cpu")


def toml_value(value: Any) -> str:
    """Return a string or a number in TOML syntax."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} cannot be written to a profile")
    return repr(value)
