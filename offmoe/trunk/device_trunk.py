"""The trunk on a GPU: weights stay quantised, the residual stream is float32.

The decode step multiplies weights as they are (kernels.gpu.gemv); a prompt's chunk unpacks one matrix at a time for
torch's product (mixers.unpacked). The interface is that of host_trunk.Trunk, the reference on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offmoe.kernels.gpu import gemv, norm_rope
from offmoe.kernels.gpu.embed import embed
from offmoe.kernels.norm_rope import rms_norm
from offmoe.kernels.route import select
from offmoe.kernels.row_blocks import multiplied
from offmoe.kernels.striped import stripe
from offmoe.mixers.protocols import Part
from offmoe.mixers.unpacked import product
from offmoe.models.model import Model
from offmoe.trunk.device_weights import DeviceLayer, DeviceWeights, Resident
from offmoe.trunk.kv_cache import KVCache


class DeviceTrunk:
    """Resident weights, and a layer's parts for a chunk of T tokens."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, ctx: int) -> None:
        self.config = c = model.config
        self.layers: list[DeviceLayer] = []
        self._device, self._dtype = device, dtype
        self._weights = weights = DeviceWeights(model, device, ctx)
        self.embedding = weights.parts("embed", cols=c.hidden)[0]  # [V, H]
        # Only the decode step and `logits` use these.
        divisor = c.stream.logit_divisor
        self.final_norm = stripe(weights.floats("final_norm")) / divisor
        self.final_norm_bias = stripe(weights.floats("final_norm_bias")) / divisor if c.norm.bias else None
        self.head_bias = weights.floats("head_bias") / divisor if c.stream.head_bias else None
        self.head = (self.embedding,) if c.stream.tied else weights.parts("head", cols=c.hidden)
        self._positions = torch.arange(ctx, device=device)

    def load_layers(self, progress: Callable[[int, int], None]) -> None:
        """Read the layers one after another; `progress(done, layers)`."""
        for layer in range(self.config.layers):
            self.layers.append(self._weights.layer(layer))
            progress(layer + 1, self.config.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads: everything but the embedding, unless that is the head too."""
        tensors = [self.final_norm, *(buffer for buffer, _ in self.head)]
        tensors += [tensor for layer in self.layers for tensor in layer.tensors()]
        return sum(tensor.nbytes for tensor in tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [T] → [T, H] float32."""
        out = torch.empty((len(tokens), self.config.hidden), device=self._device)
        embed(tokens, self.embedding, out, striped=False, scale=self.config.stream_scale)
        return out

    def attend(self, layer: int, x: Tensor, kv: KVCache, start: int) -> Tensor:
        """Run the mixer of `layer` over the residual stream x [T, H]; return what to add to x."""
        w = self.layers[layer]
        projected = product(self._normed(x, w.attn_norm, w.attn_norm_bias), w.in_proj)
        if w.in_bias is not None:
            projected += w.in_bias
        positions = self._positions[start : start + len(x)]
        out = product(w.mixer.mix(projected, kv.caches[layer], positions, start), w.out_proj)
        out = out if w.out_bias is None else out + w.out_bias
        return self._normed(out, w.sandwich.attention, dtype=torch.float32) if w.sandwich else out

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] → the experts' input [T, H], ids [T, k], weights [T, k] float32."""
        w = self.layers[layer]
        assert w.router is not None, f"layer {layer} has experts"
        normed = self._normed(x, w.ffn_norm, w.ffn_norm_bias, dtype=torch.float32)
        routed = rms_norm(x, None, self.config.stream_eps) if w.sandwich else normed
        logits = multiplied(stripe(routed), w.router[: self.config.experts].float().t())
        if w.router_offset is not None:
            logits += w.router_offset
        ids, weights = select(logits, self.config.moe.rule, w.router_bias, w.router_factors)
        return normed.to(self._dtype), ids, weights

    def shared(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """Output of the shared experts, from the experts' input [T, H], or from x [T, H] where they have a norm."""
        w = self.layers[layer]
        if w.resident_ffn is None:
            return None
        if w.sandwich:
            normed = self._normed(x, w.sandwich.shared_expert_in)
        out = self._resident(normed, w.resident_ffn)
        if w.router is None or not self.config.moe.shared_gated:
            return out
        return torch.sigmoid(multiplied(stripe(normed.float()), w.router[-1:].float().t())) * out

    def dense(self, layer: int, x: Tensor) -> Tensor:
        """Output of the feed-forward part of a layer without experts: what to add to x [T, H]."""
        w = self.layers[layer]
        assert w.resident_ffn is not None, f"layer {layer} has no experts"
        return self._resident(self._normed(x, w.ffn_norm, w.ffn_norm_bias), w.resident_ffn)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, V] float32; T is small."""
        out = torch.empty((len(x), self.config.vocab), device=self._device)
        self.logits_into(stripe(x).contiguous(), torch.empty_like(x), out)
        return out

    def logits_into(self, x: Tensor, normed: Tensor, out: Tensor, pdl: bool = False) -> None:
        """x [T, H] striped → out [T, V]; `normed` [T, H] is scratch."""
        normed_dense(
            x, self.final_norm, self.final_norm_bias, self.config.stream_eps, normed, self.head, out, self.head_bias,
            pdl, self.config.stream.logit_cap,
        )  # fmt: skip

    def _normed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [T, H] by its RMS norm, or LayerNorm, in one launch where torch's operations would be seven."""
        out = torch.empty_like(x, dtype=dtype or self._dtype)
        return norm_rope.rms_norm(x, weight, self.config.stream_eps, out, bias)

    def _resident(self, x: Tensor, part: Resident) -> Tensor:
        gate, up, down = ((part.records[0], form) for form in (part.layout.gate, part.layout.up, part.layout.down))
        return product(self.config.moe.glu(product(x, (gate,)), product(x, (up,))), (down,))


def normed_dense(
    x: Tensor, norm: Tensor, shift: Tensor | None, eps: float, normed: Tensor, parts: Sequence[Part], out: Tensor,
    bias: Tensor | None, pdl: bool, cap: float = 0.0,
) -> None:  # fmt: skip
    """kernels.gpu.gemv.dense of normed x [T, H]; a LayerNorm is a launch of its own, into `normed`."""
    if shift is None:
        gemv.dense(x, parts, out, norm=norm, eps=eps, bias=bias, cap=cap, pdl=pdl)
    else:
        norm_rope.rms_norm(x, norm, eps, normed, shift)
        gemv.dense(normed, parts, out, bias=bias, pdl=pdl)
