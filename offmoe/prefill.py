"""The kernels of a prompt's chunk, compiled before there is a prompt: else the first one waits for each in turn."""

from __future__ import annotations

import torch

from offmoe.experts.vram_store import VramStore
from offmoe.kernels.gpu.launch import compiled_at_once
from offmoe.trunk.device_trunk import DeviceTrunk
from offmoe.trunk.kv_cache import KVCache

TOKENS = 16  # what is compiled does not depend on how many there are, but for the experts' tiles


@torch.inference_mode()
def compile_prompt_kernels(trunk: DeviceTrunk, store: VramStore, kv: KVCache) -> None:
    """Of a chunk that has tokens before it, all side by side; none runs, and nothing is changed."""
    config = trunk.config
    tokens = min(TOKENS, kv.ctx)
    start = min(kv.ctx - tokens, max(1, *config.windows))  # behind other tokens, and windows are full
    with kv.untouched(), compiled_at_once():
        x = trunk.embed(torch.zeros(tokens, dtype=torch.int64, device=store.device)).zero_()
        for layer in range(config.layers):
            trunk.attend(layer, x, kv, start)
            moe_layer = config.moe_layer_of(layer)
            if moe_layer is None:
                trunk.dense(layer, x)
            else:
                normed, ids, weights = trunk.route(layer, x)
                trunk.shared(layer, x, normed)
                store.compile(moe_layer, normed, ids, weights)
        trunk.logits(x[-1:])
