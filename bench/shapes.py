"""Write a GGUF of a real model's shape with random weights: its size and its work without the download.

    python bench/shapes.py qwen3-30b-a3b /tmp/qwen3.gguf [LAYERS]

Tensors of the same shape share their bytes, so that 17 GB are written in seconds and need 0.7 GB of memory; the experts
of a tensor differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from offmoe.kernels.formats import FORMATS, dequantise
from offmoe.kernels.rope import Scaling, frequency_factors

# format, dense, head: formats of the routed experts, of other matrices, and of v and the output head. tied: the output
# head is the embedding. leading: number of dense layers at the start, of width `first`. shared: number of shared
# experts. gating 2: sigmoid with a correction bias. kv_rank: latent attention. every: each `every`-th layer has gated
# attention, the others a DeltaNet, and the shared expert is gated. attends: the layers with attention; the others have
# a short convolution. full_attention: shape of every sixth layer, which attends to all positions and has no values of
# its own. resident_ffn: width of the dense feed-forward of each layer.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"arch": "qwen3moe", "layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128,
                      "vocab": 151936, "experts": 128, "top_k": 8, "inner": 768, "format": "Q4_K", "dense": "Q4_K",
                      "head": "Q6_K", "qk_norm": "head", "ctx": 40960, "theta": 1e6},
    "gpt-oss-20b": {"arch": "gpt-oss", "layers": 24, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64,
                    "vocab": 201088, "experts": 32, "top_k": 4, "inner": 2880, "format": "MXFP4", "dense": "Q8_0",
                    "head": "Q8_0", "qk_norm": "none", "ctx": 131072, "theta": 150000.0, "window": 128},
    "olmoe": {"arch": "olmoe", "layers": 16, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128,
              "vocab": 50304, "experts": 64, "top_k": 8, "inner": 1024, "format": "Q8_0", "dense": "Q8_0",
              "head": "Q8_0", "qk_norm": "full", "ctx": 4096, "theta": 1e4},
    "mixtral-8x7b": {"arch": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128,
                     "vocab": 32000, "experts": 8, "top_k": 2, "inner": 14336, "format": "Q4_K", "dense": "Q4_K",
                     "head": "Q6_K", "qk_norm": "none", "ctx": 32768, "theta": 1e6},
    "deepseek-v2-lite": {"arch": "deepseek2", "layers": 27, "hidden": 2048, "heads": 16, "kv_heads": 1,
                         "head_dim": 192, "vocab": 102400, "experts": 64, "top_k": 6, "inner": 1408, "format": "Q4_K",
                         "dense": "Q4_K", "head": "Q6_K", "qk_norm": "none", "ctx": 163840, "theta": 1e4,
                         "q_rank": 0, "kv_rank": 512, "qk_rope": 64, "value": 128, "leading": 1, "first": 10944,
                         "shared": 2, "gating": 1, "scale": 1.0},
    "glm-4.7-flash": {"arch": "deepseek2", "layers": 47, "hidden": 2048, "heads": 20, "kv_heads": 1, "head_dim": 256,
                      "vocab": 154880, "experts": 64, "top_k": 4, "inner": 1536, "format": "Q4_K", "dense": "Q4_K",
                      "head": "Q6_K", "qk_norm": "none", "ctx": 202752, "theta": 1e6, "q_rank": 768, "kv_rank": 512,
                      "qk_rope": 64, "value": 256, "leading": 1, "first": 10240, "shared": 1, "gating": 2,
                      "scale": 1.8},
    "qwen3.6-35b-a3b": {"arch": "qwen35moe", "layers": 40, "hidden": 2048, "heads": 16, "kv_heads": 2, "head_dim": 256,
                        "vocab": 248320, "experts": 256, "top_k": 8, "inner": 512, "format": "Q4_K", "dense": "Q4_K",
                        "head": "Q6_K", "qk_norm": "head", "ctx": 262144, "theta": 1e7, "shared": 1, "rotary": 64,
                        "every": 4, "key_heads": 16, "value_heads": 32, "key_dim": 128, "taps": 4},
    "gemma-4-26b-a4b": {"arch": "gemma4", "layers": 30, "hidden": 2816, "heads": 16, "kv_heads": 8, "head_dim": 256,
                        "vocab": 262144, "experts": 128, "top_k": 8, "inner": 704, "format": "Q4_K", "dense": "Q4_K",
                        "head": "Q4_K", "tied": True, "qk_norm": "head", "ctx": 262144, "theta": 1e6, "window": 1024,
                        "resident_ffn": 2112, "full_attention": {"kv_heads": 2, "head_dim": 512}},
    "lfm2-8b-a1b": {"arch": "lfm2moe", "layers": 24, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64,
                    "vocab": 65536, "experts": 32, "top_k": 4, "inner": 1792, "format": "Q4_K", "dense": "Q4_K",
                    "head": "Q6_K", "tied": True, "qk_norm": "head", "ctx": 128000, "theta": 1e6, "leading": 2,
                    "first": 7168, "gating": 2, "attends": (2, 6, 10, 14, 18, 21), "taps": 3},
    # Only 8 of its 48 layers, which are 61 GB: a GPU machine's disk has 64. Heads are normalised without weights; no
    # layer of this Llama 4 is dense, although its files give a width.
    "llama-4-scout": {"arch": "llama4", "layers": 8, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128,
                      "vocab": 202048, "experts": 16, "top_k": 1, "inner": 8192, "format": "Q4_K", "dense": "Q4_K",
                      "head": "Q6_K", "qk_norm": "none", "ctx": 10485760, "theta": 5e5, "first": 16384, "shared": 1,
                      "rope": Scaling("llama3", 16.0, 8192, fast=1.0, slow=1.0)},
}  # fmt: skip

Tensors = list[tuple[str, str, tuple[int, ...]]]  # name, format, shape
OUTPUT_NORM = {"lfm2moe": "token_embd_norm"}
FFN_NORM = {"gpt-oss": "post_attention_norm", "qwen35moe": "post_attention_norm"}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Offsets of a block's float16 scales, and each as a multiple of the first; minima centre the weights.
SCALES: dict[str, dict[int, float]] = {
    "Q8_0": {0: 1}, "Q4_0": {0: 1}, "Q5_0": {0: 1}, "Q4_1": {0: 1, 2: -7.5}, "Q4_K": {0: 1, 2: 7.5},
    "Q5_K": {0: 1, 2: 15.5}, "Q6_K": {208: 1}, "IQ4_NL": {0: 1}, "IQ4_XS": {0: 1},
    "Q5_1": {0: 1, 2: -15.5}, "Q2_K": {80: 1, 82: 1.5}, "Q3_K": {108: 1},
    "IQ1_S": {0: 1}, "IQ2_XXS": {0: 1}, "IQ2_XS": {0: 1}, "IQ2_S": {0: 1}, "IQ3_XXS": {0: 1}, "IQ3_S": {0: 1},
}  # fmt: skip


def weights(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> np.ndarray:
    """Return random rows in their format, uint8 [rows, row bytes], with weights of RMS 1 / sqrt(cols)."""
    form = FORMATS[fmt]
    if fmt in FLOATS:
        values = torch.from_numpy(rng.standard_normal((rows, cols), np.float32) / np.float32(cols**0.5))
        return values.to(FLOATS[fmt]).view(torch.uint8).numpy()
    blocks = np.frombuffer(rng.bytes(rows * form.nbytes(1, cols)), np.uint8).reshape(-1, form.bytes).copy()
    sample = blocks[:256].copy()
    set_scale(sample, fmt, 1.0)
    unit = dequantise(torch.from_numpy(sample.reshape(1, -1)), fmt, 1, len(sample) * form.block).square().mean() ** 0.5
    set_scale(blocks, fmt, 1 / (float(unit) * cols**0.5))
    return blocks.reshape(rows, -1)


def set_scale(blocks: np.ndarray, fmt: str, scale: float) -> None:
    """Set the scale of all blocks [n, bytes]; MXFP4's is the nearest power of two."""
    if fmt == "MXFP4":
        blocks[:, 0] = 127 + round(np.log2(scale))
    if fmt == "IQ1_M":  # its bits are the upper nibbles of four numbers
        bits = int(np.float16(scale).view(np.uint16))
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
    for at, factor in SCALES.get(fmt, {}).items():
        blocks[:, at : at + 2] = np.array([scale * factor], np.float16).view(np.uint8)


