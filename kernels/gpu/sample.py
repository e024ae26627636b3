"""Sampling of the next token on the GPU: the twin of kernels.sample, with its parameters in GPU memory too.

greedy and topk are one launch: every program keeps the best of its block as keys, which are ordered by score and then
by id; the last program joins them. full is a chain of torch's kernels around a sort, about twenty nodes. Random numbers
depend only on (seed, step, id): see `uniforms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offmoe.kernels.gpu.launch import dependent
from offmoe.kernels.sample import COLD

MOST = 64  # the largest top-k that a launch finds; larger ones are sorted for
BLOCK = 2048
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY = range(5)
GREEDY, TOPK, FULL = "greedy", "topk", "full"
_COLD = tl.constexpr(COLD)
_NOTHING = tl.constexpr(-(1 << 63))  # below every key
_NAN = tl.constexpr(0x7FFFFFFF)  # above the bits of infinity


@triton.jit
def scores_of(logits, seen, params, ids, inside):
    """Return the scores of `ids` after penalty and temperature; float32. TEMPERATURE … give the order of `params`.

    Parameters are loaded as tiles: the interpreter makes a float of a scalar's comparison.
    """
    temperature, penalty = tl.load(params + ids * 0), tl.load(params + 4 + ids * 0)
    x = tl.load(logits + ids, mask=inside, other=0.0).to(tl.float32)
    weak = tl.load(seen + ids, mask=inside & (penalty != 1.0), other=0) != 0
    x = tl.where(weak, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    return tl.where(temperature < _COLD, x, tl.div_rn(x, tl.maximum(temperature, _COLD)))


@triton.jit
def as_keys(x, ids, inside):
    """Return int64 keys: the score's order in the high word (NaN above all), the smaller id first in the low word."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(x != x, _NAN, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where(inside, (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64), _NOTHING)


