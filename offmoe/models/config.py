"""The numbers of a model, checked once and frozen."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.errors import OffmoeError
from offmoe.kernels.deltanet import Delta
from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.mla import Latent
from offmoe.kernels.recurrent import Mixer
from offmoe.kernels.rope import PLAIN, AttentionTemperature, Scaling
from offmoe.kernels.route import Rule
from offmoe.models.rope import check_rope


@dataclass(frozen=True)
class Heads:
    """Of a layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # values of a head that are rotated, the first
    rope_theta: float
    rope: Scaling
    uses_rope: bool = True

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
    recurrent: tuple[int, ...] = ()  # these layers
    head_bias: bool = False
    norm_bias: bool = False  # the norms of the residual stream are LayerNorms
    rope: Scaling = PLAIN
    embed_scale: float = 1.0  # of what the embedding gives
    residual_scale: float = 1.0  # of what a layer adds to the residual stream
    attention_scale: float = 0.0  # of q · k; 0: 1 / √D
    logit_divisor: float = 1.0
    full_attention: Heads | None = None  # of the layers that see all positions, where those with a window have others
    windows: tuple[int, ...] = ()  # by layer: positions that attention sees, 0: all; nothing: all in every layer
    chunked: bool = False  # a window is a chunk: a token sees its own, from the chunk's first position on
    no_rope: tuple[int, ...] = ()  # layers that rotate nothing
    attention_temperature: AttentionTemperature | None = None  # of their queries
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
    def moe_layers(self) -> int:
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
        return tuple(layer for layer in range(self.layers) if layer not in self.recurrent)

    def window(self, layer: int) -> int:
        """Positions that a token of `layer` sees, itself among them; 0: all before it."""
        return self.windows[layer] if self.windows else 0

    def heads_of(self, layer: int) -> Heads:
        if self.full_attention and not self.window(layer):
            return self.full_attention
        turned = layer not in self.no_rope
        return Heads(self.heads, self.kv_heads, self.head_dim, self.rotary, self.rope_theta, self.rope, turned)

    @property
    def kinds_of_heads(self) -> tuple[Heads, ...]:
        return tuple(dict.fromkeys(self.heads_of(layer) for layer in self.attended))

    def moe_layer_of(self, layer: int) -> int | None:
        return self.routed.index(layer) if layer in self.routed else None


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