def tensors(s: dict[str, Any]) -> Tensors:
    """Return (name, format, shape) of all tensors, in the order of the file."""
    h, dense, fmt = s["hidden"], s["dense"], s["format"]
    rows = [
        ("token_embd", s["head"] if "tied" in s else dense, (s["vocab"], h)),
        (OUTPUT_NORM.get(s["arch"], "output_norm"), "F32", (h,)),
    ]
    rows += [] if "tied" in s else [("output", s["head"], (s["vocab"], h))]
    for layer in range(s["layers"]):
        linear = "every" in s and (layer + 1) % s["every"]
        convolved = "attends" in s and layer not in s["attends"]
        if "full_attention" in s:
            part = gemma(s, layer)
            rows += [(f"blk.{layer}.{name}", *rest) for name, *rest in part]
            continue
        mixer = latents if "kv_rank" in s else deltanet if linear else shortconv if convolved else heads
        part = [("attn_norm", "F32", (h,)), (FFN_NORM.get(s["arch"], "ffn_norm"), "F32", (h,)), *mixer(s)]
        if layer < s.get("leading", 0):
            part += feed_forward("", dense, (), s["first"], h)
        else:
            part += [("ffn_gate_inp", "F32", (s["experts"], h))]
            part += feed_forward("_exps", fmt, (s["experts"],), s["inner"], h)
            part += feed_forward("_shexp", dense, (), s["shared"] * s["inner"], h) if "shared" in s else []
            part += [("ffn_gate_inp_shexp", "F32", (h,))] if "every" in s else []
            part += [("exp_probs_b.bias", "F32", (s["experts"],))] if s.get("gating") == 2 else []
        if s["arch"] == "gpt-oss":
            part += biases(s)
        rows += [(f"blk.{layer}.{name}", *rest) for name, *rest in part]
    return [
        (name if name.endswith(("bias", "ssm_a", ".scale")) else f"{name}.weight", fmt, shape)
        for name, fmt, shape in rows
    ]


