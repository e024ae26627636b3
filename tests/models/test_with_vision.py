"""Language models inside models with vision, as transformers 5 saves them in either form, answer to text as it does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference, reference_of
from safetensors.torch import load_file, save_file
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, SHAPE

from offmoe.models.model import open_model

QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
VISION: dict[str, dict[str, Any] | None] = {
    "qwen3_5_moe": QWEN,
    "qwen3_vl_moe": {**QWEN, "deepstack_visual_indexes": [0]},
    "gemma4": None,
    "llama4": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
               "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28},
}  # fmt: skip
TEXT = {"qwen3_vl_moe": FAMILIES["qwen3_moe"]}


@cache
def tiny(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    text = {**SHAPE, **TEXT.get(family, FAMILIES.get(f"{family}_text", {}))}
    config = transformers.AutoConfig.for_model(family, text_config=text, vision_config=VISION[family])
    torch.manual_seed(len(family))
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float(parameter.data.mean()) if "norm" in name else 0.0, 0.15)
    return model


@cache
def reference(family: str) -> Reference:
    return reference_of(tiny(family), IDS)


def check(path: Path, family: str) -> None:
    with engine_of(path, chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    reference(family).check_logits(logits, 7)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", VISION)
def test_logits_are_those_of_transformers(family: str, original: bool, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path, save_original_format=original)
    check(tmp_path, family)


@pytest.mark.parametrize("family", VISION)
def test_a_language_model_taken_out_answers_the_same(family: str, tmp_path: Path) -> None:
    """Its config alone, flat, and its tensors under the names of a model without vision."""
    tiny(family).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                **whole["text_config"],
                "model_type": f"{family}_text",
                "tie_word_embeddings": whole["tie_word_embeddings"],
            }
        )
    )
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if "language_model" in name or name.startswith("lm_head"):
            tensors[name.replace("model.language_model.", "model.").replace("language_model.", "")] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_model(tmp_path).config.model_type == family
    check(tmp_path, family)
