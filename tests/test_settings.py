"""Sizes, budgets, settings and sampling: what is taken, and the line that refuses the rest."""

from __future__ import annotations

from typing import Any

import pytest

from offmoe.errors import OffmoeError
from offmoe.settings import Budget, Sampling, Settings, format_size, parse_budget, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1000000", 1_000_000), (4096, 4096), ("8GiB", 8 * 2**30), ("8g", 8 * 2**30),
        ("8 GB", 8 * 10**9), ("1.5MiB", 3 * 2**19), ("512K", 2**19), (" 2tib ", 2**41), ("7b", 7),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "8GiBs", "1e9", "0x10", "GiB", "1 2", "nan", "50%", "٣GiB%"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OffmoeError, match="is not a size: write for example 8GiB"):
        parse_size(text)


def test_a_size_that_no_memory_has() -> None:
    with pytest.raises(OffmoeError, match="larger than any memory"):
        parse_size("9999999999TiB")


def test_budgets_are_bytes_or_a_share() -> None:
    assert parse_budget("50%") == Budget(percent=50.0)
    assert parse_budget("1MiB") == Budget(bytes=2**20)
    assert parse_budget(parse_budget("12.5%")) == Budget(percent=12.5)


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "x%", "%", "nan%", "1e1%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(OffmoeError, match="is not a share: write a number above 0 and up to 100"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (31_352_832, "29.9 MiB"), (1.25 * 2**30, "1.25 GiB"), (2**42, "4 TiB")],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


def test_settings_are_parsed_once() -> None:
    settings = Settings.of(vram="50%", ram="1GiB", policy=None, device="cuda:1")
    assert settings == Settings(vram=Budget(percent=50.0), ram=2**30, device="cuda:1")
    assert Settings.of(**vars(settings)) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "unknown setting 'speed': known are vram, ram, policy,"),
        ({"scope": "all"}, "scope 'all' is unknown: choose layer or global"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown: choose f32 or bf16 or f16"),
        ({"device": "cuda:x"}, "device 'cuda:x' is unknown: write cpu, cuda or cuda:N"),
        ({"ctx": 15}, "ctx is 15: expected a whole number, at least 16"),
        ({"chunk": True}, "chunk is True: expected a whole number, at least 1"),
        ({"chunk": 0}, "chunk is 0: expected a whole number, at least 1"),
        ({"chunk": 1.5}, "chunk is 1.5: expected a whole number, at least 1"),
    ],
)
def test_settings_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError) as error:
        Settings.of(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 1}, "unknown setting 'heat': known are temperature, top_k,"),
        ({"temperature": -0.1}, "temperature is -0.1: expected a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan: expected a number from 0 to 100"),
        ({"top_p": 1.1}, "top_p is 1.1: expected a number from 0 to 1"),
        ({"min_p": -1}, "min_p is -1: expected a number from 0 to 1"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0: expected a number from 0.01 to 100"),
        ({"top_k": -1}, "top_k is -1: expected a whole number, at least 0"),
        ({"seed": -1}, "seed is -1: expected a whole number, at least 0"),
        ({"max_tokens": 0}, "max_tokens is 0: expected a whole number, at least 1"),
        ({"stop": ("a", "")}, "a stop string is empty: give at least one character"),
    ],
)
def test_sampling_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError) as error:
        Sampling.of(**values)
    assert str(error.value).startswith(message)


def test_one_stop_string_is_a_tuple_of_one() -> None:
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_merged_takes_only_what_is_not_given() -> None:
    merged = Sampling(temperature=0.0, stop=("a",)).merged(Sampling(temperature=1.0, top_k=5, stop=("b",)))
    assert merged == Sampling(temperature=0.0, top_k=5, stop=("a",))
