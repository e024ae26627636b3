"""Frequencies and their scalings are those of transformers; a config and a GGUF say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import InDouble
from tolerance import assert_close

from offmoe.checkpoint.base import ByteRange, Checkpoint, TensorInfo
from offmoe.errors import OffmoeError
from offmoe.kernels.rope import KINDS, Scaling, frequency_factors, inverse_frequencies, rope_table
from offmoe.mixers.rope import check_rope
from offmoe.models.families.gemma4 import factored
from offmoe.models.family import family_of
from offmoe.models.read_config import rope_factors
from offmoe.models.rope import GGUF_FACTORS, gguf_scaling, positions, scaling_of
from offmoe.pack.gguf_keys import scaling_keys

HEAD, THETA, TRAINED = 64, 150_000.0, 4096
FACTORS = [1.0 + i / 8 for i in range(32)]
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": TRAINED}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn as in gpt-oss": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "yarn as in DeepSeek-V3": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn as in DeepSeek-V2": {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, two mscales": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
    "yarn, its own attention factor": {**YARN, "attention_factor": 0.9},
    "yarn without a factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "short_factor": FACTORS, "long_factor": FACTORS[::-1],
                 "original_max_position_embeddings": 2048},
    "longrope, its own attention factor": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "attention_factor": 1.25,
        "original_max_position_embeddings": 1024},
}  # fmt: skip


def raw(scaling: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"max_position_embeddings": TRAINED, "rope_parameters": {"rope_theta": THETA, **scaling}, **more}


def check_frequencies(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare each relative to itself: they span five powers of ten."""
    assert_close("frequencies", got / want, torch.ones_like(want), 1e-6)


@pytest.mark.parametrize("ctx", [512, 3000, 7000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, ctx: int) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = scaling_of(raw(SCALINGS[name]))
    config = LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD, **raw(SCALINGS[name]))
    with InDouble():
        if name == "default":
            want, attention = THETA ** -(torch.arange(0, HEAD, 2).float() / HEAD), 1.0
        else:
            want, attention = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"), seq_len=ctx)
    check_frequencies(inverse_frequencies(HEAD, THETA, ctx, scaling), want)
    assert scaling.attention == pytest.approx(attention, rel=1e-12)
    table = rope_table(8, HEAD, THETA, torch.device("cpu"), scaling)
    angle = torch.arange(8)[:, None] * inverse_frequencies(HEAD, THETA, 8, scaling).double().repeat(2)
    assert_close("cos", table[0], angle.cos() * attention, 1e-6)
    assert_close("sin", table[1], angle.sin() * attention, 1e-6)


def test_every_kind_is_compared() -> None:
    assert {scaling["rope_type"] for scaling in SCALINGS.values()} == set(KINDS)


