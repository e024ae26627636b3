"""Static tensors of a decode step."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from offmoe.kernels.gpu.route import Choice, Fetches, RouterScratch, TokenState
from offmoe.kernels.gpu.sample import variant
from offmoe.kernels.ring import COUNTED
from offmoe.models.config import ModelConfig
from offmoe.settings import Sampling

MOST_EOS = 16


class StepBuffers:
    """Tensors that a captured graph reads and writes, except weights, slots, KV cache and residency table."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        c, moe = config, config.moe

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.x, self.normed, self.raw = floats(1, c.hidden), floats(1, c.hidden), floats(c.hidden)
        if c.norm.sandwich:  # what attention, the shared expert and the routed ones add, before norms
            self.given, self.shared_expert, self.added = floats(1, c.hidden), floats(1, c.hidden), floats(1, c.hidden)
            self.shared_expert_in = floats(1, c.hidden)
        # The last router logit and the last weight belong to the shared expert.
        self.router_logits, self.weights = floats(c.experts + 1), floats(c.top_k + 1)
        self.inner = floats(c.top_k, moe.expert_hidden)
        self.dense_inner, self.shared_inner = floats(1, moe.dense_hidden), floats(1, moe.shared_hidden)
        self.only, self.one = ints(1), floats(1) + 1  # slot 0 and weight 1: a feed-forward part that every token passes
        self.logits = floats(1, c.vocab)
        self.ids, self.slots, self.hit = ints(c.top_k), ints(c.top_k), ints(c.top_k)
        self.miss_count, self.miss_records, self.miss_slots = ints(1), ints(c.top_k), ints(c.top_k)
        self.sources = torch.zeros(c.top_k, dtype=torch.int64, device=device)
        self.log = ints(c.moe_layers * c.top_k)
        self.counters = ints(COUNTED)
        self.chosen, self.token, self.position, self.status = ints(1), ints(1), ints(1), ints(1)
        self.steps, self.remaining = ints(1), ints(1)
        self.fetch_count = ints(c.moe_layers, 1)
        self.fetch_records, self.fetch_slots = ints(c.moe_layers, c.top_k), ints(c.moe_layers, c.top_k)
        self.choice = Choice(
            self.ids, self.weights, self.slots, self.hit, self.miss_count, self.miss_records, self.miss_slots
        )
        self.token_state = TokenState(self.status, self.counters, self.log, self.steps)
        self.route_scratch = RouterScratch(self.router_logits, ints(1))
        self.predict_scratch = RouterScratch(floats(c.experts), ints(1))
        self.params, self.seed = floats(5), torch.zeros(1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(c.vocab, dtype=torch.uint8, device=device)
        self.eos = torch.full((MOST_EOS,), -2, dtype=torch.int32, device=device)

    def fetches(self, moe_layer: int) -> Fetches:
        """Return the list of records that prefetching brings for a MoE layer."""
        return Fetches(self.fetch_count[moe_layer], self.fetch_records[moe_layer], self.fetch_slots[moe_layer])

    def set_sampling(self, sampling: Sampling, ids: list[int], eos: frozenset[int], most: int) -> str:
        """Write the sampling parameters of an answer of at most `most` tokens; return the sampler's variant."""
        temperature, top_k = sampling.temperature or 0.0, sampling.top_k or 0
        top_p = 1.0 if sampling.top_p is None else sampling.top_p
        params = (temperature, top_k, top_p, sampling.min_p or 0.0, sampling.repeat_penalty or 1.0)
        self.params.copy_(torch.tensor(params))
        self.seed.fill_(sampling.seed if sampling.seed is not None else secrets.randbits(63))
        self.seen.zero_()
        if ids:
            self.seen[torch.tensor(sorted(set(ids)), device=self.seen.device)] = 1
        ends = torch.full((MOST_EOS,), -2, dtype=torch.int32)
        ends[: min(len(eos), MOST_EOS)] = torch.tensor(sorted(eos)[:MOST_EOS], dtype=torch.int32)
        self.eos.copy_(ends)
        self.remaining.fill_(most)
        return variant(temperature, top_k)
