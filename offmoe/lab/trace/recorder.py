"""Records which experts a model chooses while it answers, into a Trace.

`with Recorder(engine) as recorder: …answers…; trace = recorder.trace()`. An answer is a sequence: its prompt, as far as
the KV cache did not hold it already, and its decoded tokens. A layer costs two appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmoe.cache.trace import Trace
from offmoe.decode.eager import EagerDecoder
from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.experts.store import Ints

Floats = NDArray[np.float16]
Pass = tuple[list[Ints], list[Tensor]]  # of every layer: ids [T, k], weights [T, k] or empty

TOGETHER = 8  # decoded tokens made into arrays at once: one by one, code and data gone cold, 0.3 ms of a token's 27


@dataclass
class Rows:
    """What was seen of a prompt, or of an answer: an array a forward pass, or a few passes together."""

    ids: list[Ints] = field(default_factory=list)  # [T, layers, k]
    probs: list[Floats] = field(default_factory=list)  # [T, layers, k]; fewer than ids where a decoder knows none
    states: list[Floats] = field(default_factory=list)  # [T, layers, H]
    fresh: list[Pass] = field(default_factory=list)  # as they came

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.ids) + sum(len(ids[0]) for ids, _ in self.fresh)

    def settle(self, dtype: type[np.integer[Any]]) -> None:
        """Make arrays of what is fresh."""
        if not self.fresh:
            return
        self.ids.append(np.concatenate([np.stack(ids, axis=1) for ids, _ in self.fresh]).astype(dtype))
        if all(len(weights) and len(weights[0]) for _, weights in self.fresh):
            shares = torch.cat([torch.stack(weights, dim=1) for _, weights in self.fresh])
            self.probs.append(shares.half().cpu().numpy())
        self.fresh.clear()


@dataclass
class Answer:
    """One sequence."""

    label: str
    prompt: Sequence[int]  # tokens of the prompt's rows
    answer: list[int]  # tokens of the decoded rows; the engine's own list, which grows
    prefill: Rows = field(default_factory=Rows)
    decoded: Rows = field(default_factory=Rows)


class Recorder:
    """Sees what `engine` routes while it is entered; nothing of it changes an answer.

    weights: keep the router's beside the ids, where the decoder knows them (the captured graph of a GPU does not).
    states: keep what the routers see too, float16, and take their logits from it. That graph does not show them, so
    each layer is launched from the host then: slower, with the same tokens but for rounding.
    """

    def __init__(self, engine: Engine, states: bool = False, weights: bool = True) -> None:
        self.engine, self.with_states, self.with_weights = engine, states, weights
        self.label = ""  # of the answers to come: their language or kind
        self.answers: list[Answer] = []
        config = engine.config
        self.dtype = np.uint8 if config.experts < 256 else np.uint16
        self._last = config.moe_layers - 1
        self._pass: Pass = [], []
        self._on_cpu = engine.plan.device.type == "cpu"
        self._states: list[Tensor] = []
        self._prompt: list[int] | None = None  # the engine's, of the present answer
        self._decoder = engine.decoder

    def __enter__(self) -> Recorder:
        if self.engine.store.routed is not None:
            raise OffmoeError("the engine is being recorded already: leave the first recorder before the second")
        self.engine.store.routed = self._routed
        if self.with_states:
            self.engine.forward.watch = self._seen
            if not self._on_cpu:
                self.engine.decoder = EagerDecoder(self.engine.step, self.engine.kv, self.engine.plan.device)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.engine.store.routed = self.engine.forward.watch = None
        self.engine.decoder = self._decoder

    @property
    def tokens(self) -> int:
        """Decoded so far."""
        return sum(answer.decoded.count for answer in self.answers)

    def trace(self, **meta: Any) -> Trace:
        """All answers of which something was decoded; `meta` is added to what the engine knows of itself.

        OffmoeError where there is none.
        """
        for answer in self.answers:
            answer.decoded.settle(self.dtype)
        kept = [answer for answer in self.answers if answer.decoded.ids]
        if not kept:
            raise OffmoeError("nothing was decoded, so there is no routing to keep: ask for at least 2 tokens")
        decoded, prefill = [answer.decoded for answer in kept], [answer.prefill for answer in kept]
        states = joined(decoded, "states")
        gates = self._gates() if self.with_states else None
        tokens = np.concatenate([answer.answer[: answer.decoded.count] for answer in kept]).astype(np.int32)
        told = len(tokens) == sum(rows.count for rows in decoded)  # not where someone called Engine.step
        prompts = [answer.prompt[: answer.prefill.count] for answer in kept]
        prompt_tokens = np.concatenate(prompts).astype(np.int32)
        return Trace(
            experts=np.concatenate([ids for rows in decoded for ids in rows.ids]),
            offsets=offsets(decoded),
            meta={
                **self._meta(),
                "classes": [answer.label for answer in kept],
                "pieces": self._pieces({*tokens.tolist(), *prompt_tokens.tolist()}),
                **meta,
            },
            probs=joined(decoded, "probs"),
            prefill=joined(prefill, "ids"),
            prefill_offsets=offsets(prefill) if any(rows.ids for rows in prefill) else None,
            prefill_probs=joined(prefill, "probs"),
            tokens=tokens if told else None,
            prefill_tokens=prompt_tokens if len(prompt_tokens) else None,
            states=states,
            logits=None if states is None or gates is None else logits_of(states, gates),
            gates=gates,
        )

    def _routed(self, layer: int, ids: Ints, weights: Tensor) -> None:
        if layer == 0:
            self._pass = [], []
        self._pass[0].append(ids)
        if self.with_weights:
            self._pass[1].append(weights)
        if layer == self._last:
            self._keep()

    def _seen(self, layer: int, x: Tensor) -> None:
        if layer == 0:
            self._states = []
        self._states.append(x)

    def _keep(self) -> None:
        """The pass is through all layers."""
        prompt = self.engine.store.prompt
        rows = self._prompt_rows(prompt) if prompt else self._current().decoded
        rows.fresh.append(self._pass)
        if prompt or len(rows.fresh) >= TOGETHER:
            rows.settle(self.dtype)
        if self.with_states and not prompt:
            rows.states.append(directions(torch.stack(self._states, dim=1)).cpu().numpy())

    def _prompt_rows(self, prompt: list[int]) -> Rows:
        """A prompt is one list while its chunks are run, so another list is another answer."""
        if prompt is not self._prompt:
            self._prompt = prompt
            self.answers.append(Answer(self.label, prompt, self.engine.answer_tokens))
        return self.answers[-1].prefill

    def _current(self) -> Answer:
        if not self.answers:  # entered in the middle of an answer
            self.answers.append(Answer(self.label, [], self.engine.answer_tokens))
        return self.answers[-1]

    def _meta(self) -> dict[str, Any]:
        config, plan = self.engine.config, self.engine.plan
        return {
            "model": self.engine.model.checkpoint.path.stem,
            "layers": config.moe_layers,
            "experts": config.experts,
            "top_k": config.top_k,
            "chunk": plan.chunk,
            "dtype": str(plan.dtype).removeprefix("torch."),
        }

    def _pieces(self, tokens: set[int]) -> dict[str, str]:
        """The text of every token that occurs, so that a trace can be read without its model."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return {}
        return {str(token): tokenizer.piece(token).decode("utf-8", "replace") for token in sorted(tokens)}

    def _gates(self) -> Floats:
        """[layers, experts, H] every router with its norm's weight."""
        weights = [self._read("router", i) * self._read("ffn_norm", i) for i in self.engine.config.routed]
        return torch.stack(weights).half().numpy()

    def _read(self, role: str, layer: int) -> Tensor:
        info = self.engine.model.find(role, layer)
        assert info is not None, f"{role} was there when the model was opened"
        return self.engine.model.checkpoint.tensor(info.name, torch.float32)


def joined(rows: list[Rows], name: str) -> Any:
    """One array of all rows, or None where a row has none of it."""
    parts = [array for some in rows for array in getattr(some, name)]
    return np.concatenate(parts) if parts and sum(map(len, parts)) == sum(some.count for some in rows) else None


def offsets(rows: list[Rows]) -> Ints:
    return np.cumsum([0, *(some.count for some in rows)])


def directions(x: Tensor) -> Tensor:
    """Residual streams [T, layers, H] ÷ their RMS, float16."""
    x = x.float()
    return (x * x.square().mean(-1, keepdim=True).rsqrt()).half()


def logits_of(states: Floats, gates: Floats) -> Floats:
    """[tokens, layers, H] and [layers, experts, H] → [tokens, layers, experts]."""
    return np.stack([states[:, i].astype(np.float32) @ gate.T.astype(np.float32) for i, gate in enumerate(gates)],
                    axis=1).astype(np.float16)  # fmt: skip
