"""Fields whose value changes nothing are no reason to refuse a config.json; those that matter are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import SHAPES, kind, written
from reference import reference_of
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, SHAPE

from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.family import all_families, family_of
from offmoe.models.read_config import from_hf
from offmoe.pack.gguf_keys import model_keys

transformers = pytest.importorskip("transformers")

NOTHING: list[dict[str, Any]] = [  # of a model that answers; for training, or what transformers does with its outputs
    {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "hidden_dropout": 0.1},
    {"router_aux_loss_coef": 0.5, "output_router_logits": True, "router_z_loss_coef": 1.0, "seq_aux": True},
    {"use_cache": False, "pretraining_tp": 8, "pruned_heads": {}, "initializer_range": 9.0, "torch_dtype": "float16"},
    {"bos_token_id": 5, "eos_token_id": [1, 2], "pad_token_id": None, "transformers_version": "4.0"},
    {"num_nextn_predict_layers": 3, "ep_size": 4, "auto_map": {"AutoConfig": "x.Y"}, "_name_or_path": "there"},
    {"input_jitter_noise": 0.3},
]
ALL_FULL = {"layer_types": ["full_attention"] * 3, "max_window_layers": 1}
OFF: dict[str, list[dict[str, Any]]] = {  # windows that are switched off, or hide nothing
    "qwen3_moe": [{"use_sliding_window": False, "sliding_window": 131072}, {"sliding_window": 5}, ALL_FULL,
                  {"use_sliding_window": True, "sliding_window": 256}, {"use_sliding_window": True,
                                                                        "sliding_window": None}],
    "qwen2_moe": [{"use_sliding_window": False, "sliding_window": 65536}, {"sliding_window": 5}, ALL_FULL,
                  {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}],
    "mixtral": [{"sliding_window": 256}, {"sliding_window": 4096}, {"sliding_window": None}, ALL_FULL],
    "phimoe": [{"sliding_window": 131072}, {"sliding_window": None}],
    "dots1": [{"sliding_window": 8, "max_window_layers": 3, "layer_types": None}, {"sliding_window": None}],
    "qwen3_next": [{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}],
    "minimax_m2": [{"sliding_window": None, "max_window_layers": 9}],
}  # fmt: skip
PLAIN = [name for name in SHAPES if "-" not in name]


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return from_hf(raw, family_of("model_type", raw["model_type"]))


@pytest.mark.parametrize("name", PLAIN)
def test_what_changes_nothing_is_read_over(name: str) -> None:
    raw = json.loads(written(name))
    for change in (*NOTHING, *OFF.get(name, [])):
        assert config_of({**raw, **change}) == config_of(raw), change


@pytest.mark.parametrize("name", PLAIN)
def test_an_activation_may_have_its_other_name(name: str) -> None:
    raw = json.loads(written(name))
    field, other = ("hidden_activation", "gelu_new") if name == "gemma4_text" else ("hidden_act", "swish")
    assert config_of({**raw, field: other}) == config_of(raw)


@pytest.mark.parametrize("name", PLAIN)
def test_fields_of_other_families_mean_nothing(name: str) -> None:
    """transformers' class does not read them either; those that every family refuses by value still are."""
    raw, family = json.loads(written(name)), family_of("model_type", kind(name))
    foreign = {field for other in all_families() for field in (*other.defaults, *map(other.name, other.defaults))}
    own = {theirs for names in family.own.values() for theirs in names} | set(raw)
    for field in sorted(field for field in foreign - own if not family.reads(field)):
        for value in (3, True, 0.5, "no"):
            assert config_of({**raw, field: value}) == config_of(raw), field


@pytest.mark.parametrize(("name", "own", "others"), [
    ("deepseek_v3", "n_routed_experts", ("num_experts", "num_local_experts")),
    ("qwen3_moe", "num_experts", ("n_routed_experts", "moe_num_experts")),
    ("mixtral", "num_local_experts", ("num_experts", "n_routed_experts")),
    ("granitemoe", "num_local_experts", ("num_experts", "n_routed_experts")),
    ("llama4_text", "num_local_experts", ("num_experts", "n_routed_experts")),
    ("ernie4_5_moe", "moe_k", ("num_experts_per_tok", "top_k_experts")),
    ("gemma4_text", "top_k_experts", ("num_experts_per_tok", "moe_topk")),
    ("mixtral", "intermediate_size", ("moe_intermediate_size",)),
    ("lfm2_moe", "norm_eps", ("rms_norm_eps",)),
])  # fmt: skip
def test_another_familys_field_does_not_beat_its_own(name: str, own: str, others: tuple[str, ...]) -> None:
    raw = json.loads(written(name))
    value = raw.get(own, SHAPES[name].get(own))
    raw = {field: there for field, there in raw.items() if field != "num_local_experts" or there != value}
    raw[own] = value
    for other in others:
        assert config_of({**raw, other: 1}) == config_of(raw), other


MATTERS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 3}, "layer_types is 'sliding_attention'"),
    ("qwen2_moe", {"layer_types": ["chunked_attention"] * 3}, "layer_types is 'chunked_attention'"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 0, "layer_types": None}, "sliding_window = 0"),
    ("dots1", {"layer_types": ["sliding_attention"] * 2}, "gives 2 layer_types: expected one for each of 3 layers"),
    ("mixtral", {"sliding_window": "wide"}, "sliding_window = 'wide'"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
    ("gemma4_text", {"enable_moe_block": False}, "enable_moe_block is False"),
    ("gemma4_text", {"top_k_experts": None}, "config has no top_k_experts"),  # under its own name
    ("mixtral", {"num_local_experts": "8"}, "config gives num_local_experts = '8'"),
    ("lfm2_moe", {"norm_eps": -1}, "config gives norm_eps = -1"),
    ("llama4_text", {"intermediate_size": 0.5}, "config gives intermediate_size = 0.5"),
    ("gemma4_text", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
]


@pytest.mark.parametrize(("name", "change", "message"), MATTERS)
def test_what_matters_is_refused_by_its_field(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        config_of({**json.loads(written(name)), **change})


WINDOWS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 6},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "dots1": {"sliding_window": 6, "max_window_layers": 1},
    "mixtral": {"sliding_window": 6},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_that_is_on_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **WINDOWS[family]})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    with engine_of(tmp_path, chunk=5) as engine:
        assert any(engine.config.windows)
        logits, _ = decoded(engine, IDS, prompt=8)
        with pytest.raises(OffmoeError, match=rf"{family} with a sliding_window of 6 cannot be packed"):
            model_keys(engine.config, engine.model.family)
    reference_of(model, IDS).check_logits(logits, 7)
