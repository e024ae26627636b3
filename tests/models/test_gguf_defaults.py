"""A key that a GGUF leaves out means what llama.cpp makes of it: src/llama-model.cpp, load_hparams and load_tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from config_files import written
from tiny_models import FAMILIES, PACKABLE_UNHEARD

from offmoe.errors import OffmoeError
from offmoe.models.config import ModelConfig
from offmoe.models.family import family_of
from offmoe.models.read_config import from_gguf, from_hf
from offmoe.models.rope import gguf_scaling
from offmoe.pack.gguf_keys import model_keys

HEADS = [name for name in PACKABLE_UNHEARD if "deepseek" not in name and "lite" not in name]
DIVIDED = ("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text")  # feed_forward_length among a token's experts
NORMED = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False, "mixtral": True, "granitemoe": True, "gpt_oss": True,
          "hunyuan_v1_moe": True, "ernie4_5_moe": True, "minimax_m2": True, "lfm2_moe": True, "qwen3_next": True,
          "qwen3_5_moe_text": True, "gemma4_text": True, "llama4_text": False, "deepseek_v2": False,
          "deepseek_v3": False, "glm4_moe": False, "glm4_moe_lite": False, "dots1": False}  # fmt: skip


@cache
def keys(name: str) -> str:
    """Every hyper-parameter of a packed tiny model, without its architecture in front."""
    raw = json.loads(written(name))
    family = family_of("model_type", raw["model_type"])
    found = model_keys(from_hf(raw, family), family)
    return json.dumps({key.removeprefix(f"{family.arch}."): value for key, value in found.items()})


TENSORS = {**dict.fromkeys(("qwen2_moe", "glm4_moe", "gpt_oss"), "blk.0.attn_q.bias"),
           **dict.fromkeys(("minimax_m2", "hunyuan_v1_moe"), "blk.0.attn_q_norm.weight")}  # fmt: skip


def read(name: str, without: str = "", **changes: Any) -> ModelConfig:
    """The config without a key, and with others; a dot in a key is written __."""
    family = family_of("model_type", name.partition("-")[0])
    metadata = json.loads(keys(name))
    for key in without.split():
        metadata.pop(key, None)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    named = {f"{family.arch}.{key}": value for key, value in metadata.items()}
    return from_gguf(named, family, dict.fromkeys(("output.weight", TENSORS.get(name, ""))))


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_a_file_that_says_little(name: str) -> None:
    """As many key-value heads as heads, the width shared out among them, all of it rotated, with base 10,000."""
    if name in ("lfm2_moe", "gemma4_text"):  # what is left out there says which layers are of what kind
        pytest.skip("its keys are lists by layer")
    config = read(name, "attention.head_count_kv attention.key_length rope.dimension_count rope.freq_base "
                        "rope.scaling.type rope.scaling.factor")  # fmt: skip
    heads = config.heads
    assert heads.kv_heads == heads.heads
    assert heads.head_dim == config.hidden // heads.heads
    assert heads.rope
    assert (heads.rope.rotary, heads.rope.theta, heads.rope.scaling.kind) == (heads.head_dim, 10_000.0, "default")


@pytest.mark.parametrize("name", NORMED)
def test_weights_of_experts_that_a_file_says_nothing_of(name: str) -> None:
    config = read(name, "expert_weights_norm expert_weights_scale")
    assert (config.moe.rule.renormalise, config.moe.rule.scale) == (NORMED[name], 1.0)
    assert read(name, expert_weights_scale=0.0).moe.rule.scale == 1.0


def test_every_arch_is_asked() -> None:
    assert {name for name in FAMILIES if "-" not in name} == {*NORMED, "phimoe"}


@pytest.mark.parametrize("name", [*DIVIDED, "mixtral", "olmoe", "granitemoe"])
def test_the_width_of_experts_in_old_files(name: str) -> None:
    config = read(name, "expert_feed_forward_length", feed_forward_length=96)
    assert config.moe.expert_hidden == (96 // config.top_k if name in DIVIDED else 96)


def test_the_shared_expert_in_old_files_is_as_wide_as_a_dense_layer() -> None:
    assert read("qwen2_moe", "expert_shared_feed_forward_length", feed_forward_length=96).moe.shared_hidden == 96


@pytest.mark.parametrize(("name", "without", "changes", "seen"), [
    ("granitemoe", "attention.scale", {}, lambda config: config.heads.score_scale == 16**-0.5),
    ("granitemoe", "embedding_scale residual_scale logit_scale", {}, lambda config: (
        config.stream.embed_scale, config.stream.residual_scale, config.stream.logit_divisor) == (1, 1, 1)),
    ("qwen3_next", "full_attention_interval", {}, lambda config: config.attended == (3,)),
    ("glm4_moe", "expert_gating_func", {}, lambda config: config.moe.rule.scores == "sigmoid"),
    ("glm4_moe", "", {"expert_gating_func": 0}, lambda config: config.moe.rule.scores == "sigmoid"),
    ("glm4_moe", "leading_dense_block_count", {}, lambda config: not config.dense),
    ("deepseek_v2", "expert_gating_func", {}, lambda config: config.moe.rule.scores == "softmax"),
    ("deepseek_v3-groups", "expert_group_count expert_group_used_count", {}, lambda config: (
        config.moe.rule.groups, config.moe.rule.kept) == (1, 1)),
    ("deepseek_v3", "attention.q_lora_rank", {}, lambda config: config.mixers[0].latent.q_rank == 0),
    ("llama4_text", "attention.sliding_window", {}, lambda config: config.windows == (8192, 8192, 8192, 0)),
    ("llama4_text", "", {"attention__sliding_window": 0}, lambda config: not any(config.windows) and all(
        mixer.rope for mixer in config.mixers)),
    ("llama4_text", "", {"expert_count": 128}, lambda config: config.heads.qk_norm == "none"),
    ("gemma4_text", "rope.freq_base rope.freq_base_swa", {}, lambda config: {rope.theta for rope in config.ropes} == {
        10_000.0}),
    ("gemma4_text", "rope.freq_base_swa", {"rope__freq_base": 5e5}, lambda config: {
        rope.theta for rope in config.ropes} == {5e5}),
    ("gemma4_text", "final_logit_softcapping", {}, lambda config: config.stream.logit_cap == 30),
    ("qwen3_moe", "", {"attention__sliding_window": 4}, lambda config: not any(config.windows)),  # it is not read
    ("mixtral", "", {"attention__sliding_window": 4}, lambda config: not any(config.windows)),
    ("qwen3_moe", "", {"nextn_predict_layers": 1}, lambda config: config.layers == 2),
])  # fmt: skip
def test_what_an_arch_makes_of_it(
    name: str, without: str, changes: dict[str, Any], seen: Callable[[ModelConfig], bool]
) -> None:
    assert seen(read(name, without, **changes))


SCALINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # keys behind rope., and the table that they mean
    ({}, {}),
    ({"scaling.type": "none", "scaling.factor": 4.0}, {}),
    ({"scaling.type": "linear"}, {}),
    ({"scaling.factor": 0.0}, {}),
    ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scale_linear": 4.0, "scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"scaling.type": "longrope", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scaling.type": "yarn"}, {"rope_type": "yarn", "factor": 1.0, "truncate": True}),
    ({"scaling.type": "yarn", "scale_linear": 4.0}, {"rope_type": "yarn", "factor": 4.0, "truncate": True}),
]


@pytest.mark.parametrize(("given", "means"), SCALINGS)
def test_the_scaling_of_rope(given: dict[str, Any], means: dict[str, Any]) -> None:
    assert gguf_scaling(lambda key: given.get(key.removeprefix("rope.")), {}) == means


def test_yarn_without_its_length_was_trained_on_the_context() -> None:
    config = read("qwen3_moe", rope__scaling__type="yarn", rope__scaling__factor=4.0)
    scaling = config.ropes[0].scaling
    assert (scaling.original, scaling.fast, scaling.slow) == (256, 32.0, 1.0)
    assert config.ctx == 1024


def test_factors_of_frequencies_are_scaled_too() -> None:
    factors = [1.0, 2.0]
    table = gguf_scaling({"rope.scaling.factor": 4.0}.get, {}, factors)
    assert table["short_factor"] == table["long_factor"] == [4.0, 8.0]
    assert gguf_scaling({}.get, {}, factors)["short_factor"] == factors


@pytest.mark.parametrize(("name", "without", "changes", "message"), [
    ("qwen3_moe", "attention.layer_norm_rms_epsilon", {}, "no qwen3moe.attention.layer_norm_rms_eps"),
    ("qwen3_moe", "expert_used_count", {}, "GGUF has no qwen3moe.expert_used_count"),
    ("qwen3_moe", "context_length", {}, "GGUF has no qwen3moe.context_length"),
    ("gpt_oss", "attention.sliding_window", {}, "GGUF has no gpt-oss.attention.sliding_window"),
    ("granitemoe", "", {"rope__scaling__finetuned": False}, "rope_finetuned is False"),
    ("ernie4_5_moe", "", {"interleave_moe_layer_step": 2}, "interleave_moe_layer_step is 2"),
    ("qwen3_moe", "", {"rope__scaling__type": "mrope"}, "rope.scaling.type is 'mrope'"),
    ("qwen3_moe", "", {"rope__scaling__attn_factor": 1.5}, "attn_factor is 1.5 without yarn"),
    ("mixtral", "", {"rope__dimension_count": 8}, "rope.dimension_count is 8"),
])  # fmt: skip
def test_what_llama_cpp_requires_or_computes_otherwise_is_refused(
    name: str, without: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(OffmoeError, match=message):
        read(name, without, **changes)