def gemma(s: dict[str, Any], layer: int) -> Tensors:
    h, full_attention = s["hidden"], (layer + 1) % 6 == 0
    kinds = heads({**s, **(s["full_attention"] if full_attention else {})})
    part = [row for row in kinds if not (full_attention and row[0] == "attn_v")]
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2",
             "post_ffw_norm", "ffn_gate_inp.scale")  # fmt: skip
    return [
        *part, *((name, "F32", (h,)) for name in norms), ("layer_output_scale", "F32", (1,)),
        ("ffn_down_exps.scale", "F32", (s["experts"],)), ("ffn_gate_inp", "F32", (s["experts"], h)),
        *feed_forward("", s["dense"], (), s["resident_ffn"], h),
        *feed_forward("_exps", s["format"], (s["experts"],), s["inner"], h),
    ]  # fmt: skip


def heads(s: dict[str, Any]) -> Tensors:
    q, kv, h = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"], s["hidden"]
    norms = {"none": (), "head": (s["head_dim"], s["head_dim"]), "full": (q, kv)}[s["qk_norm"]]
    part: Tensors = [("attn_q", s["dense"], (2 * q if "every" in s else q, h)), ("attn_k", s["dense"], (kv, h)),
                     ("attn_v", s["head"], (kv, h)), ("attn_output", s["dense"], (h, q))]  # fmt: skip
    return part + [(name, "F32", (n,)) for name, n in zip(("attn_q_norm", "attn_k_norm"), norms, strict=False)]


