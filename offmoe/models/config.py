"""Numbers of a model in parts, checked once and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import SILU, Glu
from offmoe.kernels.route import Rule
from offmoe.mixers.base import MixerConfig
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.recurrent import RecurrentConfig
from offmoe.mixers.rope import RopeConfig


@dataclass(frozen=True)
class MoeConfig:
    """Feed-forward parts: routed experts, shared experts that every token passes, dense layers without experts."""

    experts: int
    top_k: int
    expert_hidden: int
    rule: Rule  # of the router
    routed: tuple[int, ...]  # layers with experts; a `moe_layer` is an index into them
    dense_hidden: int = 0  # of the layers without experts; 0 where there are none
    shared: int = 0  # shared experts, stored as one
    shared_hidden: int = 0  # of all shared experts together
    shared_gated: bool = False  # their output is multiplied with the sigmoid of shared_router's logit
    glu: Glu = SILU  # of all feed-forward parts
    router_offset: bool = False  # added to the router's logits
    expert_bias: bool = False
    weighted_input: bool = False  # an expert's weight is multiplied with its input, not with its output


@dataclass(frozen=True)
class NormConfig:
    """Norms of the residual stream."""

    eps: float
    bias: bool = False  # they are LayerNorms
    sandwich: bool = False  # around every part, and the shared expert has norms of its own (kernels.sandwich)


@dataclass(frozen=True)
class StreamConfig:
    """Ends of the residual stream: embedding, scales, output head."""

    tied: bool  # the output head is the embedding
    head_bias: bool = False
    embed_scale: float = 1.0  # of the embedding's output
    residual_scale: float = 1.0  # of a layer's output before it is added
    logit_divisor: float = 1.0
    logit_cap: float = 0.0  # c · tanh(logit / c); 0: none


@dataclass(frozen=True)
class ModelConfig:
    """A decoder whose layers are a mixer and a feed-forward part.

    Residency, records and traces know only `moe_layers`, `experts` and `top_k`.
    """

    model_type: str
    hidden: int
    vocab: int
    ctx: int  # positions that the model was trained for
    mixers: tuple[MixerConfig, ...]  # by layer
    moe: MoeConfig
    norm: NormConfig
    stream: StreamConfig

    @property
    def layers(self) -> int:
        return len(self.mixers)

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return self.moe.experts

    @property
    def top_k(self) -> int:
        """Routed experts of a token in a layer."""
        return self.moe.top_k

    @property
    def routed(self) -> tuple[int, ...]:
        """The layers with experts, by moe_layer."""
        return self.moe.routed

    @property
    def moe_layers(self) -> int:
        return len(self.moe.routed)

    @property
    def dense(self) -> tuple[int, ...]:
        """The layers without experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.moe.routed)

    def moe_layer_of(self, layer: int) -> int | None:
        """Index of `layer` among the layers with experts; None: it has none."""
        return self.routed.index(layer) if layer in self.routed else None

    @property
    def recurrent(self) -> tuple[int, ...]:
        """The layers with a state instead of keys and values."""
        return tuple(layer for layer, mixer in enumerate(self.mixers) if isinstance(mixer, RecurrentConfig))

    @property
    def attended(self) -> tuple[int, ...]:
        """The layers with attention."""
        return tuple(layer for layer, mixer in enumerate(self.mixers) if mixer.heads_of_attention)

    @property
    def kinds(self) -> tuple[MixerConfig, ...]:
        """The mixers that differ, in the order of their first layers."""
        return tuple(dict.fromkeys(self.mixers))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that differ, in the order of their first layers."""
        return tuple(dict.fromkeys(mixer.position for mixer in self.kinds if mixer.position))

    @property
    def heads(self) -> HeadsConfig:
        """The first layer's attention heads, of those that have any."""
        return next(mixer for mixer in self.mixers if isinstance(mixer, HeadsConfig))

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that a token sees, by layer; 0: all before it."""
        return tuple(mixer.sees for mixer in self.mixers)

    @property
    def stream_scale(self) -> float:
        """Factor of the embedding in the residual stream.

        The stream is kept divided by `residual_scale`: layers then add to it unscaled, and its norms, with
        `stream_eps`, give the same.
        """
        return self.stream.embed_scale / self.stream.residual_scale

    @property
    def stream_eps(self) -> float:
        return self.norm.eps / self.stream.residual_scale**2

    def with_moe(self, **changes: Any) -> ModelConfig:
        return replace(self, moe=replace(self.moe, **changes))

    def with_norm(self, **changes: Any) -> ModelConfig:
        return replace(self, norm=replace(self.norm, **changes))

    def with_stream(self, **changes: Any) -> ModelConfig:
        return replace(self, stream=replace(self.stream, **changes))

    def with_heads(self, layers: Sequence[int] | None = None, **changes: Any) -> ModelConfig:
        """Change the attention heads of `layers`, or of all layers that have any."""
        some = range(self.layers) if layers is None else layers
        return self.with_mixers({
            layer: replace(mixer, **changes)
            for layer, mixer in enumerate(self.mixers)
            if layer in some and isinstance(mixer, HeadsConfig)
        })  # fmt: skip

    def with_mixers(self, changes: dict[int, MixerConfig]) -> ModelConfig:
        """Other mixers for some layers."""
        return replace(self, mixers=tuple(changes.get(layer, mixer) for layer, mixer in enumerate(self.mixers)))


def checked(config: ModelConfig) -> ModelConfig:
    """Return `config`; raise OffmoeError where its numbers contradict one another."""
    moe, stream = config.moe, config.stream
    if not moe.routed:
        raise OffmoeError(f"none of the {config.layers} layers has experts: offmoe runs mixture-of-experts models")
    if moe.top_k > moe.experts:
        raise OffmoeError(f"the config routes to {moe.top_k} of {moe.experts} experts: more than there are")
    if not min(stream.embed_scale, stream.residual_scale, stream.logit_divisor) > 0:
        raise OffmoeError("the config multiplies embedding, residual stream or logits by 0: expected a number above 0")
    check_groups(moe.rule, moe.experts)
    for mixer in config.kinds:
        mixer.check()
    if moe.experts > 65535:
        raise OffmoeError(f"{config.layers} layers of {moe.experts} experts: no published model has so many")
    return config


def check_groups(rule: Rule, experts: int) -> None:
    """Raise OffmoeError where a rule cannot choose its k experts out of the groups that it keeps."""
    each = experts // rule.groups
    if experts % rule.groups or (rule.groups > 1 and rule.group_best > each):
        raise OffmoeError(f"n_group is {rule.groups}: {experts} experts do not divide into such groups")
    if not rule.kept <= rule.groups or rule.kept * each < rule.top_k:
        raise OffmoeError(
            f"topk_group is {rule.kept} of {rule.groups} groups of {each} experts: "
            f"{rule.top_k} are to be chosen from them"
        )
