"""What `offmoe tune` found fastest for a model on this machine: a TOML file in the user's config directory."""

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

from offmoe.errors import OffmoeError
from offmoe.settings import Budget, Settings, parse_budget, parse_policy, parse_prefetch

if TYPE_CHECKING:
    from offmoe.cache.policy import PolicySpec
    from offmoe.prefetch import Gate

VERSION = 1
HEAD = 1 << 20  # bytes of a file that stand for it: a GGUF's metadata and first tensors


@dataclass(frozen=True)
class Profile:
    """`policy` and `prefetch` are what the engine is given; None: the default stayed."""

    path: Path
    vram: Budget | None  # the budget that it was measured at; None: what is free
    device: str  # cpu or cuda
    policy: PolicySpec | None
    prefetch: Gate | None
    gain: float  # share of the default's time that is saved
    spread: float

    @property
    def line(self) -> str:
        """For a person, in one line."""
        at = f"tuned at --vram {self.vram}" if self.vram else "tuned"
        if self.policy is None and self.prefetch is None:
            return f"profile: the default stays, nothing was faster ({at})"
        chosen = " + ".join(str(part) for part in (self.policy, self.prefetch) if part)
        return f"profile: {chosen}, {self.gain:.1%} ± {self.spread:.1%} less time a token ({at}); --no-profile: without"


def model_key(path: Path) -> str:
    """Of a model's files: their names, sizes and heads. What cannot be read the loader will complain about."""
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():  # a FIFO would hang
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with suppress(OSError), file.open("rb") as content:
                digest.update(content.read(HEAD))
    return digest.hexdigest()[:16]


def machine_name() -> str:
    """Processor and GPUs, without asking torch."""
    gpus = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        gpus += [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("Model:")]
    return " · ".join([f"{os.cpu_count()} × {processor()}", *gpus])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def profile_path(model: Path) -> Path:
    """Where the profile of this model on this machine lies, if there is one."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    machine = hashlib.sha256(machine_name().encode()).hexdigest()[:8]
    return config / "offmoe" / "profiles" / f"{model.stem}-{model_key(model)}-{machine}.toml"


def read_profile(model: Path) -> Profile | None:
    """None: there is none. OffmoeError, with the file's name, for one that is damaged."""
    path = profile_path(model)
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OffmoeError(f"cannot read the profile {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from None
    return parse_profile(path, document)


def parse_profile(path: Path, document: dict[str, Any]) -> Profile:
    if document.get("version") != VERSION:
        raise damaged(path, f"its version is {document.get('version')!r}, expected {VERSION}")
    settings, evidence = document.get("settings"), document.get("evidence")
    if not isinstance(settings, dict) or not isinstance(evidence, dict):
        raise damaged(path, "expected the tables settings and evidence")
    if unknown := set(settings) - {"policy", "prefetch"}:
        raise damaged(path, f"settings has {sorted(unknown)[0]!r}: known are policy, prefetch")
    texts = {"policy": settings.get("policy"), "prefetch": settings.get("prefetch"), "vram": evidence.get("vram"),
             "device": evidence.get("device")}  # fmt: skip
    numbers = {name: evidence.get(name) for name in ("gain", "spread")}
    for name, text in texts.items():
        if not isinstance(text, str | None) or (name == "device" and text not in ("cpu", "cuda")):
            raise damaged(path, f"{name} is {text!r}")
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise damaged(path, f"{name} is {number!r}, expected a number")
    parsers: dict[str, Callable[[Any], Any]] = {
        "policy": parse_policy,
        "prefetch": parse_prefetch,
        "vram": parse_budget,
        "device": str,
    }
    try:
        parsed = {name: None if text is None else parsers[name](text) for name, text in texts.items()}
    except OffmoeError as error:
        raise damaged(path, str(error)) from None
    return Profile(path=path, **parsed, **numbers)  # type: ignore[arg-type]


def damaged(path: Path, what: str) -> OffmoeError:
    reason = " ".join(what.split())
    return OffmoeError(
        f"the profile {path} is damaged and not used ({reason}): `offmoe tune` writes it anew, --forget deletes it"
    )


def use_profile(model: Path, settings: Settings) -> tuple[Settings, str | None]:
    """`settings` with what the model's profile knows better, and the line that says so; explicit options win."""
    try:
        profile = read_profile(model)
    except OffmoeError as error:
        return settings, str(error)
    if profile is None or not fits(profile, settings):
        return settings, None
    if profile.vram is not None and settings.vram is not None and settings.vram != profile.vram:
        return settings, f"profile: tuned at --vram {profile.vram}, not used at {settings.vram}"
    if settings.policy is not None or settings.prefetch is not None:
        return settings, "profile: left out, --policy or --prefetch was given"
    return replace(settings, policy=profile.policy, prefetch=profile.prefetch), profile.line


def fits(profile: Profile, settings: Settings) -> bool:
    """Whether the engine will run on the kind of device that was measured."""
    if settings.device is not None:
        return settings.device.startswith(profile.device)
    import torch  # the engine needs it next

    return profile.device == ("cuda" if torch.cuda.is_available() else "cpu")


def toml(value: Any) -> str:
    """A string or number as TOML writes it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not written to a profile")
    return repr(value)
