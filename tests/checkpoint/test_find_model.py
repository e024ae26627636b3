"""Path, or the files of a repository, that a name refers to; the hub's cache is created by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from offmoe.checkpoint.find_model import DEMO, choose_gguf, find_model, select_files
from offmoe.errors import OffmoeError

GGUFS = ["m-Q4_K.gguf", "m-Q4_K_M.gguf", "q8/m-Q8_0-00001-of-00002.gguf", "q8/m-Q8_0-00002-of-00002.gguf"]


def cached(cache: Path, *names: str) -> Path:
    """Create a snapshot of org/name with `names` in the hub's cache."""
    repo = cache / "models--org--name"
    folder = repo / "snapshots" / ("0" * 40)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_demo_and_paths(tmp_path: Path) -> None:
    assert find_model("demo") == DEMO
    assert DEMO.exists()
    assert find_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("pick", "found"),
    [
        ("Q4_K", GGUFS[:1]),
        ("q4_k_m", GGUFS[1:2]),
        ("Q8_0", GGUFS[2:]),
        ("m-Q4_K_M.gguf", GGUFS[1:2]),
        (GGUFS[2], GGUFS[2:]),
    ],
)
def test_one_gguf_is_chosen_with_all_its_parts(pick: str, found: list[str]) -> None:
    assert choose_gguf(GGUFS, pick, "org/name") == found


@pytest.mark.parametrize(("pick", "message"), [("", "has several models"), ("K_M", "has no GGUF named 'K_M'")])
def test_no_gguf_is_guessed(pick: str, message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        choose_gguf(GGUFS, pick, "org/name")


def test_no_code_no_pickle_and_no_second_copy_of_the_weights() -> None:
    good = ["a.safetensors", "config.json", "chat_template.jinja", "merges.txt", "tiktoken.model", "hy.tiktoken"]
    bad = ["a.bin", "a.pt", "modeling.py", "original/a.safetensors", "consolidated.safetensors", "README.md"]
    assert select_files([*good, *bad], "", "org/name") == good


def test_safetensors_in_the_cache(cache: Path) -> None:
    folder = cached(cache, "config.json", "model.safetensors")
    assert find_model("org/name") == folder


def test_a_gguf_in_the_cache(cache: Path) -> None:
    folder = cached(cache, *GGUFS)
    assert find_model("org/name:Q8_0") == folder / GGUFS[2]


@pytest.mark.parametrize("missing", ["config.json", "b.safetensors"])
def test_an_unfinished_download_is_not_taken(cache: Path, missing: str) -> None:
    names = {"config.json", "a.safetensors", "b.safetensors", "model.safetensors.index.json"} - {missing}
    folder = cached(cache, *names)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OffmoeError, match="org/name is not a local path and cannot be downloaded from the hub"):
        find_model("org/name")


def test_an_unfinished_gguf_is_not_taken(cache: Path) -> None:
    cached(cache, GGUFS[2])
    with pytest.raises(OffmoeError, match="cannot be downloaded from the hub"):
        find_model("org/name:Q8_0")