def test_deepseeks_scores_grow_by_the_square_of_its_second_mscale() -> None:
    """transformers: softmax_scale *= mscale²."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

    for name, all_dim in (("yarn as in DeepSeek-V3", 1.0), ("yarn as in DeepSeek-V2", 0.707)):
        assert scaling_of(raw(SCALINGS[name])).scores == pytest.approx(yarn_get_mscale(40, all_dim) ** 2)
    assert scaling_of(raw(YARN)).scores == 1


@pytest.mark.parametrize("name", ["linear", "yarn", "yarn as in gpt-oss", "yarn as in DeepSeek-V3",
                                  "yarn as in DeepSeek-V2", "yarn, its own attention factor", "default"])  # fmt: skip
def test_a_gguf_says_what_the_config_says(name: str) -> None:
    want = scaling_of(raw(SCALINGS[name]))
    family = family_of("model_type", "qwen3_moe")
    if not want.truncate:
        with pytest.raises(OffmoeError, match=r"truncate=False.* cannot be packed"):
            scaling_keys(want, family)
        return
    keys = scaling_keys(want, family)
    got = scaling_of({"max_position_embeddings": TRAINED, "rope_scaling": gguf_scaling(keys.get, {})})
    assert (got.kind, got.original, got.fast, got.slow) == (want.kind, want.original, want.fast, want.slow)
    for field in ("factor", "attention", "scores"):
        assert getattr(got, field) == pytest.approx(getattr(want, field)), field


def test_gpt_oss_is_packed_as_its_config_says() -> None:
    family = family_of("model_type", "gpt_oss")
    assert scaling_keys(scaling_of(raw(SCALINGS["yarn as in gpt-oss"])), family)["rope.scaling.type"] == "yarn"
    with pytest.raises(OffmoeError, match=r"truncate=True.* cannot be packed"):
        scaling_keys(scaling_of(raw(YARN)), family)


@pytest.mark.parametrize("name", ["dynamic", "llama3", "longrope", "yarn, two mscales"])
def test_what_a_gguf_cannot_say_is_not_packed(name: str) -> None:
    with pytest.raises(OffmoeError, match="cannot be packed: a GGUF has no keys for this RoPE scaling"):
        scaling_keys(scaling_of(raw(SCALINGS[name])), family_of("model_type", "qwen3_moe"))


def test_factors_in_a_gguf_are_not_ignored() -> None:
    with pytest.raises(OffmoeError, match=r"tensor rope_factors_long.weight scales the rotation"):
        gguf_scaling({}.get, {"rope_factors_long.weight": None})


def test_a_gguf_says_llama3_by_what_frequencies_are_divided_by() -> None:
    want = scaling_of(raw(SCALINGS["llama3"]))
    assert scaling_keys(want, family_of("model_type", "llama4")) == {}
    factors = frequency_factors(HEAD, THETA, want)
    assert factors.unique().numel() > 3, "kept, divided, and some between"
    got = scaling_of({"rope_scaling": gguf_scaling({}.get, {}, factors.tolist()), "max_position_embeddings": TRAINED})
    for ctx in (1, 2 * TRAINED):
        check_frequencies(*(inverse_frequencies(HEAD, THETA, ctx, scaling) for scaling in (got, want)))
    assert (got.attention, got.scores) == (1, 1)
    with pytest.raises(OffmoeError, match="short_factor has 32 numbers: expected one for each of 16 pairs"):
        check_rope(got, HEAD // 2, THETA)


def test_factors_are_not_read_where_there_are_too_many() -> None:
    info = TensorInfo(GGUF_FACTORS, "F32", (1 << 20, 1 << 20), ByteRange(0, 0, 1 << 42))
    with pytest.raises(OffmoeError, match=r"rope_freqs.weight has shape \[1048576, 1048576\]: expected a number"):
        rope_factors(Checkpoint(Path("m.gguf"), "gguf", [], {GGUF_FACTORS: info}, {}))


def test_what_gemma_turns_of_a_wide_head_stands_in_these_factors() -> None:
    assert factored({"rope_theta": 1.0}, [1.0, 1e30, 1e30, 1e30]) == {"rope_theta": 1.0, "partial_rotary_factor": 0.25}
    for factors in ([1.0, 2.0, 1e30], [1e30, 1.0], [1e30], [float("nan"), 1e30]):
        with pytest.raises(OffmoeError, match=r"rope_freqs.weight is \[.*: expected ones, then"):
            factored({}, factors)


def test_both_layouts_of_a_config_are_read() -> None:
    older = {"max_position_embeddings": TRAINED, "rope_theta": THETA,
             "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": TRAINED}}  # fmt: skip
    assert scaling_of(older) == scaling_of(raw(YARN))
    assert scaling_of({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
                       "max_position_embeddings": 8192, "original_max_position_embeddings": 4096}) == Scaling(
        "longrope", 2.0, 4096, pytest.approx((1 + 1 / 12) ** 0.5), short=(1.0,), long=(2.0,))  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("yarn", 32 * 4096), ("dynamic", 2 * 4096), ("linear", 4096)])
def test_the_positions_that_scaling_adds_are_offered(name: str, count: int) -> None:
    assert positions(raw(SCALINGS[name]), scaling_of(raw(SCALINGS[name]))) == count


@pytest.mark.parametrize(("scaling", "message"), [
    ({"rope_type": "linear"}, "rope_type linear has no factor"),
    ({**YARN, "factor": "4"}, "factor = '4': expected a number"),
    ({"rope_type": "longrope", "factor": 4.0, "short_factor": [0.0], "long_factor": [1.0]}, r"short_factor = \[0.0\]"),
    ({**SCALINGS["longrope"], "long_factor": [1.0]}, "long_factor has 1 numbers: expected one for each of 32 pairs"),
    ({**SCALINGS["llama3"], "high_freq_factor": 0.5}, "high_freq_factor is 0.5 and low_freq_factor 1"),
])  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(OffmoeError, match=message):
        check_rope(scaling_of(raw(scaling)), HEAD, THETA)
