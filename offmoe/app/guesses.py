"""Values that a model's files do not say, and what offmoe takes instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from offmoe.checkpoint.fields import text_fields
from offmoe.models.family import Family
from offmoe.models.model import Model

FALLBACKS = {  # keys of a GGUF → what they are, for those whose lack is worth a line
    "context_length": "context",
    "rope.freq_base": "base of RoPE",
    "attention.layer_norm_rms_epsilon": "epsilon of the norms",
    "attention.head_count_kv": "key-value heads",
    "attention.key_length": "size of a head",
    "expert_feed_forward_length": "width of an expert",
}
TELLING = (  # fields of a config.json whose lack is worth a line
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "num_experts_per_tok",
    "num_experts",
    "norm_topk_prob",
    "head_dim",
    "num_key_value_heads",
    "moe_intermediate_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "sliding_window",
    "routed_scaling_factor",
    "n_group",
)


def guesses(model: Model) -> Iterator[str]:
    """Yield a line for everything that is taken because the model's files do not say it."""
    if model.checkpoint.kind == "gguf":
        yield from gguf_guesses(model)
    else:
        yield from directory_guesses(model)


def gguf_guesses(model: Model) -> Iterator[str]:
    """Yield what a GGUF leaves out; llama.cpp's loader takes the same."""
    metadata, arch = model.checkpoint.metadata, model.family.arch
    taken = taken_values(model)
    for key, what in FALLBACKS.items():
        if f"{arch}.{key}" not in metadata and key in taken:
            yield f"{arch}.{key} is missing: {taken[key]} is taken as {what}"
    biased = any(name.endswith("exp_probs_b.bias") for name in model.checkpoint.tensors)
    if biased and not metadata.get(f"{arch}.expert_gating_func"):
        yield f"{arch}.expert_gating_func is missing: a sigmoid is taken, as the router has a bias"


def taken_values(model: Model) -> dict[str, Any]:
    """Return the values in use, by the key of a GGUF that says them."""
    c = model.config
    mixer = c.mixers[c.attended[0]] if c.attended else None
    return {
        "context_length": c.ctx,
        "rope.freq_base": c.ropes[0].theta if c.ropes else None,
        "attention.layer_norm_rms_epsilon": c.norm.eps,
        "expert_feed_forward_length": c.moe.expert_hidden,
        **{
            key: value
            for key, name in (("attention.head_count_kv", "kv_heads"), ("attention.key_length", "head_dim"))
            if (value := getattr(mixer, name, None)) is not None
        },
    }


def directory_guesses(model: Model) -> Iterator[str]:
    """Yield what config.json and its neighbours leave out."""
    raw = text_fields(model.checkpoint.json("config.json") or {})
    for name, value in left_out(raw, model.family).items():
        yield f"config.json has no {name}: {value} is taken, the default of {model.family.model_type}"
    files = {path.name for path in model.checkpoint.path.iterdir()}
    if "generation_config.json" not in files:
        yield "generation_config.json is missing: what ends an answer is taken from the other files"
    if "tokenizer_config.json" not in files:
        yield "tokenizer_config.json is missing: special tokens are taken from the tokenizer"


def left_out(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the telling fields that a config.json leaves out, with the family's defaults."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    named = {**(rope if isinstance(rope, dict) else {}), **raw}
    found = {}
    for name, value in family.defaults.items():
        names = family.own.get(name, (name,))
        if name in TELLING and value is not None and not any(theirs in named for theirs in names):
            found[names[0]] = value
    return found
