"""Read a ModelConfig from `config.json` or from the metadata of a GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from offmoe.checkpoint.base import Checkpoint, quote
from offmoe.checkpoint.fields import CONFIG, FieldError, count, flag, number, text_fields
from offmoe.checkpoint.kinds import config_kind, gguf_kind, gguf_without_experts
from offmoe.errors import OffmoeError
from offmoe.kernels.route import Rule
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.rope import RopeConfig
from offmoe.models.config import ModelConfig, MoeConfig, NormConfig, StreamConfig, checked
from offmoe.models.family import Family, family_of
from offmoe.models.rope import GGUF_FACTORS, gguf_scaling, positions, rope_parameters, scaling_of

# Numbers whose null has a meaning: none, or the number that follows from others.
NULLABLE = ("num_key_value_heads", "head_dim", "global_head_dim", "q_lora_rank", "sliding_window", "rope_theta",
            "partial_rotary_factor")  # fmt: skip
MOST_LAYERS = 4096
MOST_PAIRS = 4096  # of rotated values in a head


def read_config(checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    """Family and config of an opened checkpoint. Raises OffmoeError."""
    if checkpoint.kind == "gguf":
        if kind := gguf_kind(checkpoint.metadata, checkpoint.tensors) or gguf_without_experts(checkpoint.metadata):
            raise OffmoeError(f"{checkpoint.path} is {kind}")
        arch = checkpoint.metadata.get("general.architecture")
        family = family_of("arch", arch, gating(checkpoint, arch))
        return family, from_gguf(checkpoint.metadata, family, checkpoint.tensors, rope_factors(checkpoint))
    raw = checkpoint.json("config.json")
    if raw is None:
        raise OffmoeError(f"{checkpoint.path} has no config.json: download the whole model directory")
    try:
        family = family_of("model_type", raw.get("model_type"))
    except OffmoeError as unknown:
        kind = config_kind(raw)
        raise OffmoeError(f"{checkpoint.path} is {kind}") if kind else unknown from None
    return family, from_hf(raw, family)


def rope_factors(checkpoint: Checkpoint) -> list[float] | None:
    """Values of the tensor GGUF_FACTORS; None where there is none."""
    info = checkpoint.tensors.get(GGUF_FACTORS)
    if info is not None and prod(info.shape) > MOST_PAIRS:
        raise OffmoeError(f"tensor {GGUF_FACTORS} has shape {list(info.shape)}: expected a number a pair of a head")
    return None if info is None else checkpoint.tensor(GGUF_FACTORS).flatten().tolist()


def gating(checkpoint: Checkpoint, arch: object) -> object:
    """expert_gating_func; old files leave it out, and mean a sigmoid (2) where a bias corrects the scores."""
    biased = any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors)
    return checkpoint.metadata.get(f"{arch}.expert_gating_func") or (2 if biased else 1)


def from_hf(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """Config of a Hugging Face `config.json`. Raises OffmoeError, by field and value, on what is not implemented."""
    try:
        return config_of(completed(raw, family), family)
    except FieldError as error:
        raise error.renamed(CONFIG, {name: names[0] for name, names in family.own.items()}) from None


def completed(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields of a config.json by the names that all families share; those left out have the family's defaults.

    Next to a text_config only `family.outer` counts, as in transformers.
    """
    text = text_fields(raw)
    if raw.get("text_config") is not None:
        text |= {name: raw.get(name, text.get(name, default)) for name, default in family.outer.items()}
    found = {name: value for name, value in text.items() if family.reads(name) and name not in family.own}
    for name, names in family.own.items():
        found |= next(({name: text[theirs]} for theirs in names if theirs in text), {})
    if found.get("rope_parameters") is None:
        found.pop("rope_parameters", None)
    for name, value in family.defaults.items():
        if type(value) in (int, float) and name not in NULLABLE and found.get(name, value) is None:
            raise OffmoeError(f"the model's config gives {family.name(name)} = null: expected a number like {value}")
    return {**family.defaults, **found}


