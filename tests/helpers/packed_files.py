"""Models packed into a GGUF, as offmoe writes them and as older versions of llama.cpp did."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from offmoe.checkpoint.open import open_checkpoint
from offmoe.pack.convert import pack


def packed(path: Path, folder: Path, fmt: str) -> Path:
    out = folder / f"{path.name}-{fmt}.gguf"
    pack(open_checkpoint(path), out, fmt, lambda *_: None)
    return out


def older(path: Path, folder: Path, heads: int, fmt: str) -> Path:
    """A packed model of latent attention as llama.cpp wrote them before it absorbed: attn_kv_b in one."""
    import gguf

    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(folder / f"older-{fmt}.gguf", "deepseek2")
    values = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    widths = {f"deepseek2.attention.{name}_length": values.pop(f"deepseek2.attention.{name}_length_mla").contents()
              for name in ("key", "value")}  # fmt: skip
    for name, field in values.items():
        if name not in ("general.architecture", "deepseek2.expert_gating_func"):
            value = heads if name.endswith("head_count_kv") else widths.get(name, field.contents())
            writer.add_key_value(name, value, field.types[0])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, data in tensors.items():
        if name.endswith("attn_k_b.weight"):
            both = np.concatenate((data.transpose(0, 2, 1), tensors[name.replace("k_b", "v_b")]), axis=1)
            both = np.ascontiguousarray(both.reshape(-1, both.shape[-1]))
            kind = gguf.GGMLQuantizationType[fmt]
            writer.add_tensor(name.replace("k_b", "kv_b"), gguf.quants.quantize(both, kind), raw_dtype=kind)
        elif not name.endswith("attn_v_b.weight"):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / f"older-{fmt}.gguf"
