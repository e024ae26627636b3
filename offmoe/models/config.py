"""The numbers of a model, from `config.json` or GGUF metadata, checked once and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offmoe.checkpoint.base import shown
from offmoe.errors import OffmoeError
from offmoe.kernels.deltanet import Delta
from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.keyless import Mixer
from offmoe.kernels.mla import Latent
from offmoe.kernels.rope import PLAIN, Scaling, Temper
from offmoe.kernels.route import Rule
from offmoe.models.fields import count as count  # families take them from here
from offmoe.models.fields import flag as flag
from offmoe.models.fields import number as number
from offmoe.models.keyless import FULL as FULL
from offmoe.models.quantisation import packing_of
from offmoe.models.rope import check_rope, gguf_scaling, positions, rope_parameters, scaling_of

if TYPE_CHECKING:
    from offmoe.models.family import Family

MOST_LAYERS = 4096
SLIDING = "sliding_attention"  # a kind of layer


@dataclass(frozen=True)
class Heads:
    """Of a layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # values of a head that are rotated, the first
    rope_theta: float
    rope: Scaling
    turned: bool = True

    @property
    def queries(self) -> int:
        """Values of all heads' queries together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of layers that are attention and a feed-forward part: routed experts, in some layers a dense one.

    A `place` numbers the layers that have experts, from 0: residency, records and traces know nothing of the others.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    top_k: int
    expert_hidden: int
    ctx: int  # positions that the model was trained for
    norm_eps: float
    rope_theta: float
    rotary: int  # values of a head that are rotated, the first
    qk_norm: str  # none, head (over each head), after (so, of rotated heads), unit (so, by no weights) or full (of all)
    rule: Rule  # of the router
    clip_qkv: float | None
    tied: bool  # the output head is the embedding
    routed: tuple[int, ...]  # the layers with experts, by place
    dense_hidden: int = 0  # of the layers without; 0 where there are none
    shared: int = 0  # experts beside the routed ones, stored as one
    shared_hidden: int = 0  # of all of them together
    shared_gated: bool = False  # times the sigmoid of a row of its own
    qkv_bias: bool = False
    output_gated: bool = False  # each head's output times the sigmoid of a row for each of its values
    mixer: Mixer | None = None  # of the layers without keys and values
    keyless: tuple[int, ...] = ()  # these layers
    head_bias: bool = False
    norm_bias: bool = False  # the norms of the residual stream are LayerNorms
    rope: Scaling = PLAIN
    embed_scale: float = 1.0  # of what the embedding gives
    residual_scale: float = 1.0  # of what a layer adds to the residual stream
    attention_scale: float = 0.0  # of q · k; 0: 1 / √D
    logit_divisor: float = 1.0
    far: Heads | None = None  # of the layers that see all positions, where those with a window have others
    windows: tuple[int, ...] = ()  # by layer: positions that attention sees, 0: all; nothing: all in every layer
    chunked: bool = False  # a window is a chunk: a token sees its own, from the chunk's first position on
    unturned: tuple[int, ...] = ()  # layers that rotate nothing
    temper: Temper | None = None  # of their queries
    sinks: bool = False  # a logit a head that takes its share of attention and gives nothing
    o_bias: bool = False
    router_offset: bool = False  # added to the router's logits
    expert_bias: bool = False
    glu: Glu = SILU  # of all feed-forward parts
    weighted_input: bool = False  # an expert's weight is multiplied with what it takes in, not with what it gives
    sandwich: bool = False  # norms around every part, and the shared expert has its own: see kernels.sandwich
    value_norm: bool = False  # each head's value over its RMS
    logit_cap: float = 0.0  # c · tanh(logit / c); 0: none
    latent: Latent | None = None  # of multi-head latent attention; then head_dim is a key's, and kv_heads is 1

    @property
    def delta(self) -> Delta | None:
        """The mixer, where it is a DeltaNet."""
        return self.mixer if isinstance(self.mixer, Delta) else None

    @property
    def value_dim(self) -> int:
        """Of what a head's attention gives."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def projections(self) -> tuple[str, ...]:
        """The roles whose matrices are multiplied with the input of a layer with keys, together."""
        if self.latent:
            return ("q_a" if self.latent.q_rank else "q", "kv_a")
        return ("q_gate", "q", "k", "v") if self.output_gated else ("q", "k", "v")

    @property
    def projected(self) -> int:
        """Rows of these matrices, at most."""
        if self.latent:
            return (self.latent.q_rank or self.heads * self.head_dim) + self.latent.width
        return max(h.queries + 2 * h.keys for h in self.kinds_of_heads) + self.gate_rows

    @property
    def score_scale(self) -> float:
        """What q · k is multiplied by."""
        return float((self.attention_scale or self.head_dim**-0.5) * self.rope.scores)

    @property
    def stream_scale(self) -> float:
        """Of the embedding in the residual stream, which is kept divided by `residual_scale`: then layers add to it
        as they are, and its norms are the same with `stream_eps`."""
        return self.embed_scale / self.residual_scale

    @property
    def stream_eps(self) -> float:
        return self.norm_eps / self.residual_scale**2

    @property
    def norm_after(self) -> bool:
        """Whether heads are normed after they are rotated."""
        return self.qk_norm in ("after", "unit")

    @property
    def places(self) -> int:
        return len(self.routed)

    @property
    def dense(self) -> tuple[int, ...]:
        """The layers without experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.routed)

    @property
    def gate_rows(self) -> int:
        """Of the gate of all heads, which stands before q, k and v."""
        return self.heads * self.head_dim if self.output_gated else 0

    @property
    def attended(self) -> tuple[int, ...]:
        """The layers with keys and values."""
        return tuple(layer for layer in range(self.layers) if layer not in self.keyless)

    def window(self, layer: int) -> int:
        """Positions that a token of `layer` sees, itself among them; 0: all before it."""
        return self.windows[layer] if self.windows else 0

    def heads_of(self, layer: int) -> Heads:
        if self.far and not self.window(layer):
            return self.far
        turned = layer not in self.unturned
        return Heads(self.heads, self.kv_heads, self.head_dim, self.rotary, self.rope_theta, self.rope, turned)

    @property
    def kinds_of_heads(self) -> tuple[Heads, ...]:
        return tuple(dict.fromkeys(self.heads_of(layer) for layer in self.attended))

    def place_of(self, layer: int) -> int | None:
        return self.routed.index(layer) if layer in self.routed else None


def from_hf(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """A Hugging Face `config.json`; what is not implemented is refused by field and value."""
    raw = family.translated(raw)
    refuse_unimplemented(raw, family)
    heads, hidden, rope = count(raw, "num_attention_heads"), count(raw, "hidden_size"), rope_parameters(raw)
    head_dim = count(raw, "head_dim", default=hidden // heads)
    layers, top_k = count(raw, "num_hidden_layers"), count(raw, "num_experts_per_tok")
    if layers > MOST_LAYERS:
        raise OffmoeError(f"the config has {layers} layers: no published model has so many")
    rule = Rule(top_k=top_k, renormalise=flag(raw, "norm_topk_prob", family.renormalise))
    scaling = scaling_of(raw)
    config = ModelConfig(
        model_type=family.model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=count(raw, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocab=count(raw, "vocab_size"),
        experts=count(raw, "num_experts", "num_local_experts", "n_routed_experts"),
        top_k=top_k,
        expert_hidden=count(raw, "moe_intermediate_size", "intermediate_size"),
        ctx=positions(raw, scaling),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=number(rope, "rope_theta", family.rope_theta),
        rotary=int(head_dim * number(rope, "partial_rotary_factor", family.partial_rotary)),
        clip_qkv=number(raw, "clip_qkv", 0.0) or None,
        tied=flag(raw, "tie_word_embeddings", False),
        rule=rule,
        routed=tuple(range(layers)),
        qk_norm=family.qk_norm,
        rope=scaling,
    )
    return checked(replace(config, **family.fields(raw, layers, rule)))


def sparse_layers(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`routed` and `dense_hidden` of the Qwen families: every so many layers has experts, but for a list."""
    step, listed = count(raw, "decoder_sparse_step", default=1), raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise OffmoeError(
            f"the model's config gives mlp_only_layers = {shown(listed)}: expected layers of 0 to {layers - 1}"
        )
    routed = tuple(layer for layer in range(layers) if layer not in listed and (layer + 1) % step == 0)
    return {"routed": routed, "dense_hidden": count(raw, "intermediate_size") if len(routed) < layers else 0}


