"""Sampling of the next token from logits: naive, torch only, any device, no host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLD = 1e-6  # scores divided by less could overflow


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    history: Tensor | Sequence[int],
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """logits [V] → id, int64 []; `history` [n]: the ids that `repeat_penalty` weakens.

    Penalty, temperature, top-k, top-p, min-p, in that order, as transformers applies them. Temperature 0
    (or below COLD) takes the largest, the first of equals. `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1
    are off. One generator state on one device gives one id; `uniforms` [V], a number in (0, 1) for every id, take its
    place where given. NaN in the logits is the caller's to find.
    """
    scores = penalised(logits.float(), history, repeat_penalty)
    if temperature < COLD:
        return scores.argmax()
    scores, ids = likeliest(scores / temperature, top_k)
    weights = kept(scores.softmax(0), top_p, min_p)
    # argmax of p / Exp(1) draws in proportion to p; torch.multinomial would wait for the device
    noise = torch.empty_like(weights).exponential_(generator=generator) if uniforms is None else -uniforms[ids].log()
    return ids[(weights / noise).argmax()]


def penalised(scores: Tensor, history: Tensor | Sequence[int], penalty: float) -> Tensor:
    """scores [V], those of ids in history [n] moved down: divided when positive, multiplied when negative."""
    if penalty == 1:
        return scores
    ids = torch.as_tensor(history, dtype=torch.int64, device=scores.device)
    seen = scores[ids]
    return scores.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def likeliest(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest of scores [V] (0: all), largest first, and their ids: [k], [k]."""
    if 0 < top_k < len(scores):
        return scores.topk(top_k)
    return scores.sort(descending=True, stable=True)


def kept(probabilities: Tensor, top_p: float, min_p: float) -> Tensor:
    """probabilities [k], largest first, with 0 for what top-p and min-p leave out. The first always stays."""
    if top_p == 1 and min_p == 0:
        return probabilities
    before = probabilities.cumsum(0) - probabilities
    keep = (before < top_p) & (probabilities >= min_p * probabilities[0])
    keep[0] = True
    return probabilities * keep


def uniforms(seed: int, step: int | Tensor, ids: Tensor) -> Tensor:
    """Return the uniforms that the GPU's sampler draws for `ids` [n] at a step, or steps [m, 1]: float32 in (0, 1).

    The first word of Philox 4x32-10 (Salmon et al., SC 2011), key `seed` (64 bits), counter (id, step, 0, 0).
    """
    word = 0xFFFFFFFF
    zero = torch.zeros_like(ids, dtype=torch.int64)
    c = [ids.long(), zero + (step & word), zero, zero]
    key = [seed & word, seed >> 32 & word]
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = product(0xD2511F53, c[0]), product(0xCD9E8D57, c[2])
        c = [high_2 ^ c[1] ^ key[0], low_2, high_0 ^ c[3] ^ key[1], low_0]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return ((c[0] >> 9).float() + 0.5) * 2.0**-23


def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · b, in int64 without overflow."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    middle = (low >> 16) + high
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
