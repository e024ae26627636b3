"""A model's hyper-parameters as the metadata of a GGUF, in the keys of llama.cpp; its tokenizer: tokenizer_keys.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import GELU, SILU, Glu
from offmoe.kernels.rope import Scaling, frequency_factors, yarn_mscale
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.models.rope import FACTORED, GGUF_FACTORS

if TYPE_CHECKING:
    from offmoe.models.config import ModelConfig
    from offmoe.models.family import Family

GPT_OSS = Glu(alpha=1.702, limit=7.0, plus=1.0)
GATING_STATED = ("deepseek2",)  # architectures whose files always state how experts are scored


def model_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the hyper-parameters. Raises OffmoeError if the GGUF architecture has no key for one of them."""
    check_packable(config, family)
    moe = config.moe
    keys: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.ctx,
        "embedding_length": config.hidden,
        "feed_forward_length": moe.dense_hidden or moe.expert_hidden,
        "expert_feed_forward_length": moe.expert_hidden,
        "attention.layer_norm_rms_epsilon": config.norm.eps,
        "expert_count": config.experts,
        "expert_used_count": config.top_k,
        "vocab_size": config.vocab,
    }
    if moe.shared_gated:
        keys["expert_shared_feed_forward_length"] = moe.shared_hidden
    elif moe.shared:
        keys["expert_shared_count"] = moe.shared
    if config.dense and family.dense_first:
        keys["leading_dense_block_count"] = len(config.dense)
    if moe.rule.scores == "sigmoid" or family.arch in GATING_STATED:
        keys["expert_gating_func"] = 2 if moe.rule.scores == "sigmoid" else 1
        keys |= {"expert_weights_norm": moe.rule.renormalise, "expert_weights_scale": moe.rule.scale}
    if moe.rule.groups > 1:
        keys |= {"expert_group_count": moe.rule.groups, "expert_group_used_count": moe.rule.kept}
    for mixer in reversed(config.kinds):  # where kinds differ in a key, the first layer's wins
        keys |= mixer.gguf_keys()
    for rope in config.ropes:
        keys |= scaling_keys(rope.scaling, family)
    keys |= family.gguf_keys(config)
    return {f"{family.arch}.{key}": value for key, value in keys.items()}


def check_packable(config: ModelConfig, family: Family) -> None:
    """Raise OffmoeError if llama.cpp would compute something else than the config describes."""
    rule, arch = config.moe.rule, f"the GGUF architecture {family.arch}"

    def refused(what: str, why: str) -> OffmoeError:
        return OffmoeError(f"{family.model_type} with {what} cannot be packed: {why}")

    if rule.renormalise != family.renormalise and rule.scores != "sigmoid":
        raise refused(f"norm_topk_prob = {rule.renormalise}", f"{arch} always means {family.renormalise}")
    if clip := next((mixer.clip for mixer in config.kinds if isinstance(mixer, HeadsConfig) and mixer.clip), None):
        why = f"llama.cpp ignores it for the architecture {family.arch}, and its answers would differ"
        raise refused(f"clip_qkv = {clip}", why)
    if rule.scores == "mixer":
        raise OffmoeError(
            f"{family.model_type} cannot be packed: llama.cpp routes the architecture {family.arch} by another rule, "
            "and its answers would differ"
        )
    if family.dense_first and config.dense != tuple(range(len(config.dense))):
        raise refused(f"experts in the layers {config.routed}", "in a GGUF only the first layers can be dense")
    if rule.groups > rule.kept and rule.group_best != 2:
        why = f"llama.cpp ranks groups by their best two experts, this model by {rule.group_best}"
        raise refused(f"n_group = {rule.groups}", why)
    if config.moe.glu not in (SILU, GPT_OSS, GELU):
        raise refused(str(config.moe.glu), f"{arch} always means {GPT_OSS}")


def scaling_keys(rope: Scaling, family: Family) -> dict[str, Any]:
    """Return `rope.scaling.*`, which models.rope.gguf_scaling reads.

    Raises OffmoeError if the keys cannot express `rope`.
    """
    if rope.kind == "default" or (rope.kind in FACTORED and family.gguf_factors):
        return {}
    keys = {"type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        keys |= {"original_context_length": rope.original, "yarn_beta_fast": rope.fast, "yarn_beta_slow": rope.slow}
        default_attention = yarn_mscale(rope.factor)
        if rope.scores != 1:
            keys["yarn_log_multiplier"] = (math.sqrt(rope.scores) - 1) / math.log(rope.factor)
            default_attention = 1.0
        elif not math.isclose(rope.attention, default_attention):
            keys["attn_factor"], default_attention = rope.attention / default_attention, rope.attention
        expressible = math.isclose(rope.attention, default_attention) and rope.truncate == family.gguf_rounded
    else:
        expressible = rope.kind == "linear"
    if not expressible:
        raise OffmoeError(f"{family.model_type} with {rope} cannot be packed: a GGUF has no keys for this RoPE scaling")
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the frequency divisors by tensor name, float32, for scalings that are not described by `scaling_keys`."""
    scaled = next((rope for rope in config.ropes if rope.scaling.kind in FACTORED), None)
    return {GGUF_FACTORS: frequency_factors(scaled.rotary, scaled.theta, scaled.scaling)} if scaled else {}
