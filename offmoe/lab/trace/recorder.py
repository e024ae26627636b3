"""Record the experts that a model uses while it answers, into a Trace.

`with Recorder(engine) as recorder: …answers…; trace = recorder.trace()`. An answer is one sequence: the part of its
prompt that was not in the KV cache, and its decoded tokens. Recording costs two appends per layer.
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
Pass = tuple[list[Ints], list[Tensor]]  # for every layer: ids [T, k], weights [T, k] or empty
BATCH = 8  # decoded tokens converted to arrays at once: one at a time takes 0.3 ms of a token's 27, with cold caches


@dataclass
class Rows:
    """Recorded rows of a prompt or of an answer: one array per forward pass, or per few passes."""

    ids: list[Ints] = field(default_factory=list)  # [T, layers, k]
    probs: list[Floats] = field(default_factory=list)  # [T, layers, k]; missing if the decoder does not know them
    states: list[Floats] = field(default_factory=list)  # [T, layers, H]
    pending: list[Pass] = field(default_factory=list)  # passes not converted yet

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.ids) + sum(len(ids[0]) for ids, _ in self.pending)

    def flush(self, dtype: type[np.integer[Any]]) -> None:
        """Convert the pending passes to arrays."""
        if not self.pending:
            return
        self.ids.append(np.concatenate([np.stack(ids, axis=1) for ids, _ in self.pending]).astype(dtype))
        if all(len(weights) and len(weights[0]) for _, weights in self.pending):
            shares = torch.cat([torch.stack(weights, dim=1) for _, weights in self.pending])
            self.probs.append(shares.half().cpu().numpy())
        self.pending.clear()


@dataclass
class Answer:
    """One sequence."""

    label: str
    prompt: Sequence[int]  # token ids of the prompt's rows
    answer: list[int]  # token ids of the decoded rows; the engine's own list, which grows
    prefill: Rows = field(default_factory=Rows)
    decoded: Rows = field(default_factory=Rows)


class Recorder:
    """A context manager that records the routing of `engine`; it does not change any answer.

    `weights`: also record the router's weights, where the decoder knows them (a captured CUDA graph does not).
    `states`: also record the routers' inputs, float16, and compute their logits from these. A captured graph does not
    expose them, so each layer is launched from the host: slower, with the same tokens except for rounding.
    """

    def __init__(self, engine: Engine, states: bool = False, weights: bool = True) -> None:
        self.engine, self.with_states, self.with_weights = engine, states, weights
        self.label = ""  # language or kind of the next answers
        self.answers: list[Answer] = []
        config = engine.config
        self.dtype = np.uint8 if config.experts < 256 else np.uint16
        self._last_layer = config.moe_layers - 1
        self._pass: Pass = [], []
        self._on_cpu = engine.plan.device.type == "cpu"
        self._states: list[Tensor] = []
        self._prompt: list[int] | None = None  # the engine's list for the current answer
        self._decoder = engine.decoder

    def __enter__(self) -> Recorder:
        if self.engine.store.routed is not None:
            raise OffmoeError(
                "the engine is already being recorded: exit the first recorder before entering a second one"
            )
        self.engine.store.routed = self._on_routed
        if self.with_states:
            self.engine.forward.watch = self._on_states
            if not self._on_cpu:
                self.engine.decoder = EagerDecoder(self.engine.forward.step, self.engine.kv, self.engine.plan.device)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.engine.store.routed = self.engine.forward.watch = None
        self.engine.decoder = self._decoder

    @property
    def tokens(self) -> int:
        """Number of tokens decoded so far."""
        return sum(answer.decoded.count for answer in self.answers)

    def trace(self, **meta: Any) -> Trace:
        """Return all answers with decoded tokens; `meta` is added to the metadata of the engine.

        Raises OffmoeError if there is none.
        """
        for answer in self.answers:
            answer.decoded.flush(self.dtype)
        answered = [answer for answer in self.answers if answer.decoded.ids]
        if not answered:
            raise OffmoeError("nothing was decoded, so there is no routing to save: ask for at least 2 tokens")
        decoded, prefill = [answer.decoded for answer in answered], [answer.prefill for answer in answered]
        states = concatenate(decoded, "states")
        gates = self._gates() if self.with_states else None
        tokens = np.concatenate([answer.answer[: answer.decoded.count] for answer in answered]).astype(np.int32)
        complete = len(tokens) == sum(rows.count for rows in decoded)  # False if Engine.step was called directly
        prompts = [answer.prompt[: answer.prefill.count] for answer in answered]
        prompt_tokens = np.concatenate(prompts).astype(np.int32)
        return Trace(
            experts=np.concatenate([ids for rows in decoded for ids in rows.ids]),
            offsets=offsets(decoded),
            meta={
                **self._meta(),
                "classes": [answer.label for answer in answered],
                "pieces": self._pieces({*tokens.tolist(), *prompt_tokens.tolist()}),
                **meta,
            },
            probs=concatenate(decoded, "probs"),
            prefill=concatenate(prefill, "ids"),
            prefill_offsets=offsets(prefill) if any(rows.ids for rows in prefill) else None,
            prefill_probs=concatenate(prefill, "probs"),
            tokens=tokens if complete else None,
            prefill_tokens=prompt_tokens if len(prompt_tokens) else None,
            states=states,
            logits=None if states is None or gates is None else logits_of(states, gates),
            gates=gates,
        )

    def _on_routed(self, layer: int, ids: Ints, weights: Tensor) -> None:
        if layer == 0:
            self._pass = [], []
        self._pass[0].append(ids)
        if self.with_weights:
            self._pass[1].append(weights)
        if layer == self._last_layer:
            self._end_pass()

    def _on_states(self, layer: int, x: Tensor) -> None:
        if layer == 0:
            self._states = []
        self._states.append(x)

    def _end_pass(self) -> None:
        """Store the rows of a forward pass, which has gone through all layers."""
        prompt = self.engine.store.prompt
        rows = self._prompt_rows(prompt) if prompt else self._current().decoded
        rows.pending.append(self._pass)
        if prompt or len(rows.pending) >= BATCH:
            rows.flush(self.dtype)
        if self.with_states and not prompt:
            rows.states.append(directions(torch.stack(self._states, dim=1)).cpu().numpy())

    def _prompt_rows(self, prompt: list[int]) -> Rows:
        """Return the rows of a prompt.

        All chunks of a prompt share one list object, so another list is another answer.
        """
        if prompt is not self._prompt:
            self._prompt = prompt
            self.answers.append(Answer(self.label, prompt, self.engine.answer_tokens))
        return self.answers[-1].prefill

    def _current(self) -> Answer:
        if not self.answers:  # the recorder was entered in the middle of an answer
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
        """Return the text of every token that occurs, so that a trace can be read without its model."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return {}
        return {str(token): tokenizer.token_bytes(token).decode("utf-8", "replace") for token in sorted(tokens)}

    def _gates(self) -> Floats:
        """Return every router, multiplied by its norm's weight: [layers, experts, H]."""
        weights = [self._read("router", i) * self._read("ffn_norm", i) for i in self.engine.config.routed]
        return torch.stack(weights).half().numpy()

    def _read(self, role: str, layer: int) -> Tensor:
        info = self.engine.model.find(role, layer)
        assert info is not None, f"{role} was there when the model was opened"
        return self.engine.model.checkpoint.tensor(info.name, torch.float32)


def concatenate(rows: list[Rows], name: str) -> Any:
    """Return one array of all rows, or None if a row has none of it."""
    parts = [array for part in rows for array in getattr(part, name)]
    return np.concatenate(parts) if parts and sum(map(len, parts)) == sum(part.count for part in rows) else None


def offsets(rows: list[Rows]) -> Ints:
    return np.cumsum([0, *(part.count for part in rows)])


def directions(x: Tensor) -> Tensor:
    """Return residual streams [T, layers, H] divided by their RMS, float16."""
    x = x.float()
    return (x * x.square().mean(-1, keepdim=True).rsqrt()).half()


def logits_of(states: Floats, gates: Floats) -> Floats:
    """Compute logits [tokens, layers, experts] from states [tokens, layers, H] and gates [layers, experts, H]."""
    return np.stack(
        [states[:, i].astype(np.float32) @ gate.T.astype(np.float32) for i, gate in enumerate(gates)], axis=1
    ).astype(np.float16)