def deltanet(s: dict[str, Any]) -> Tensors:
    """Return the tensors of a DeltaNet; decay and learning rate are F32, as in published files."""
    n, h, dense = s["value_heads"], s["hidden"], s["dense"]
    values = n * s["key_dim"]
    channels = 2 * s["key_heads"] * s["key_dim"] + values
    return [("attn_qkv", dense, (channels, h)), ("attn_gate", dense, (values, h)), ("ssm_beta", "F32", (n, h)),
            ("ssm_alpha", "F32", (n, h)), ("ssm_conv1d", "F32", (channels, s["taps"])), ("ssm_dt.bias", "F32", (n,)),
            ("ssm_a", "F32", (n,)), ("ssm_norm", "F32", (s["key_dim"],)), ("ssm_out", dense, (h, values))]  # fmt: skip


def shortconv(s: dict[str, Any]) -> Tensors:
    h, dense = s["hidden"], s["dense"]
    return [("shortconv.in_proj", dense, (3 * h, h)), ("shortconv.conv", "F32", (h, s["taps"])),
            ("shortconv.out_proj", dense, (h, h))]  # fmt: skip


def biases(s: dict[str, Any]) -> Tensors:
    """Return the biases and the attention sinks."""
    q, kv, h, many = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"], s["hidden"], s["experts"]
    sizes = {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,), "attn_output.bias": (h,),
             "attn_sinks": (s["heads"],), "ffn_gate_inp.bias": (many,), "ffn_gate_exps.bias": (many, s["inner"]),
             "ffn_up_exps.bias": (many, s["inner"]), "ffn_down_exps.bias": (many, h)}  # fmt: skip
    return [(name, "F32", size) for name, size in sizes.items()]


def latents(s: dict[str, Any]) -> Tensors:
    """Return the tensors of latent attention. k_b's rows are too short for K-quants: llama.cpp stores both halves in
    Q8_0.
    """
    n, h, dense, width = s["heads"], s["hidden"], s["dense"], s["kv_rank"] + s["qk_rope"]
    part: Tensors = [("attn_kv_a_mqa", dense, (width, h)), ("attn_kv_a_norm", "F32", (s["kv_rank"],)),
                     ("attn_k_b", "Q8_0", (n, s["kv_rank"], s["head_dim"] - s["qk_rope"])),
                     ("attn_v_b", "Q8_0", (n, s["value"], s["kv_rank"])),
                     ("attn_output", dense, (h, n * s["value"]))]  # fmt: skip
    if not s["q_rank"]:
        return [*part, ("attn_q", dense, (n * s["head_dim"], h))]
    return [*part, ("attn_q_a", dense, (s["q_rank"], h)), ("attn_q_a_norm", "F32", (s["q_rank"],)),
            ("attn_q_b", dense, (n * s["head_dim"], s["q_rank"]))]  # fmt: skip


def feed_forward(kind: str, fmt: str, front: tuple[int, ...], inner: int, h: int) -> Tensors:
    """Return three matrices; rows that are not a whole number of blocks are Q5_0, as in llama.cpp."""
    return [(f"ffn_{name}{kind}", fmt if shape[-1] % FORMATS[fmt].block == 0 else "Q5_0", (*front, *shape))
            for name, shape in (("gate", (inner, h)), ("up", (inner, h)), ("down", (h, inner)))]  # fmt: skip


def shape(name: str, layers: int | None = None) -> dict[str, Any]:
    return {**SHAPES[name], **({"layers": layers} if layers else {})}


