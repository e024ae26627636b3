"""The language model inside Qwen3-VL MoE: what transformers answers to text, out of its files and out of a GGUF."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_oracle import oracle
from packed_files import packed
from published_configs import PUBLISHED
from reference import reference_of
from tiny_engines import decoded, engine_of
from tiny_models import SHAPE
from tolerance import assert_close

from offmoe.errors import OffmoeError
from offmoe.models.family import family_of
from offmoe.models.model import open_model
from offmoe.models.parameters import count_parameters
from offmoe.models.read_config import from_hf

IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(9)).tolist()
TEXT: dict[str, Any] = {
    **SHAPE, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
    "intermediate_size": 96, "mlp_only_layers": [1], "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5]},
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64,
          "deepstack_visual_indexes": [0]}  # fmt: skip


@cache
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("qwen3_vl_moe", text_config=TEXT, vision_config=VISION)
    config.tie_word_embeddings = False
    torch.manual_seed(12)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        centre = float(parameter.data.mean()) if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, centre, 0.2)
    return model


def save(model: Any, path: Path) -> None:
    """Files as they are published: a text_config, weights under model.language_model, experts [E, in, out]."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    published = {name: t.mT.contiguous() if ".experts." in name else t for name, t in tensors.items()}
    save_file(published, path / "model.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tiny(), tmp_path / "vl")
    return tmp_path / "vl"


def test_logits_and_routing_are_those_of_transformers(path: Path) -> None:
    want = reference_of(tiny(), IDS)
    with engine_of(path, chunk=5) as engine:
        assert engine.config.routed == (0, 2)
        logits, routed = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)
    assert len(routed) == len(want.exact.routing)
    for moe_layer, weights in enumerate(routed):
        want.check_routing(moe_layer, weights)


def test_the_greedy_tokens_are_the_same_at_every_budget(path: Path) -> None:
    """Experts are transposed as they are read, also where they pass through a RAM tier that is too small."""
    answers = []
    for vram, ram in (("100%", "64MiB"), ("51%", 0)):
        with engine_of(path, vram=vram, ram=ram) as engine:
            list(engine.generate(IDS[:8], temperature=0.0, max_tokens=24))
            answers.append(engine.answer_tokens)
    assert answers[0] == answers[1]


def without_dense_layers(path: Path) -> Any:
    """Save a model whose layers all have experts, which is what a GGUF of this arch means; return the model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(path)
    config.text_config.mlp_only_layers = []
    torch.manual_seed(13)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    save(model, path)
    return model


def test_a_packed_gguf_gives_the_same_logits(path: Path, tmp_path: Path) -> None:
    want = reference_of(without_dense_layers(path), IDS)
    out = packed(path, tmp_path, "f32")
    with engine_of(out) as engine:
        metadata = engine.model.checkpoint.metadata
        assert metadata["general.architecture"] == "qwen3vlmoe"
        assert list(metadata["qwen3vlmoe.rope.dimension_sections"]) == [6, 5, 5, 0]
        want.check_logits(decoded(engine, IDS, prompt=8)[0], 7)


@pytest.mark.llama
def test_llama_cpp_gives_the_same_logits(path: Path, tmp_path: Path) -> None:
    without_dense_layers(path)
    out = packed(path, tmp_path, "f32")
    llama = oracle(out)
    llama.eval(IDS)
    with engine_of(out) as engine:
        logits = decoded(engine, IDS, prompt=8)[0]
    assert_close("logits", logits, torch.from_numpy(np.array(llama.scores[7 : len(IDS)])), 1e-4)


def test_the_parameters_are_those_of_the_model_without_vision() -> None:
    scaling = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {**PUBLISHED["Qwen3-30B-A3B"], "model_type": "qwen3_vl_moe_text", "rope_scaling": scaling}
    config = from_hf({"model_type": "qwen3_vl_moe", "text_config": text}, family_of("model_type", "qwen3_vl_moe"))
    plain = from_hf(PUBLISHED["Qwen3-30B-A3B"], family_of("model_type", "qwen3_moe"))
    assert count_parameters(config) == count_parameters(plain)


def test_weights_that_are_not_renormalised_are_refused(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["norm_topk_prob"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OffmoeError, match="qwen3_vl_moe: norm_topk_prob is False, and offmoe implements True"):
        open_model(path)