def first_dense(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`routed` and `dense_hidden` where the first layers have no experts."""
    dense = int(number(raw, "first_k_dense_replace", 0))
    return {"routed": tuple(range(dense, layers)), "dense_hidden": count(raw, "intermediate_size") if dense else 0}


def shared_experts(raw: Mapping[str, Any], shared: int) -> dict[str, Any]:
    """`shared` experts that every token passes, each as wide as a routed one."""
    return {"shared": shared, "shared_hidden": shared * count(raw, "moe_intermediate_size")}


def sliding_windows(raw: Mapping[str, Any], layers: int, default: Sequence[str]) -> tuple[int, ...]:
    """`windows`, of layer_types: every layer looks at all positions or at sliding_window of them."""
    kinds = raw.get("layer_types") or list(default)
    if len(kinds) != layers:
        raise OffmoeError(
            f"the model's config gives {len(kinds)} layer_types: expected one for each of {layers} layers"
        )
    return tuple(count(raw, "sliding_window") if kind == SLIDING else 0 for kind in kinds)


def balanced_by_bias(raw: Mapping[str, Any], rule: Rule) -> Rule:
    """DeepSeek-V3's (arXiv 2412.19437), which many took over."""
    return replace(
        rule, scores="sigmoid", biased=True, group_best=2, groups=count(raw, "n_group", default=1),
        kept=count(raw, "topk_group", default=1), scale=number(raw, "routed_scaling_factor", 1.0),
    )  # fmt: skip


def latent_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Multi-head latent attention, as DeepSeek-V2 has it and others took it over."""
    latent = Latent(
        q_rank=count(raw, "q_lora_rank", default=0),
        kv_rank=count(raw, "kv_lora_rank"),
        plain=count(raw, "qk_nope_head_dim"),
        turned=count(raw, "qk_rope_head_dim"),
        value=count(raw, "v_head_dim"),
    )
    return {"latent": latent, "kv_heads": 1, "head_dim": latent.key, "rotary": latent.turned}


def refuse_unimplemented(raw: Mapping[str, Any], family: Family) -> None:
    packing_of(raw.get("quantization_config"))
    rope = rope_parameters(raw)
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise OffmoeError(f"the model's config gives layer_types = {shown(kinds)}: expected a list")
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
                f"{family.model_type}: {field} is {shown(asked[field])}, and offmoe implements "
                f"{' or '.join(repr(value) for value in allowed)}: this model cannot be run yet"
            )


def from_gguf(
    metadata: Mapping[str, Any],
    family: Family,
    tensors: Mapping[str, Any],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """GGUF metadata and the values of models.rope.GGUF_FACTORS, by way of the field names of `config.json`."""

    def key(name: str) -> Any:
        return metadata.get(f"{family.arch}.{name}")

    vocab, head_dim, rotated = metadata.get("tokenizer.ggml.tokens"), key("attention.key_length"), None
    a_key = key("attention.key_length_mla") or head_dim  # where the cache holds latents, key_length is a latent's
    if type(head_dim) is type(turned := key("rope.dimension_count")) is int and head_dim:
        rotated = turned / head_dim if not family.implemented["partial_rotary_factor"] else None
    layers, extra = key("block_count"), key("nextn_predict_layers")  # the last ones predict further tokens
    if isinstance(layers, int) and isinstance(extra, int):
        layers -= extra
    raw = {
        "num_hidden_layers": layers,
        "hidden_size": key("embedding_length"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "partial_rotary_factor": rotated,
        "q_lora_rank": key("attention.q_lora_rank"),
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": a_key - turned if isinstance(a_key, int) and isinstance(turned, int) else None,
        "v_head_dim": key("attention.value_length_mla") or key("attention.value_length"),
        "vocab_size": len(vocab) if isinstance(vocab, list) else key("vocab_size"),
        "num_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base"),
        "rope_factors": rope_factors,
        "rope_scaling": gguf_scaling(key, tensors, None if family.gguf_fields else rope_factors),
        "sliding_window": key("attention.sliding_window"),
        "n_shared_experts": key("expert_shared_count"),
        "shared_expert_intermediate_size": key("expert_shared_feed_forward_length"),
        "first_k_dense_replace": key("leading_dense_block_count"),
        "norm_topk_prob": key("expert_weights_norm"),
        "routed_scaling_factor": key("expert_weights_scale"),
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
        "expert_gating_func": key("expert_gating_func"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    raw |= family.gguf_fields(key) if family.gguf_fields else {}
    config = from_hf({name: value for name, value in raw.items() if value is not None}, family)
    if turned not in (None, *(heads.rotary for heads in config.kinds_of_heads)):
        raise OffmoeError(
            f"{family.arch}: rope.dimension_count is {shown(turned)}, and offmoe implements "
            f"rotation of {config.rotary} values of a head of {config.head_dim}: this model cannot be run yet"
        )
    return config


def shared_out(total: Any, among: Any) -> Any:
    """How much each has; the total where that is no whole number."""
    whole = type(total) is type(among) is int and among > 0 and total % among == 0
    return total // among if whole else total


def checked(config: ModelConfig) -> ModelConfig:
    """What the fields say about one another."""
    if not config.routed:
        raise OffmoeError(f"none of the {config.layers} layers has experts: offmoe runs mixture-of-experts models")
    if config.top_k > config.experts:
        raise OffmoeError(f"the config routes to {config.top_k} of {config.experts} experts: more than there are")
    if not min(config.embed_scale, config.residual_scale, config.logit_divisor) > 0:
        raise OffmoeError("the config multiplies embedding, residual stream or logits by 0: expected a number above 0")
    check_groups(config.rule, config.experts)
    for heads in config.kinds_of_heads:
        check_heads(heads)
    if config.experts > 65535:
        raise OffmoeError(f"{config.layers} layers of {config.experts} experts: no published model has so many")
    return config


def check_heads(h: Heads) -> None:
    """What the numbers of a layer's heads say about one another."""
    if h.heads % h.kv_heads:
        raise OffmoeError(f"{h.heads} heads do not divide among {h.kv_heads} key-value heads")
    if h.head_dim % 2 or not h.head_dim:
        raise OffmoeError(f"head_dim is {h.head_dim}: rotary embedding needs an even number above 0")
    if h.rotary % 2 or not 2 <= h.rotary <= h.head_dim:
        raise OffmoeError(
            f"partial_rotary_factor asks for {h.rotary} of {h.head_dim} values of a head to be rotated: "
            "expected an even number above 0"
        )
    check_rope(h.rope, h.rotary, h.rope_theta)


def check_groups(rule: Rule, experts: int) -> None:
    """That a rule can choose its k out of the groups that it keeps."""
    each = experts // rule.groups
    if experts % rule.groups or (rule.groups > 1 and rule.group_best > each):
        raise OffmoeError(f"n_group is {rule.groups}: {experts} experts do not divide into such groups")
    if not rule.kept <= rule.groups or rule.kept * each < rule.top_k:
        raise OffmoeError(
            f"topk_group is {rule.kept} of {rule.groups} groups of {each} experts: "
            f"{rule.top_k} are to be chosen from them"
        )
