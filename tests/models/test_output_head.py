"""The output head is the one in the file, wherever it stands and whatever the config says, as in transformers 5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import int4_files
import pytest
import torch
from packed_files import packed
from reference import reference_of
from safetensors.torch import load_file, save_file
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, saved, tiny
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.models.family import family_of
from offmoe.models.model import open_model
from offmoe.models.names import HEADS
from offmoe.models.read_config import from_hf

Tensors = dict[str, Tensor]
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def rewritten(path: Path, change: Callable[[Tensors], object] | None = None, **fields: object) -> Path:
    """Change tensors and fields of config.json."""
    if change:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return path


def logits(path: Path) -> Tensor:
    with engine_of(path) as engine:
        return decoded(engine, IDS[:16], prompt=8)[0]


def loaded(path: Path, family: str) -> Any:
    """transformers' model of the directory."""
    return type(tiny(family)).from_pretrained(path, dtype="float32").eval()


CASES: dict[str, tuple[bool, Callable[[Tensors], object] | None]] = {  # the flag, and what becomes of the tensors
    "tied, and another head": (True, None),
    "tied, and an equal head": (True, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()})),
    "tied, no head": (True, lambda tensors: tensors.pop(HEAD)),
    "tied, no embedding": (True, lambda tensors: tensors.pop(EMBED)),
    "not tied": (False, None),
    "not tied, and an equal head": (False, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()})),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    tied, change = CASES[case]
    path = rewritten(saved("qwen3_moe", tmp_path), change, tie_word_embeddings=tied)
    want = reference_of(loaded(path, "qwen3_moe"), IDS[:16])
    want.check_logits(logits(path), 7)
    want.check_logits(logits(packed(path, tmp_path, "f32")), 7)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "-" not in name])
def test_every_family_uses_a_head_beside_its_tie(family: str, tmp_path: Path) -> None:
    head = torch.randn(96, tiny(family).config.hidden_size)
    path = rewritten(saved(family, tmp_path), lambda tensors: tensors.update({HEAD: head}), tie_word_embeddings=True)
    model = open_model(path)
    with model.checkpoint as checkpoint:
        assert not model.config.stream.tied
        assert torch.equal(checkpoint.tensor(model.stored("head")[0].name), head)


@pytest.mark.parametrize("prefix", HEADS)
def test_a_head_is_found_wherever_it_stands(prefix: str, tmp_path: Path) -> None:
    want = reference_of(tiny("qwen3_moe"), IDS[:16])
    path = rewritten(saved("qwen3_moe", tmp_path), lambda tensors: tensors.update({prefix + HEAD: tensors.pop(HEAD)}),
                     tie_word_embeddings=True)  # fmt: skip
    want.check_logits(logits(path), 7)


def test_a_quantised_head_is_no_less_a_head(tmp_path: Path) -> None:
    path, case = saved("qwen3_moe", tmp_path), int4_files.CASES["gptq"]
    codes, zeros, scale = int4_files.quantised(load_file(path / "model.safetensors")[HEAD], case)

    def quantise(tensors: Tensors) -> None:
        del tensors[HEAD]
        tensors.update(int4_files.packed("lm_head", codes, zeros, scale, case))

    dequantised = rewritten(saved("qwen3_moe", tmp_path / "dequantised"), lambda tensors: tensors.update(
        {HEAD: int4_files.meaning(codes, zeros, scale)}))  # fmt: skip
    want = reference_of(loaded(dequantised, "qwen3_moe"), IDS[:16])
    rewritten(path, quantise, tie_word_embeddings=True, quantization_config=case.config())
    want.check_logits(logits(path), 7)


def test_a_file_without_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    path = rewritten(saved("qwen3_moe", tmp_path), lambda tensors: tensors.pop(HEAD), tie_word_embeddings=False)
    with pytest.raises(OffmoeError, match=r"has no tensor lm_head.weight, and its config does not say tie_word_emb"):
        open_model(path)


@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe", "gemma4", "llama4"])
def test_of_two_levels_that_of_the_class_with_the_head_counts(
    family: str, outer: bool | None, text: bool | None
) -> None:
    """Where its own level does not say, the other one does before the default of its class."""
    transformers = pytest.importorskip("transformers")
    name = f"{family}_text"
    inner = {**FAMILIES.get(name, FAMILIES["qwen3_moe"]), "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4}
    levels = {"": outer, "text": text}
    raw: dict[str, Any] = {"text_config": inner}
    if text is not None:
        inner["tie_word_embeddings"] = text
    if outer is not None:
        raw["tie_word_embeddings"] = outer
    theirs = transformers.AutoConfig.for_model(family, **raw)
    own = "text" if family == "llama4" else ""
    want = theirs.text_config.tie_word_embeddings if own else theirs.tie_word_embeddings
    if levels[own] is None and not own and text is not None:
        want = text
    assert from_hf({**raw, "model_type": family}, family_of("model_type", family)).stream.tied == want


def test_other_fields_beside_a_text_config_say_nothing_of_it() -> None:
    raw = {"model_type": "llama4", "rms_norm_eps": 0.5, "num_key_value_heads": 1, "text_config": {
        **FAMILIES["llama4_text"], "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 8}}  # fmt: skip
    config = from_hf(raw, family_of("model_type", "llama4"))
    assert (config.norm.eps, config.heads.kv_heads) == (1e-5, 8)
