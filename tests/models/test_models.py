"""Every family gives the logits and the routing of transformers, whatever the file and however it is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_oracle import oracle
from packed_files import older, packed
from reference import reference_of
from tiny_engines import IDS, decoded, engine_of
from tiny_models import FAMILIES, PACKABLE, PACKABLE_UNHEARD, reference, saved, tiny
from tolerance import assert_close

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.kernels.record import unpack
from offmoe.mixers.rope import RopeConfig
from offmoe.models.model import open_model
from offmoe.settings import Settings

FORMAT = {"bfloat16": "BF16", "float16": "F16"}


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_routing_are_those_of_transformers(family: str, fused: bool, tmp_path: Path) -> None:
    want = reference(family, IDS)
    with engine_of(saved(family, tmp_path, fused), chunk=5) as engine:
        logits, routed = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)
    assert len(routed) == len(want.exact.routing), "layers with experts"
    for moe_layer, weights in enumerate(routed):
        want.check_routing(moe_layer, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_tokens_are_the_same_at_every_budget(family: str, tmp_path: Path) -> None:
    """All in slots; half of them; and what one token needs, out of a RAM tier that is too small."""
    path, answers = saved(family, tmp_path), []
    for vram, ram in (("100%", "64MiB"), ("60%", "64MiB"), ("51%", 0)):
        with engine_of(path, vram=vram, ram=ram) as engine:
            list(engine.generate(IDS[:8], temperature=0.0, max_tokens=32))
            answers.append(engine.answer_tokens)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 32


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", PACKABLE_UNHEARD)
def test_a_packed_gguf_gives_the_same_logits(family: str, fused: bool, tmp_path: Path) -> None:
    want = reference(family, IDS)
    with engine_of(packed(saved(family, tmp_path, fused), tmp_path, "f32"), chunk=5) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)


def test_mxfp4_is_packed_without_a_loss(tmp_path: Path) -> None:
    """gpt-oss's blocks in ggml's order; what is not an expert becomes Q8_0."""
    path = saved("gpt_oss", tmp_path)
    with engine_of(packed(path, tmp_path, "mxfp4")) as theirs, engine_of(path) as ours:
        assert {part.format for part in theirs.model.layouts[0].parts} == {"MXFP4"}
        for place, expert in ((0, 0), (3, 5)):
            weights = []
            for store in (theirs.store, ours.store):
                rows = store.ram.rows[store.ram.fetch(place, np.array([expert]), 0)]
                weights.append(unpack(rows[:, : store.layouts[place].nbytes], store.layouts[place], torch.float32))
            assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("family", ["deepseek_v2-lite", "deepseek_v3-groups"])
def test_an_older_gguf_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    """Which does not say how experts are scored: that there is a correction bias does."""
    want = reference(family, IDS)
    path = packed(saved(family, tmp_path), tmp_path, "f32")
    with engine_of(older(path, tmp_path, tiny(family).config.num_attention_heads, "F32"), chunk=5) as engine:
        assert not engine.model.split
        logits, _ = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("deepseek_v3", {"kv_lora_rank": None}, "the model's config gives kv_lora_rank = null: expected a number like 512"),
    ("deepseek_v3", {"q_lora_rank": "x"}, "the model's config gives q_lora_rank = 'x': expected a whole number"),
    ("deepseek_v3", {"qk_rope_head_dim": 15}, "head_dim is 47: rotary embedding needs an even number above 0"),
    ("deepseek_v3", {"v_head_dim": 16}, r"o_proj.weight has shape \[64, 128\]: the config asks for \[64, 64\]"),
    ("deepseek_v3", {"rope_interleave": False}, "deepseek_v3: rope_interleave is False, and offmoe implements True"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "deepseek_v3: moe_layer_freq is 2"),
    ("deepseek_v3", {"attention_bias": True}, "deepseek_v3: attention_bias is True"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "deepseek_v2: topk_method is 'noaux_tc'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "deepseek_v2: norm_topk_prob is True"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "none"]}, "mlp_layer_types = .*: expected dense or sparse a layer"),
    ("mixtral", {"kv_lora_rank": 16}, "mixtral: kv_lora_rank is 16"),
])  # fmt: skip
def test_latent_attention_that_is_not_ours_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(family, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(OffmoeError, match=message):
        open_model(path)


def test_latents_are_not_kept_in_int8(tmp_path: Path) -> None:
    with pytest.raises(OffmoeError, match="--kv int8 does not go with latent attention"):
        engine_of(saved("deepseek_v2", tmp_path), kv="int8")


def test_kimi_k2_is_deepseek_v3_under_another_name(tmp_path: Path) -> None:
    want = reference("deepseek_v3", IDS)
    path = saved("deepseek_v3", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    with engine_of(path) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read(dtype: str, tmp_path: Path) -> None:
    path = saved("qwen3_moe", tmp_path)
    half = type(tiny("qwen3_moe")).from_pretrained(path, dtype=dtype)
    half.save_pretrained(path)
    rounded = type(half).from_pretrained(path, dtype="float32")
    want = reference_of(rounded, IDS)
    with engine_of(path) as engine:
        assert {info.format for info in engine.model.checkpoint.tensors.values()} == {FORMAT[dtype]}
        logits, _ = decoded(engine, IDS, prompt=8)
    want.check_logits(logits, 7)


@pytest.mark.parametrize(("family", "message"), [
    ("olmoe-clipped", r"clip_qkv = 1.0 cannot be packed: llama.cpp ignores it"),
    ("qwen3_next-sparse", r"experts in the layers \(0, 2\) cannot be packed"),
    ("qwen3_moe-sparse", r"experts in the layers \(1, 5\) cannot be packed"),
    ("lfm2_moe-unbiased", r"the GGUF architecture lfm2moe always means a biased sigmoid over all, renormalised"),
    ("llama4_text-chunked", "llama4 with its no_rope_layers cannot be packed: a GGUF has no key for it"),
    ("phimoe", r"llama.cpp routes the architecture phimoe by another rule"),
    ("qwen2_moe-sparse", r"norm_topk_prob = True cannot be packed"),
    ("gpt_oss-clamped", r"limit=1.0, plus=1.0\) cannot be packed: the GGUF architecture gpt-oss always means"),
    ("deepseek_v2-groups", r"n_group = 4 cannot be packed"),
])  # fmt: skip
def test_what_llama_cpp_would_get_wrong_is_not_packed(family: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OffmoeError, match=message):
        packed(saved(family, tmp_path), tmp_path, "f32")


@pytest.mark.llama
@pytest.mark.parametrize("family", PACKABLE)
def test_llama_cpp_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    path = packed(saved(family, tmp_path), tmp_path, "f32")
    llama = oracle(path)
    llama.eval(IDS)
    want = torch.from_numpy(np.array(llama.scores[: len(IDS)]))
    model = open_model(path)
    # llama.cpp rounds yarn's bounds always, gpt-oss's own config.json says not to
    (rope, *_) = model.config.ropes
    if rope.scaling.kind == "yarn":
        mixers = (replace(mixer, rope=truncated(rope)) for mixer in model.config.mixers)
        model = replace(model, config=replace(model.config, mixers=tuple(mixers)))
    with Engine(model, Settings.of(device="cpu", ctx=64)) as engine:
        logits, _ = decoded(engine, IDS, prompt=8)
    # Both are float32; ggml's exponential is a polynomial, and GELU a table of float16.
    assert_close("logits", logits, want[7:], 2.5e-2 if model.family.arch == "gemma4" else 5e-5)


def truncated(rope: RopeConfig) -> RopeConfig:
    return replace(rope, scaling=replace(rope.scaling, truncate=True))


def dequantised_demo(path: Path) -> Path:
    """The demo model in F32: without it llama.cpp quantises activations, and routing soon differs."""
    import gguf

    reader, writer = gguf.GGUFReader(DEMO), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=of[-1] if of else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.llama
def test_llama_cpp_writes_the_same_greedy_text_on_the_demo(tmp_path: Path) -> None:
    path = dequantised_demo(tmp_path / "demo-f32.gguf")
    with Engine.load(str(DEMO), device="cpu", ctx=256, vram="50%") as engine:
        prompt = engine.prompt_ids("Tell me a short story about a fox who learns to share.")
        list(engine.generate(prompt, temperature=0.0, max_tokens=64))
        ours = engine.answer_tokens
    llama = oracle(path)
    llama.eval(prompt)
    theirs: list[int] = []
    while len(theirs) < len(ours):
        theirs.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(theirs[-1:])
    assert ours == theirs
