"""Path, or the files of a repository, that a name refers to; the hub's cache is created by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from offmoe.checkpoint import find_model as find_model_module
from offmoe.checkpoint.find_model import DEMO, choose_gguf, find_model, select_files
from offmoe.checkpoint.hub_cache import remember_absent
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
    good += ["additional_chat_templates/rag.jinja"]
    bad = ["a.bin", "a.pt", "modeling.py", "original/a.safetensors", "consolidated.safetensors", "README.md"]
    assert select_files([*good, *bad], "", "org/name") == good


WHOLE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cached copies that the hub was asked to complete; it is there, unlike in the other tests."""
    copies: list[Any] = []
    monkeypatch.setattr(
        find_model_module, "from_hub", lambda repo, selector, cached: (copies.append(cached), Path("hub"))[1]
    )
    return copies


def test_safetensors_in_the_cache(cache: Path) -> None:
    folder = cached(cache, *WHOLE, "model.safetensors")
    assert find_model("org/name") == folder


def test_a_gguf_in_the_cache(cache: Path) -> None:
    folder = cached(cache, *GGUFS)
    assert find_model("org/name:Q8_0") == folder / GGUFS[2]


def sharded(cache: Path) -> Path:
    """Create a snapshot of two shards and an index, with all that belongs to it."""
    folder = cached(cache, *WHOLE, *SHARDS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}))
    return folder


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", *SHARDS])
@pytest.mark.parametrize("dangling", [False, True])
def test_what_a_model_needs_is_fetched(cache: Path, missing: str, dangling: bool) -> None:
    """Without a network it is named. A link to a blob whose download was broken off counts as missing."""
    folder = sharded(cache)
    (folder / missing).unlink()
    if dangling:
        (folder / missing).symlink_to("../../blobs/0123")
        (folder.parents[1] / "blobs").mkdir()
        (folder.parents[1] / "blobs" / "0123.incomplete").touch()
    with pytest.raises(
        OffmoeError, match=rf"^org/name: the cached copy lacks {missing}.*: fetch it with a n.*hf download"
    ):
        find_model("org/name")


@pytest.mark.parametrize("missing", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja", INDEX])
def test_what_a_model_may_lack_is_asked_for(cache: Path, caplog: pytest.LogCaptureFixture, missing: str) -> None:
    """Without a network a line says so, and the model is taken."""
    folder = sharded(cache)
    (folder / missing).unlink()
    assert find_model("org/name") == folder
    assert f"org/name: the cached copy may lack {missing}, and the hub cannot be asked" in caplog.text


@pytest.mark.parametrize("missing", [*WHOLE, *SHARDS, INDEX])
def test_the_hub_completes_the_cached_commit(cache: Path, asked: list[Any], missing: str) -> None:
    folder = sharded(cache)
    assert find_model("org/name") == folder
    (folder / missing).unlink()
    assert find_model("org/name") == Path("hub")
    assert asked[0].commit == "0" * 40


def test_a_template_within_tokenizer_config(cache: Path, asked: list[Any]) -> None:
    folder = sharded(cache)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert find_model("org/name") == folder


def test_what_the_repository_does_not_have_is_asked_for_once(cache: Path, asked: list[Any]) -> None:
    folder = sharded(cache)
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    remember_absent(folder, [path.name for path in folder.iterdir()])
    assert find_model("org/name") == folder


def test_no_weights_in_the_cache(cache: Path) -> None:
    cached(cache, *WHOLE)
    with pytest.raises(OffmoeError, match="org/name: the cached copy lacks its weights: fetch it with a network"):
        find_model("org/name")


def test_nothing_in_the_cache(cache: Path) -> None:
    with pytest.raises(OffmoeError, match="org/name is not a local path and cannot be downloaded from the hub"):
        find_model("org/name")


def test_an_unfinished_gguf_is_not_taken(cache: Path) -> None:
    cached(cache, GGUFS[2])
    with pytest.raises(OffmoeError, match=f"the cached copy lacks {GGUFS[3]}: fetch it with a network"):
        find_model("org/name:Q8_0")


def test_several_gguf_in_the_cache(cache: Path) -> None:
    cached(cache, *GGUFS)
    with pytest.raises(OffmoeError, match="org/name has several models: select one with org/name:QUANT from"):
        find_model("org/name")


def test_a_path_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("gone.gguf")
    with pytest.raises(OffmoeError, match=r"m\.gguf is a link to gone\.gguf, which is not there"):
        find_model(str(tmp_path / "m.gguf"))
