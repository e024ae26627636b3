"""Mutated models of both formats, configs, indexes and tokenizers: an OffmoeError of one line, or a success.

10,000 in all (make test-all), 300 by default; a failure names the seed and the number of the mutant.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from checkpoint_files import model_directory, model_weights
from exhaustive import cases
from mutants import mutated_bytes, mutated_gguf, mutated_json
from safetensors.torch import save_file

from offmoe.app.check import check
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.models.model import open_model
from offmoe.pack.convert import pack
from offmoe.text.tokenizer import load_tokenizer

WALKS, MUTANTS = 100, 100
HANG = 60  # seconds that none may take, on a busy machine
MEMORY = 512 << 10  # KiB that none may take beyond what was taken before
JSON_FILES = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same model as `model`, in two shards, and as `model.gguf`."""
    folder = tmp_path_factory.mktemp("good")
    model = model_directory(folder / "model")
    with open_checkpoint(model) as checkpoint:
        pack(checkpoint, folder / "model.gguf", "f32", lambda done, total: None)
    (model / "model.safetensors").unlink()
    tensors = sorted(model_weights().items())
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file(dict(tensors[number::2]), model / name)
    places = ", ".join(f'"{tensor}": "{names[number % 2]}"' for number, (tensor, _) in enumerate(tensors))
    (model / "model.safetensors.index.json").write_text(
        f'{{"metadata": {{"total_size": 1}}, "weight_map": {{{places}}}}}'
    )
    (model / "generation_config.json").write_text('{"eos_token_id": [257, 258], "temperature": 0.6}')
    (model / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}'
    )
    use(folder / "model")
    use(folder / "model.gguf")
    return folder


def use(path: Path) -> None:
    """Open a model, read every tensor, load the tokenizer and encode with it; check the files."""
    check(path, lambda name, done, total: None)
    with open_model(path).checkpoint as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.tensor(name)
        tokenizer = load_tokenizer(checkpoint)
        try:
            assert all(isinstance(token, int) for token in tokenizer.encode("hi <|im_end|> é\n\n123"))
        finally:
            tokenizer.close()


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fail if the block hangs, takes much memory, or raises anything but an OffmoeError of one line."""

    def hang(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{what} takes more than {HANG} s")

    previous, before = signal.signal(signal.SIGALRM, hang), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(HANG)
    try:
        yield
    except OffmoeError as error:
        message = str(error)
        assert "\n" not in message, what
        assert 0 < len(message) < 1000, what
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY, what


def header_bytes(path: Path) -> int:
    """Return where the weights of a file begin."""
    with open_checkpoint(path) as checkpoint:
        return min(info.range.offset for info in checkpoint.tensors.values())


@pytest.mark.parametrize("seed", cases(range(WALKS), default=range(3)))
def test_mutants(good: Path, tmp_path: Path, seed: int) -> None:
    source, folder, alone = random.Random(seed), tmp_path / "model", tmp_path / "m.gguf"
    shutil.copytree(good / "model", folder)
    data = (good / "model.gguf").read_bytes()
    with open_checkpoint(good / "model.gguf") as checkpoint:
        keys = list(checkpoint.metadata)
    start = header_bytes(good / "model.gguf")
    shards = sorted(folder.glob("*.safetensors"))
    for number in range(MUTANTS):
        what = f"seed {seed}, mutant {number}"
        if source.random() < 0.4:
            alone.write_bytes(mutated_gguf(source, data, start, keys))
            with bounded(f"{what}, GGUF"):
                use(alone)
            continue
        changed = folder / source.choice(JSON_FILES) if source.random() < 0.7 else source.choice(shards)
        whole = changed.read_bytes()
        is_json = changed.suffix == ".json"
        changed.write_bytes(mutated_json(source, whole) if is_json else mutated_bytes(source, whole, 3000))
        with bounded(f"{what}, {changed.name}"):
            use(folder)
        changed.write_bytes(whole)
