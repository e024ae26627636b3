"""The shapes of a model's tensors, by the role that each plays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from offmoe.kernels.mla import Latent
from offmoe.models.config import Heads, ModelConfig
from offmoe.models.family import GGUF_NAMES, Names
from offmoe.models.recurrent import mixer_shapes


def trunk_roles(config: ModelConfig, split: bool = False) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(role, layer, shape) of everything that is no routed expert."""
    shapes = {config.heads_of(layer): trunk_shapes(config, split, layer) for layer in range(config.layers)}
    for role in next(iter(shapes.values())):
        yield from ((role, layer, shapes[config.heads_of(layer)][role]) for layer in layers_of(role, config))


def layers_of(role: str, config: ModelConfig) -> Sequence[int]:
    """The layers in which a tensor plays `role`; only 0 where it belongs to none."""
    if "{l}" not in GGUF_NAMES[role][0]:
        return (0,)
    if role.startswith("dense"):
        return config.dense
    if role.startswith(("delta", "conv")):
        return config.recurrent
    if role.partition("_")[0] in ("q", "k", "v", "o"):
        return config.attended
    return config.routed if role.startswith(("router", "shared")) else range(config.layers)


def trunk_shapes(config: ModelConfig, split: bool = False, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Role → shape, in `layer`, of everything that is no routed expert; `layers_of` says where. split: kv_b is."""
    heads = config.heads_of(layer)
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab, config.hidden),
        "final_norm": (config.hidden,),
        "head": (config.vocab, config.hidden),
        "attn_norm": (config.hidden,),
        "o": (config.hidden, config.heads * config.value_dim if config.latent else heads.queries),
        "ffn_norm": (config.hidden,),
        "router": (config.experts, config.hidden),
    }
    shapes |= latent_shapes(config, config.latent, split) if config.latent else attention_shapes(config, heads)
    if config.tied:
        del shapes["head"]
    if config.o_bias:
        shapes["o_bias"] = (config.hidden,)
    if config.head_bias:
        shapes["head_bias"] = (config.vocab,)
    if config.norm_bias:
        shapes |= {f"{norm}_norm_bias": (config.hidden,) for norm in ("attn", "ffn", "final")}
    if config.rule.biased:
        shapes["router_bias"] = (config.experts,)
    if config.sinks:
        shapes["sinks"] = (config.heads,)
    if config.router_offset:
        shapes["router_offset"] = (config.experts,)
    if config.dense:
        shapes |= feed_forward_shapes("dense", config.hidden, config.dense_hidden)
    if config.shared:
        shapes |= feed_forward_shapes("shared", config.hidden, config.shared_hidden)
    if config.shared_gated:
        shapes["shared_router"] = (1, config.hidden)
    if config.sandwich:
        norms = ("attn_post_norm", "shared_norm", "shared_post_norm", "routed_post_norm", "ffn_post_norm")
        shapes |= {**dict.fromkeys((*norms, "router_gain"), (config.hidden,)), "layer_scale": (1,)}
    if config.rule.scaled:
        shapes["router_factors"] = (config.experts,)
    if config.mixer:
        shapes |= mixer_shapes(config.mixer, config.hidden)
    return shapes


def attention_shapes(config: ModelConfig, heads: Heads) -> dict[str, tuple[int, ...]]:
    q, kv = heads.queries, heads.keys
    rows = {"q": q + config.gate_rows, "k": kv, "v": kv}  # a head's query, then its gate
    shapes: dict[str, tuple[int, ...]] = {role: (count, config.hidden) for role, count in rows.items()}
    if config.qk_norm not in ("none", "unit"):
        norms = (heads.head_dim, heads.head_dim) if config.qk_norm in ("head", "after") else (q, kv)
        shapes |= {"q_norm": norms[:1], "k_norm": norms[1:]}
    if config.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    return shapes


def latent_shapes(config: ModelConfig, z: Latent, split: bool) -> dict[str, tuple[int, ...]]:
    """Of kernels.mla. kv_b has a head's key and value rows together; split, those of its key are transposed."""
    heads, hidden = config.heads, config.hidden
    shapes: dict[str, tuple[int, ...]] = {"kv_a": (z.width, hidden), "kv_a_norm": (z.kv_rank,)}
    if z.q_rank:
        shapes |= {"q_a": (z.q_rank, hidden), "q_a_norm": (z.q_rank,), "q_b": (heads * z.key, z.q_rank)}
    else:
        shapes["q"] = (heads * z.key, hidden)
    if split:
        return shapes | {"k_b": (heads, z.kv_rank, z.qk_nope), "v_b": (heads, z.value, z.kv_rank)}
    return shapes | {"kv_b": (heads * (z.qk_nope + z.value), z.kv_rank)}


def feed_forward_shapes(kind: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Of a dense layer or of the shared experts: its roles are those of a record, with `kind` before them."""
    return {f"{kind}_gate": (inner, hidden), f"{kind}_up": (inner, hidden), f"{kind}_down": (hidden, inner)}


def bias_shapes(names: Names, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Role → shape of the biases of all experts of a layer, stacked as its file has them."""
    experts, inner = config.experts, config.expert_hidden
    down = {"down_bias": (experts, config.hidden)}
    if "gate_up_bias" in names:
        return {"gate_up_bias": (experts, 2 * inner), **down}
    return {"gate_bias": (experts, inner), "up_bias": (experts, inner), **down}