@triton.jit
def from_keys(keys):
    """Return the scores and ids of keys."""
    order = (keys >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def uniform(seed, step, ids):
    """Return a random number in (0, 1) for each id, as offmoe.kernels.sample.uniforms."""
    zero = (ids * 0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, ids.to(tl.uint32), zero + step.to(tl.uint32), zero, zero)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def draw(keys, knobs, seed, step, KEEP: tl.constexpr):
    """Draw one of `keys` [KEEP], largest first: top-k, top-p, min-p, then argmax of p / Exp(1)."""
    rank = tl.arange(0, KEEP)
    temperature, top_k = tl.load(knobs + rank * 0), tl.load(knobs + 1 + rank * 0).to(tl.int32)
    top_p, min_p = tl.load(knobs + 2 + rank * 0), tl.load(knobs + 3 + rank * 0)
    scores, ids = from_keys(keys)
    inside = (keys != _NOTHING) & (rank < tl.where(temperature < _COLD, 1, top_k))
    scores = tl.where(inside, scores, -float("inf"))
    p = tl.exp(scores - tl.max(scores, 0))
    p = p / tl.sum(p, 0)
    before = tl.cumsum(p, 0) - p
    keep = ((top_p >= 1.0) | (before < top_p)) & (p >= min_p * tl.max(p, 0))
    weight = tl.where(inside & (keep | (rank == 0)), p / -tl.log(uniform(seed, step, ids)), -1.0)
    return tl.sum(tl.where(rank == tl.argmax(weight, 0), ids, 0), 0)


@triton.jit
def _sample(
    logits, knobs, seed, step, seen, status, best, ticket, out, vocab,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of the vocabulary, at most BLOCKS. KEEP: keys that a block contributes; 1 is greedy."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block, blocks = tl.program_id(0), tl.num_programs(0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    keys = as_keys(scores_of(logits, seen, knobs, ids, inside), ids, inside)
    kept = tl.arange(0, KEEP)
    if KEEP == 1:
        tl.store(best + block, tl.max(keys, 0))
    else:
        tl.store(best + block * KEEP + kept, tl.topk(keys, KEEP))
    tl.debug_barrier()  # all warps' stores come before the ticket
    if tl.atomic_add(ticket, 1, sem="acq_rel") != blocks - 1:
        return
    i = tl.arange(0, BLOCKS * KEEP)
    keys = tl.load(best + i, mask=i < blocks * KEEP, other=_NOTHING, cache_modifier=".cg")
    top = tl.max(keys, 0)
    if KEEP == 1:
        chosen = 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32)
    else:
        chosen = draw(tl.topk(keys, KEEP), knobs, tl.load(seed), tl.load(step), KEEP)
    chosen = tl.where((top >> 32).to(tl.int32) == _NAN, -1, chosen)
    tl.store(out, chosen.to(out.dtype.element_ty))
    tl.store(seen + tl.maximum(chosen, 0), 1, mask=(chosen >= 0) & (tl.load(status) == 0))
    tl.store(ticket, 0)


@triton.jit
def _scores(logits, knobs, seed, step, seen, scores, noise, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Store the scores and the Exp(1) noise of every id."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    tl.store(scores + ids, scores_of(logits, seen, knobs, ids, inside), mask=inside)
    tl.store(noise + ids, -tl.log(uniform(tl.load(seed), tl.load(step), ids)), mask=inside)


@dataclass(frozen=True)
class Scratch:
    """Buffers of the sampler; `ticket` is 0 between launches."""

    best: Tensor  # [blocks · MOST] int64
    ticket: Tensor  # [1] int32
    scores: Tensor  # [V]
    noise: Tensor  # [V]
    ranks: Tensor  # [V]: 0, 1, …

    @classmethod
    def of(cls, vocab: int, device: torch.device) -> Scratch:
        return cls(
            best=torch.zeros(triton.cdiv(vocab, BLOCK) * MOST, dtype=torch.int64, device=device),
            ticket=torch.zeros(1, dtype=torch.int32, device=device),
            scores=torch.zeros(vocab, device=device),
            noise=torch.zeros(vocab, device=device),
            ranks=torch.arange(vocab, device=device),
        )


def variant(temperature: float, top_k: int) -> str:
    """Return the sampling variant to capture for these parameters; other parameters may change between replays."""
    return GREEDY if temperature < COLD else TOPK if 1 <= top_k <= MOST else FULL


def params_of(
    temperature: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, device: torch.device
) -> Tensor:
    """Return the parameters [5] float32 in the order that `sample_step` reads them."""
    return torch.tensor([temperature, top_k, top_p, min_p, repeat_penalty], dtype=torch.float32, device=device)


def sample_step(
    logits: Tensor, params: Tensor, seed: Tensor, step: Tensor, seen: Tensor, status: Tensor, out: Tensor,
    scratch: Scratch, *, variant: str, pdl: bool = False, block: int = BLOCK,
) -> None:  # fmt: skip
    """Sample from logits [V] float32 into out [1]: an id, or -1 where a logit is NaN.

    params [5] from `params_of`; seed [1] int64 and step [1] key the random numbers; seen [V] uint8 is 1 for the ids
    that the penalty weakens, and becomes 1 for the chosen id while status [1] is 0.
    """
    vocab = logits.numel()
    blocks = triton.cdiv(vocab, block)
    if variant == FULL:
        _scores[(blocks,)](
            logits, params, seed, step, seen, scratch.scores, scratch.noise, vocab,
            BLOCK=block, num_warps=4, **dependent(pdl),
        )  # fmt: skip
        return sample_sorted(params, seen, status, out, scratch)
    keep = 1 if variant == GREEDY else MOST
    assert scratch.best.numel() >= blocks * keep
    _sample[(blocks,)](
        logits, params, seed, step, seen, status, scratch.best, scratch.ticket, out, vocab, BLOCK=block,
        BLOCKS=triton.next_power_of_2(blocks), KEEP=keep, num_warps=4 if keep == 1 else 16, **dependent(pdl),
    )  # fmt: skip
    return None


def sample_sorted(params: Tensor, seen: Tensor, status: Tensor, out: Tensor, scratch: Scratch) -> None:
    """Sample from scores and noise with any parameters. Allocations are in the graph's own memory pool.

    Every index is a tensor of one dimension: torch would read a tensor of none on the host.
    """
    temperature, top_k, top_p, min_p, _ = params.split(1)
    scores, ids = scratch.scores.sort(descending=True, stable=True)
    limit = torch.where(temperature < COLD, 1, top_k)
    p = scores.masked_fill((limit > 0) & (scratch.ranks >= limit), -torch.inf).softmax(0)
    keep = ((top_p >= 1) | (p.cumsum(0) - p < top_p)) & (p >= min_p * p[:1]) | (scratch.ranks == 0)
    best = (p * keep / scratch.noise.gather(0, ids)).argmax(0, keepdim=True)
    chosen = ids.gather(0, best)
    seen.scatter_(0, chosen, torch.where((status == 0) & ~scores[:1].isnan(), 1, seen.gather(0, chosen)).to(seen.dtype))
    out.copy_(torch.where(scores[:1].isnan(), -1, chosen))
