"""The mixers of a decode step: a layer's part before its experts.

Norm and in_proj → the mixer's own launches → out_proj, added to x; one node more where a norm stands behind out_proj.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offmoe.decode.buffers import StepBuffers
from offmoe.kernels.gpu import gemv, sandwich
from offmoe.mixers.protocols import StepTensors
from offmoe.trunk.device_trunk import DeviceTrunk, normed_dense
from offmoe.trunk.kv_cache import KVCache


class MixingStep:
    """Launches of one token over static buffers, which it holds: a captured graph keeps no tensor alive."""

    def __init__(self, trunk: DeviceTrunk, kv: KVCache, buffers: StepBuffers, sms: int, pdl: bool) -> None:
        self.config, self.trunk, self.kv, self.buffers = trunk.config, trunk, kv, buffers
        device, kinds = buffers.x.device, self.config.kinds
        self.projected = torch.zeros((1, max(mixer.projected for mixer in kinds)), device=device)
        self.mixed = torch.zeros((1, max(mixer.mixed for mixer in kinds)), device=device)
        scratch = largest_scratch(trunk, kv.ctx, sms)
        self.step = StepTensors(buffers.position, buffers.status, scratch, kv.ctx, sms, pdl)

    def launch(self, layer: int) -> None:
        """x += the output of the layer's mixer."""
        b, c, w, pdl = self.buffers, self.config, self.trunk.layers[layer], self.step.pdl
        mixer = c.mixers[layer]
        projected, mixed = self.projected[:, : mixer.projected], self.mixed[:, : mixer.mixed]
        normed_dense(
            b.x, w.attn_norm_striped, w.attn_norm_bias_striped, c.stream_eps, b.normed, w.in_proj, projected,
            w.in_bias, pdl and layer > 0,
        )  # fmt: skip
        w.mixer.launch(projected, mixed, self.kv.caches[layer], self.step)
        out = b.given if w.sandwich else b.x
        gemv.dense(mixed, w.out_proj, out, bias=w.out_bias, residual=True, pdl=pdl)
        if w.sandwich_striped:
            sandwich.attended(
                b.x, b.given, w.sandwich_striped, c.stream_eps, b.shared_expert_in, b.shared_expert, b.added, pdl
            )


def largest_scratch(trunk: DeviceTrunk, ctx: int, sms: int) -> dict[str, Tensor]:
    """Scratch of all layers' mixers: of each name, as large as the largest."""
    device, sizes, types = trunk.embedding[0].device, dict[str, int](), dict[str, torch.dtype]()
    for layer in trunk.layers:
        for name, (size, dtype) in layer.mixer.scratch(ctx, sms, device).items():
            sizes[name], types[name] = max(size, sizes.get(name, 0)), dtype
    return {name: torch.zeros(size, dtype=types[name], device=device) for name, size in sizes.items()}