def config_of(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """Config of fields by the names that all families share."""
    raw = family.translated(raw)
    refuse_unimplemented(raw, family)
    heads, hidden, rope = count(raw, "num_attention_heads"), count(raw, "hidden_size"), rope_parameters(raw)
    head_dim = count(raw, "head_dim", default=hidden // heads)
    layers, top_k = count(raw, "num_hidden_layers"), count(raw, "num_experts_per_tok")
    if layers > MOST_LAYERS:
        raise OffmoeError(f"the config has {layers} layers: no published model has so many")
    scaling, eps = scaling_of(raw), number(raw, "rms_norm_eps")
    moe = MoeConfig(
        experts=count(raw, "num_experts"),
        top_k=top_k,
        expert_hidden=count(raw, "moe_intermediate_size"),
        rule=Rule(top_k=top_k, renormalise=flag(raw, "norm_topk_prob", family.renormalise)),
        routed=tuple(range(layers)),
    )
    mixer = HeadsConfig(
        heads=heads,
        kv_heads=count(raw, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope=RopeConfig(
            rotary=int(head_dim * number(rope, "partial_rotary_factor", 1.0)),
            theta=number(rope, "rope_theta"),
            scaling=scaling,
        ),
        eps=eps,
        qk_norm=family.qk_norm,
        clip=number(raw, "clip_qkv", 0.0) or None,
    )
    config = ModelConfig(
        model_type=family.model_type,
        hidden=hidden,
        vocab=count(raw, "vocab_size"),
        ctx=positions(raw, scaling),
        mixers=(mixer,) * layers,
        moe=moe,
        norm=NormConfig(eps),
        stream=StreamConfig(tied=flag(raw, "tie_word_embeddings", False)),
    )
    return checked(family.configured(raw, config))


def refuse_unimplemented(raw: Mapping[str, Any], family: Family) -> None:
    """Raise OffmoeError on the first field whose value the family does not implement."""
    rope = rope_parameters(raw)
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise OffmoeError(f"the model's config gives layer_types = {quote(kinds)}: expected a list")
    known = family.implemented["layer_types"]
    asked = {
        **raw,
        "layer_types": next((kind for kind in kinds if kind not in known), known[0]),
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_type": rope["rope_type"],
    }
    for field, allowed in family.implemented.items():
        if allowed and asked.get(field, allowed[0]) not in allowed:
            raise OffmoeError(
                f"{family.model_type}: {field} is {quote(asked[field])}, and offmoe implements "
                f"{' or '.join(repr(value) for value in allowed)}: this model cannot be run yet"
            )


def from_gguf(
    metadata: Mapping[str, Any],
    family: Family,
    tensors: Mapping[str, Any],
    rope_factors: list[float] | None = None,
) -> ModelConfig:
    """Config of a GGUF, by way of `config.json`'s field names; rope_factors: values of models.rope.GGUF_FACTORS.

    A key that is left out means what llama.cpp makes of it (src/llama-model.cpp, load_hparams and load_tensors).
    """

    def key(name: str) -> Any:
        return metadata.get(f"{family.arch}.{name}")

    raw = gguf_values(key, metadata, family, tensors)
    raw |= {"rope_factors": rope_factors, "rope_scaling": gguf_scaling(key, tensors, rope_factors, family.gguf_rounded)}
    raw |= family.gguf_fields(key) if family.gguf_fields else {}
    try:
        found = {name: value for name, value in raw.items() if value is not None}
        config = config_of({"rope_theta": 10_000.0, **found}, family)
    except FieldError as error:  # with the names of keys for values, the same table says which key is which field
        names = gguf_values(lambda name: f"{family.arch}.{name}", {}, family, tensors)
        names["sliding_window"] = f"{family.arch}.attention.sliding_window"  # which few architectures read
        raise error.renamed("the GGUF", names) from None
    rotary = key("rope.dimension_count")
    if rotary not in (None, *(rope.rotary for rope in config.ropes)):
        raise OffmoeError(
            f"{family.arch}: rope.dimension_count is {quote(rotary)}, and offmoe implements "
            f"rotation of {' or '.join(str(rope.rotary) for rope in config.ropes)} values of a head: "
            "this model cannot be run yet"
        )
    return config


def gguf_values(
    key: Callable[[str], Any], metadata: Mapping[str, Any], family: Family, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of a GGUF's keys by the names of config.json's fields, None where there is none."""
    vocab, heads = metadata.get("tokenizer.ggml.tokens"), key("attention.head_count")
    head_dim = key("attention.key_length") or shared_out(key("embedding_length"), heads)
    a_key = key("attention.key_length_mla") or head_dim  # where the cache holds latents, key_length is a latent's
    rotary, rotated = key("rope.dimension_count"), None
    if type(head_dim) is type(rotary) is int and head_dim:
        rotated = rotary / head_dim if not family.implemented["partial_rotary_factor"] else None
    layers, extra = key("block_count"), key("nextn_predict_layers")  # the last ones predict further tokens
    if isinstance(layers, int) and isinstance(extra, int):
        layers -= extra
    wide = key("feed_forward_length")
    narrow = shared_out(wide, key("expert_used_count")) if family.gguf_divided else wide
    return {
        "num_hidden_layers": layers,
        "hidden_size": key("embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "partial_rotary_factor": rotated,
        "q_lora_rank": key("attention.q_lora_rank"),
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": a_key - rotary if isinstance(a_key, int) and isinstance(rotary, int) else None,
        "v_head_dim": key("attention.value_length_mla") or key("attention.value_length"),
        "vocab_size": len(vocab) if isinstance(vocab, list) else key("vocab_size"),
        "num_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
        "moe_intermediate_size": key("expert_feed_forward_length") or narrow,
        "intermediate_size": wide,
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base"),
        "rope_finetuned": key("rope.scaling.finetuned"),
        "n_shared_experts": key("expert_shared_count"),
        "shared_expert_intermediate_size": key("expert_shared_feed_forward_length"),
        "first_k_dense_replace": key("leading_dense_block_count"),
        "norm_topk_prob": key("expert_weights_norm"),
        "routed_scaling_factor": key("expert_weights_scale") or None,
        "n_group": key("expert_group_count") or None,
        "topk_group": key("expert_group_used_count") or None,
        "embedding_multiplier": key("embedding_scale"),
        "residual_multiplier": key("residual_scale"),
        "attention_multiplier": key("attention.scale"),
        "logits_scaling": key("logit_scale"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "linear_conv_kernel_dim": key("ssm.conv_kernel"),
        "linear_key_head_dim": key("ssm.state_size"),
        "linear_num_key_heads": key("ssm.group_count"),
        "linear_num_value_heads": key("ssm.time_step_rank"),
        "linear_value_head_dim": shared_out(key("ssm.inner_size"), key("ssm.time_step_rank")),
        "full_attention_interval": key("full_attention_interval"),
        "conv_L_cache": key("shortconv.l_cache"),
        "interleave_moe_layer_step": key("interleave_moe_layer_step"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "expert_gating_func": key("expert_gating_func") or None,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def shared_out(total: Any, among: Any) -> Any:
    """`total` divided by `among`; `total` itself where that is no whole number."""
    whole = type(total) is type(among) is int and among > 0 and total % among == 0
    return total // among if whole else total