def write(name: str, path: Path, layers: int | None = None, seed: int = 0, **changes: Any) -> None:
    """Write the file; the same arguments give the same bytes. `changes` to the shape make a small file for tests."""
    s = {**shape(name, layers), **changes}
    writer = gguf.GGUFWriter(path, s["arch"])
    add_metadata(writer, s)
    rng = np.random.default_rng(seed)
    made: dict[tuple[str, int, int, bool], np.ndarray] = {}
    for tensor, fmt, dims in tensors(s):
        rows, cols = int(np.prod(dims[:-1])), dims[-1]
        key = (fmt, rows, cols, norm := "norm" in tensor or "scale" in tensor)
        if key not in made:
            made[key] = np.ones(cols, np.float32).view(np.uint8) if norm else weights(rng, fmt, rows, cols)
        kind = gguf.GGMLQuantizationType(FORMATS[fmt].gguf_type)
        data = made[key].reshape(*dims[:-1], FORMATS[fmt].nbytes(1, cols))
        data = data.view(np.float32) if fmt == "F32" else data
        writer.add_tensor(
            tensor, -np.abs(data) if tensor.endswith("ssm_a") else data, raw_dtype=kind
        )  # positive values would let the state grow
    if "rope" in s:
        writer.add_tensor("rope_freqs.weight", frequency_factors(s["head_dim"], s["theta"], s["rope"]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, s: dict[str, Any]) -> None:
    writer.add_block_count(s["layers"])
    writer.add_embedding_length(s["hidden"])
    writer.add_context_length(s["ctx"])
    writer.add_head_count(s["heads"])
    if "attends" in s:
        add_shortconv(writer, s)
    elif "full_attention" not in s:
        writer.add_head_count_kv(s["kv_heads"])
    if "kv_rank" in s:
        add_latents(writer, s)
    elif "full_attention" not in s:
        writer.add_key_length(s["head_dim"])
        writer.add_value_length(s["head_dim"])
        writer.add_rope_dimension_count(s.get("rotary", s["head_dim"]))
    if "every" in s:
        add_deltanet(writer, s)
    if "full_attention" in s:
        add_full_attention(writer, s)
    writer.add_rope_freq_base(s["theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_feed_forward_length(s.get("resident_ffn", s.get("first", s["inner"])))
    writer.add_expert_feed_forward_length(s["inner"])
    writer.add_expert_count(s["experts"])
    writer.add_expert_used_count(s["top_k"])
    writer.add_vocab_size(s["vocab"])
    writer.add_tokenizer_model("no_vocab")
    if s["arch"] == "gpt-oss":
        writer.add_sliding_window(s["window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
    if s["arch"] == "llama4":
        writer.add_interleave_moe_layer_step(1)


def add_deltanet(writer: gguf.GGUFWriter, s: dict[str, Any]) -> None:
    pairs = s["rotary"] // 2
    writer.add_rope_dimension_sections([*((pairs + 2 - i) // 3 for i in range(3)), 0])
    writer.add_ssm_conv_kernel(s["taps"])
    writer.add_ssm_state_size(s["key_dim"])
    writer.add_ssm_group_count(s["key_heads"])
    writer.add_ssm_time_step_rank(s["value_heads"])
    writer.add_ssm_inner_size(s["value_heads"] * s["key_dim"])
    writer.add_full_attention_interval(s["every"])
    writer.add_expert_shared_feed_forward_length(s["shared"] * s["inner"])


def add_shortconv(writer: gguf.GGUFWriter, s: dict[str, Any]) -> None:
    writer.add_head_count_kv([s["kv_heads"] if layer in s["attends"] else 0 for layer in range(s["layers"])])
    writer.add_shortconv_l_cache(s["taps"])
    writer.add_leading_dense_block_count(s["leading"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(s["gating"]))


def add_full_attention(writer: gguf.GGUFWriter, s: dict[str, Any]) -> None:
    near = [(layer + 1) % 6 != 0 for layer in range(s["layers"])]
    writer.add_head_count_kv([s["kv_heads"] if one else s["full_attention"]["kv_heads"] for one in near])
    writer.add_sliding_window_pattern(near)
    writer.add_sliding_window(s["window"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(s["full_attention"]["head_dim"])
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(s["head_dim"])
    writer.add_rope_freq_base_swa(10_000.0)
    writer.add_final_logit_softcapping(30.0)


def add_latents(writer: gguf.GGUFWriter, s: dict[str, Any]) -> None:
    writer.add_key_length(s["kv_rank"] + s["qk_rope"])
    writer.add_value_length(s["kv_rank"])
    writer.add_key_length_mla(s["head_dim"])
    writer.add_value_length_mla(s["value"])
    writer.add_rope_dimension_count(s["qk_rope"])
    writer.add_kv_lora_rank(s["kv_rank"])
    if s["q_rank"]:
        writer.add_q_lora_rank(s["q_rank"])
    writer.add_leading_dense_block_count(s["leading"])
    writer.add_expert_shared_count(s["shared"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(s["gating"]))
    writer.add_expert_weights_scale(s["scale"])
    writer.add_expert_weights_norm(s["gating"] == 2)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
