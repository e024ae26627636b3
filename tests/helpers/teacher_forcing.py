"""Teacher-forced logits out of the captured graph, for tests on a GPU."""

from __future__ import annotations

import torch

from offmoe.engine import Engine
from offmoe.settings import Sampling


def graph_logits(engine: Engine, ids: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits after the prompt and after every token [1 + T, V]."""
    rows = [engine.prefill(ids).clone()]
    decoder, step = engine.decoder, engine.decoder.step
    step.buffers.set_sampling(Sampling(temperature=0.0), [], frozenset(), 1000)
    step.push(engine.store.clock, len(engine.kv.tokens))
    step.buffers.position += 1
    step.table.clock[0] += 1
    with engine.store.ram.service():
        for token in tokens:
            step.buffers.token.fill_(token)
            torch.cuda.synchronize()
            decoder._launch_ahead(0, 0, 1)
            torch.cuda.synchronize()
            rows.append(step.buffers.logits[0].clone())
    engine.store.clock = step.pull()
    return torch.stack(rows).cpu()
