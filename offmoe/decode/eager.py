"""Decoding without a GPU, one eager step a token: the reference implementation of Decoder (graph.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.sample import sample
from offmoe.settings import Sampling
from offmoe.stats.meter import Meter
from offmoe.trunk.kv_cache import KVCache

NAN = "the model answers with NaN: its weights are damaged, or --dtype is too narrow for them"


class EagerDecoder:
    """Decoder over `step(token)`, which runs one token after those in the KV cache and returns logits [V]."""

    floor_s: float | None = None  # not needed: the store measures its stalls

    def __init__(self, step: Callable[[int], Tensor], kv: KVCache, device: torch.device) -> None:
        self._step, self._kv, self._device = step, kv, device

    def tokens(
        self, logits: Tensor, ids: list[int], sampling: Sampling, eos: frozenset[int], meter: Meter
    ) -> Generator[int, None, None]:
        """Yield tokens until the caller stops; `logits` [V] are those after the prompt `ids`."""
        random = seeded(sampling.seed, self._device)
        history = list(ids)
        token = choose(logits, sampling, history, random)
        meter.first()
        while True:
            history.append(token)
            yield token
            began = time.perf_counter()
            token = choose(self._step(token), sampling, history, random)
            meter.stepped(time.perf_counter() - began, len(self._kv.tokens))

    def close(self) -> None:
        """Do nothing: no resources are held."""


@torch.inference_mode()
def choose(logits: Tensor, sampling: Sampling, history: list[int], random: torch.Generator) -> int:
    penalised = history if sampling.repeat_penalty != 1 else []
    top_p = 1.0 if sampling.top_p is None else sampling.top_p  # 0 keeps the likeliest
    token = int(sample(logits, sampling.temperature or 0.0, sampling.top_k or 0, top_p,
                       sampling.min_p or 0.0, sampling.repeat_penalty or 1.0, penalised, random))  # fmt: skip
    if logits[token].isnan():  # sampling picks a NaN anywhere as the likeliest
        raise OffmoeError(NAN)
    return token


def seeded(seed: int | None, device: torch.device) -> torch.Generator:
    """Return the random generator of one answer, reproducible if a seed is given."""
    random = torch.Generator(device)
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return random
