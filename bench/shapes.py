"""Writes a GGUF of a real model's shape with random, sane weights: the size and the work without the download.

python bench/shapes.py qwen3-30b-a3b /tmp/qwen3.gguf [LAYERS]
"""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from offmoe.kernels.formats import FORMATS

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"arch": "qwen3moe", "layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128,
                      "vocab": 151936, "experts": 128, "top_k": 8, "inner": 768, "format": "Q4_K", "qk_norm": True,
                      "ctx": 40960, "theta": 1e6},
    "mixtral-8x7b": {"arch": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128,
                     "vocab": 32000, "experts": 8, "top_k": 2, "inner": 14336, "format": "Q4_K", "qk_norm": False,
                     "ctx": 32768, "theta": 1e6},
}  # fmt: skip


def weights(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> np.ndarray:
    """Random blocks [rows, row bytes]; the float16 scales are set so that a weight is about 1 / sqrt(cols)."""
    form = FORMATS[fmt]
    if fmt == "F32":
        return (rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32)
    blocks = rng.integers(0, 256, (rows * cols // form.block, form.bytes), np.uint8)
    scales = {"Q4_K": (0, 2), "Q8_0": (0,), "Q4_0": (0,), "Q6_K": (208,)}[fmt]
    size = {"Q4_K": 1 / (32 * 5), "Q8_0": 1 / 74, "Q4_0": 1 / 5, "Q6_K": 1 / (74 * 18)}[fmt] / cols**0.5
    for at, factor in zip(scales, (1, 8), strict=False):  # a K-quant's minimum is eight steps: centred weights
        blocks[:, at : at + 2] = np.full(1, size * factor, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def tensors(s: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, format, shape) of everything, in the order of the file."""
    q, kv, fmt = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"], s["format"]
    rows = [("token_embd", fmt, (s["vocab"], s["hidden"])), ("output_norm", "F32", (s["hidden"],)),
            ("output", "Q6_K", (s["vocab"], s["hidden"]))]  # fmt: skip
    for layer in range(s["layers"]):
        part = [("attn_norm", "F32", (s["hidden"],)), ("attn_q", fmt, (q, s["hidden"])),
                ("attn_k", fmt, (kv, s["hidden"])), ("attn_v", "Q6_K", (kv, s["hidden"])),
                ("attn_output", fmt, (s["hidden"], q)), ("ffn_norm", "F32", (s["hidden"],)),
                ("ffn_gate_inp", "F32", (s["experts"], s["hidden"])),
                ("ffn_gate_exps", fmt, (s["experts"], s["inner"], s["hidden"])),
                ("ffn_up_exps", fmt, (s["experts"], s["inner"], s["hidden"])),
                ("ffn_down_exps", fmt, (s["experts"], s["hidden"], s["inner"]))]  # fmt: skip
        if s["qk_norm"]:
            part += [("attn_q_norm", "F32", (s["head_dim"],)), ("attn_k_norm", "F32", (s["head_dim"],))]
        rows += [(f"blk.{layer}.{name}", *rest) for name, *rest in part]
    return [(f"{name}.weight", fmt, shape) for name, fmt, shape in rows]


def write(name: str, path: Path, layers: int | None = None) -> None:
    s = {**SHAPES[name], **({"layers": layers} if layers else {})}
    writer = gguf.GGUFWriter(path, s["arch"])
    writer.add_block_count(s["layers"])
    writer.add_embedding_length(s["hidden"])
    writer.add_context_length(s["ctx"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_rope_freq_base(s["theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_feed_forward_length(s["inner"])
    writer.add_expert_feed_forward_length(s["inner"])
    writer.add_expert_count(s["experts"])
    writer.add_expert_used_count(s["top_k"])
    writer.add_vocab_size(s["vocab"])
    writer.add_tokenizer_model("no_vocab")
    rng, made = np.random.default_rng(0), {}
    for tensor, fmt, shape in tensors(s):
        rows = int(np.prod(shape[:-1]))
        key = (fmt, rows, shape[-1])  # tensors of one shape share their bytes: 17 GB need not be drawn
        if key not in made:
            made[key] = weights(rng, fmt, rows, shape[-1]) if len(shape) > 1 else np.ones(shape, np.float32)
        data = made[key]
        kind = gguf.GGMLQuantizationType(FORMATS[fmt].gguf_type)
        byte_shape = shape if fmt == "F32" else (*shape[:-1], FORMATS[fmt].nbytes(1, shape[-1]))
        writer.add_tensor(tensor, data.reshape(byte_shape), raw_dtype=None if fmt == "F32" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
