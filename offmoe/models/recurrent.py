"""What layers without keys and values are made of: gated DeltaNets, or short convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offmoe.checkpoint.base import shown
from offmoe.errors import OffmoeError
from offmoe.kernels.deltanet import DeltaWeights
from offmoe.kernels.recurrent import Mixer, MixerWeights
from offmoe.kernels.shortconv import ConvWeights, ShortConv

if TYPE_CHECKING:
    from offmoe.models.model import Model

FULL = "full_attention"  # the kind of all other layers beside them


def recurrent_layers(kinds: Any, layers: int, kind: str) -> tuple[int, ...]:
    """The layers that a config's list of kinds says are of this one."""
    if not isinstance(kinds, list) or len(kinds) != layers or not all(each in (FULL, kind) for each in kinds):
        raise OffmoeError(f"layer_types is {shown(kinds)}: expected {layers} times {kind} or {FULL}")
    if FULL not in kinds:
        raise OffmoeError(f"layer_types has no {FULL}: offmoe needs one")
    return tuple(layer for layer, each in enumerate(kinds) if each == kind)


def mixer_inputs(mixer: Mixer) -> tuple[str, ...]:
    """The roles whose rows, one under another, take such a layer's input in."""
    return ("conv_in",) if isinstance(mixer, ShortConv) else ("delta_qkv", "delta_z", "delta_b", "delta_a")


def mixer_output(mixer: Mixer) -> str:
    return "conv_o" if isinstance(mixer, ShortConv) else "delta_o"


def mixer_shapes(mixer: Mixer, hidden: int) -> dict[str, tuple[int, ...]]:
    """Role → shape."""
    if isinstance(mixer, ShortConv):
        rows: dict[str, int] = {"conv_in": sum(mixer.projected)}
        beside: dict[str, tuple[int, ...]] = {"conv_taps": (mixer.channels, mixer.taps)}
    else:
        rows = dict(zip(mixer_inputs(mixer), mixer.projected, strict=True))
        beside = {
            "delta_conv": (mixer.channels, mixer.taps),
            "delta_dt": (mixer.value_heads,),
            "delta_decay": (mixer.value_heads,),
            "delta_norm": (mixer.value_dim,),
        }
    taken = {role: (count, hidden) for role, count in rows.items()}
    return {**taken, **beside, mixer_output(mixer): (hidden, mixer.values)}


def mixer_weights(model: Model, load: Callable[[str], Tensor]) -> MixerWeights:
    """`load` gives a role of the layer in float32."""
    mixer = model.config.mixer
    assert mixer is not None

    def taps(role: str) -> Tensor:
        return load(role).view(mixer.channels, mixer.taps).t().contiguous()

    if isinstance(mixer, ShortConv):
        return ConvWeights(mixer, taps("conv_taps"))
    tiled = model.checkpoint.kind == "gguf" and model.family.tiled_gguf
    return DeltaWeights(mixer, taps("delta_conv"), load("delta_decay"), load("delta_dt"), load("delta_norm"),
                        model.config.norm_eps, tiled)  # fmt: skip
