"""Questions that share beginnings, asked of one engine in many orders: each has the answer of a fresh start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.engine import Engine

GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


@dataclass(frozen=True)
class Answer:
    """Logits [V] after a prompt, the tokens that follow, and how many of the prompt's were reused."""

    logits: Tensor
    tokens: list[int]
    reused: int


def ask(engine: Engine, ids: Sequence[int], tokens: int, **sampling: Any) -> Answer:
    """Answer `ids` with at most `tokens` tokens."""
    seen, prefill = [], engine.forward.prefill
    engine.forward.prefill = lambda *given: seen.append(prefill(*given)) or seen[-1]  # type: ignore[method-assign]
    try:
        list(engine.generate(ids, max_tokens=tokens, **{**GREEDY, **sampling}))
    finally:
        engine.forward.prefill = prefill  # type: ignore[method-assign]
    (logits,) = seen
    return Answer(logits.clone(), engine.answer_tokens, engine.forward.reused)


def questions(ids: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """Beginnings of `ids`, and the same with other ends."""
    asked: list[list[int]] = []
    for at, length in enumerate(lengths):
        other = lengths[(at + 1) % len(lengths)]
        asked += [ids[:length], ids[: min(length, other)] + ids[-9:], ids[: length - 1] + ids[-20:]]
    return asked


def orders(count: int) -> Iterator[int]:
    """Indices of questions: each twice in a row, then all backwards."""
    for index in range(count):
        yield from (index, index)
    yield from reversed(range(count))


def check_asked_before(engine: Engine, asked: list[list[int]], tokens: int, exact: bool = True) -> list[int]:
    """Ask all in several orders, greedily and with a seed by turns; return how many tokens were reused each time.

    exact: logits are the same to the bit; otherwise tokens are, and logits nearly.
    """
    fresh: dict[tuple[int, bool], Answer] = {}
    for index, ids in enumerate(asked):
        for drawn in (False, True):
            engine.reset()
            fresh[index, drawn] = ask(engine, ids, tokens, **(DRAWN if drawn else {}))
            assert fresh[index, drawn].reused == 0
    reused = []
    for turn, index in enumerate(orders(len(asked))):
        drawn = turn % 3 == 1
        got, want = ask(engine, asked[index], tokens, **(DRAWN if drawn else {})), fresh[index, drawn]
        if exact:
            assert torch.equal(got.logits, want.logits), f"turn {turn}: {got.reused} of {len(asked[index])} reused"
        else:
            assert_close(f"turn {turn}", got.logits, want.logits, 1e-4)
        assert got.tokens == want.tokens, f"turn {turn}: {got.reused} of {len(asked[index])} reused"
        reused.append(got.reused)
    return reused
