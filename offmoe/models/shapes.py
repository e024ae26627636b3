"""Roles and shapes of a model's tensors, but for the routed experts' matrices."""

from __future__ import annotations

from collections.abc import Iterator

from offmoe.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
MODEL_ROLES = ("embed", "final_norm", "head", "head_bias", "final_norm_bias")  # of no layer


def trunk_roles(config: ModelConfig, split: bool = False) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (role, layer, shape) of everything but the routed experts; layer 0 for what belongs to none."""
    yield from ((role, 0, shape) for role, shape in model_shapes(config).items())
    for layer in range(config.layers):
        yield from ((role, layer, shape) for role, shape in layer_shapes(config, layer, split).items())


def model_shapes(config: ModelConfig) -> Shapes:
    """Role → shape of the tensors that belong to no layer."""
    vocab, hidden, stream = config.vocab, config.hidden, config.stream
    shapes: Shapes = {"embed": (vocab, hidden), "final_norm": (hidden,)}
    if not stream.tied:
        shapes["head"] = (vocab, hidden)
    if stream.head_bias:
        shapes["head_bias"] = (vocab,)
    if config.norm.bias:
        shapes["final_norm_bias"] = (hidden,)
    return shapes


def layer_shapes(config: ModelConfig, layer: int, split: bool = False) -> Shapes:
    """Role → shape of a layer's tensors. split: latent attention's kv_b is stored in two halves."""
    hidden, norm = config.hidden, config.norm
    shapes: Shapes = {"attn_norm": (hidden,), **config.mixers[layer].shapes(hidden, split), "ffn_norm": (hidden,)}
    if norm.bias:
        shapes |= {"attn_norm_bias": (hidden,), "ffn_norm_bias": (hidden,)}
    if layer in config.routed:
        shapes |= router_shapes(config)
    else:
        shapes |= feed_forward_shapes("dense", hidden, config.moe.dense_hidden)
    if norm.sandwich:
        norms = ("attn_post_norm", "shared_norm", "shared_post_norm", "routed_post_norm", "ffn_post_norm")
        shapes |= {**dict.fromkeys((*norms, "router_gain"), (hidden,)), "layer_scale": (1,)}
    return shapes


def router_shapes(config: ModelConfig) -> Shapes:
    """Role → shape of the router and the shared experts."""
    hidden, moe = config.hidden, config.moe
    shapes: Shapes = {"router": (moe.experts, hidden)}
    each = {"router_bias": moe.rule.biased, "router_offset": moe.router_offset, "router_factors": moe.rule.scaled}
    shapes |= {role: (moe.experts,) for role, wanted in each.items() if wanted}
    if moe.shared:
        shapes |= feed_forward_shapes("shared", hidden, moe.shared_hidden)
    if moe.shared_gated:
        shapes["shared_router"] = (1, hidden)
    return shapes


def feed_forward_shapes(kind: str, hidden: int, inner: int) -> Shapes:
    """Role → shape of a dense layer or of the shared experts: roles of a record, with `kind` in front."""
    return {f"{kind}_gate": (inner, hidden), f"{kind}_up": (inner, hidden), f"{kind}_down": (hidden, inner)}


def bias_shapes(config: ModelConfig, both: bool) -> Shapes:
    """Role → shape of the biases of all experts of a layer. both: those of gate and up are in one tensor."""
    experts, inner = config.experts, config.moe.expert_hidden
    down = {"down_bias": (experts, config.hidden)}
    if both:
        return {"gate_up_bias": (experts, 2 * inner), **down}
    return {"gate_bias": (experts, inner), "up_bias": (experts, inner), **down}
