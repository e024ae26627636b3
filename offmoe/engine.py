"""The engine: one model, one conversation, one answer at a time. Read this file first.

Loading places everything (`plan.py`): the trunk (attention, norms, routers, embedding) stays in fast memory; routed
experts are moved between slots, RAM and disk by an `ExpertStore`. Answering is two phases:

- prefill (`prefill.py`): the prompt's tokens that the KV cache does not hold, in chunks, layer by layer;
- decode (`decode/`): a token at a time, embed → per layer attention, router, experts → logits → sample; on a GPU as one
  captured CUDA graph (`decode/graph.py`), without one eagerly (`decode/eager.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from offmoe.checkpoint.base import Checkpoint
from offmoe.checkpoint.find_model import find_model
from offmoe.decode.eager import EagerDecoder
from offmoe.errors import ContextFull, OffmoeError
from offmoe.experts.host_store import HostStore
from offmoe.experts.store import ExpertStore
from offmoe.models.model import Model, open_model
from offmoe.one_answer import OneAnswer, Running
from offmoe.plan import Plan, make_plan, smaller
from offmoe.prefill import ForwardPass, block_of, compile_prompt_kernels
from offmoe.settings import SAMPLING_DEFAULTS, Sampling, Settings
from offmoe.stats.meter import Meter
from offmoe.stats.roof import Bounds
from offmoe.stats.stats import Stats
from offmoe.text.answer_parser import AnswerParser
from offmoe.text.arguments import listed, messages_of, token_ids
from offmoe.text.messages import Message, continues_answer
from offmoe.text.tokenizer import Tokenizer, load_tokenizer
from offmoe.trunk.host_trunk import Trunk
from offmoe.trunk.kv_cache import KVCache

if TYPE_CHECKING:
    from offmoe.decode.graph import Decoder
    from offmoe.experts.vram_store import VramStore
    from offmoe.trunk.device_trunk import DeviceTrunk

Prompt = str | Sequence[Message] | Sequence[int]
Progress = Callable[[str, int, int], None]  # name of the phase, units done, units in all


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it completes (possibly none)."""

    text: str
    token: int | None  # None: more text of the previous token, or text that was held back until the end
    reasoning: bool = False  # the text belongs to the model's reasoning, not to its answer


@dataclass
class Flag:
    """Whether an answer was cancelled."""

    on: bool = False


class Engine:
    """A loaded model with the KV cache of one conversation; generates one answer at a time. A context manager."""

    def __init__(self, model: Model, settings: Settings, progress: Progress = lambda *_: None) -> None:
        self.model, self.config = model, model.config
        self.plan: Plan = make_plan(model, settings)
        self.sampling = sampling_defaults(model.checkpoint)
        self.tokenizer: Tokenizer | None = None
        self.answer_tokens: list[int] = []  # tokens of the last answer
        self.answer_is_plain = True  # answer_tokens hold the answer's text alone: no reasoning, no markers around it
        self._one = OneAnswer()
        self._cancelled = Flag()  # of the answer under way, or of the one that comes next
        self._parser: AnswerParser | None = None
        self._encoding = threading.Lock()  # the template's process renders one conversation at a time
        self._meter: Meter | None = None
        self._bounds = Bounds(self.plan.device, model.checkpoint.files[0])
        self.notes: list[str] = []  # remarks on loading, to be shown to the user
        while True:
            try:
                self._build(progress)
                break
            except torch.OutOfMemoryError:  # libraries and fragmentation took more than the plan's margin
                before, self.plan = self.plan, smaller(self.plan, model)
                self.notes = [f"the GPU's memory holds no {before.slots} slots: {self.plan.slots} are used"]

    def _build(self, progress: Progress) -> None:
        """Allocate memory and read everything that the first answer needs."""
        model, plan = self.model, self.plan
        with ExitStack() as on_error:
            store, trunk = backend(plan)
            self.store: ExpertStore = store(model, plan)
            on_error.callback(self.store.close)
            self.trunk: Trunk | DeviceTrunk = trunk(model, plan.device, plan.dtype, plan.ctx)
            self.trunk.load_layers(lambda done, total: progress("weights", done, total))
            int8 = plan.kv == "int8"
            self.kv = KVCache(model.config, plan.ctx, plan.device, plan.kv_dtype, int8, block_of(plan))
            self.forward = ForwardPass(plan, self.trunk, self.store, self.kv)
            if plan.all_in_slots:
                self.store.preload(lambda done, total: progress("experts", done, total))
            elif plan.ram_rows >= model.records:
                self.store.ram.fill()  # in the background: an answer can begin as soon as the trunk is there
            self.decoder = self._make_decoder(progress)
            on_error.callback(self.decoder.close)
            on_error.pop_all()

    @classmethod
    def load(
        cls,
        model: str,
        progress: Progress = lambda *_: None,
        think: str | None = None,
        settings: Settings | None = None,
        **fields: Any,
    ) -> Engine:
        """Open `model` and read it; `settings`, or fields of Settings by name; `think` as for `Engine.think`.

        Raises OffmoeError.
        """
        chosen = settings or Settings.of(**fields)
        opened = open_model(find_model(model))
        with ExitStack() as on_error:
            on_error.callback(opened.checkpoint.close)
            tokenizer = load_tokenizer(opened.checkpoint)  # its errors come before minutes of reading weights
            on_error.callback(tokenizer.close)
            if think is not None:
                tokenizer.think(think)
            engine = cls(opened, chosen, progress)
            on_error.pop_all()
            on_error.callback(engine.close)
            engine.tokenizer = tokenizer
            engine.notes += tokenizer.notes
            on_error.pop_all()
        return engine

    def generate(self, prompt: Prompt, sampling: Sampling | None = None, **fields: Any) -> Running[Piece]:
        """Generate an answer to `prompt`; yield one Piece per token. `close()` of what is returned ends it early.

        A str is one user message and goes through the model's chat template (or is used as it is where the model has
        none); a sequence of messages (`role`, `content`, and for earlier answers `reasoning` or `tokens`) is a
        conversation, and if its last message is the assistant's, the answer continues that; a sequence of ints is
        token ids. `fields` are fields of Sampling. What the KV cache already holds of the prompt is not run again.
        Raises ContextFull if the prompt does not fit the context, and OffmoeError while an answer of this engine is
        under way: it has begun, is not finished, and was not cancelled.
        """
        self._one.check()
        submitted = time.perf_counter()
        if sampling is not None and not isinstance(sampling, Sampling):
            kind = type(sampling).__name__
            raise OffmoeError(f"sampling is of type {kind}: expected a Sampling, or its fields by name")
        chosen = Sampling.of(**fields).merged(sampling or Sampling()).merged(self.sampling)
        ids = self.prompt_ids(prompt)
        if len(ids) >= self.plan.ctx:
            raise ContextFull(len(ids), self.plan.ctx, turns_of(prompt))
        self._cancelled = cancelled = Flag()
        self.answer_tokens, self.answer_is_plain, self._parser = [], True, None
        continues = continues_answer(prompt)
        return self._one.answer(lambda: self._answer(ids, chosen, submitted, continues, cancelled))

    @property
    def answer_in_reasoning(self) -> bool:
        """Whether the last answer ended before its reasoning did, which a template may have opened: there is no answer
        then but reasoning."""
        return self._parser is not None and self._parser.in_reasoning

    def stats(self) -> Stats:
        """Return the statistics of the last answer. The first call measures bandwidths for the roof."""
        self._one.check_open()
        if self._meter is None:
            raise OffmoeError("there are no statistics yet: generate an answer first")
        if self._meter.steps and not self._one.busy:
            with self._one.alone():
                self._meter.floored(self.decoder.floor_s)
        used = self.plan.real_slot_bytes / self.plan.slots
        cost = self._meter.cost(self.plan, self.trunk.nbytes, used)
        return self._meter.stats(self.plan, self._bounds.roof(cost) if cost else None)

    def loading(self) -> str | None:
        """Describe what is still being read in the background, or return None if everything is loaded."""
        self._one.check_open()
        done, total = (0, 0) if self.plan.all_in_slots else self.store.ram.loaded()
        return f"{done:,} of {total:,} experts read: until all are, answers wait for the disk" if done < total else None

    def cancel(self) -> None:
        """End the answer under way after the current step. May be called from a signal handler or another thread."""
        self._cancelled.on = True
        self._one.cancel()

    def paused(self, seconds: float) -> None:
        """Leave out of the running answer's statistics `seconds` in which the process was suspended."""
        if self._meter is not None:
            self._meter.pause(seconds)

    def reset(self) -> None:
        """Forget the conversation; the experts stay where they are."""
        with self._one.alone():
            self.kv.reuse([])

    def close(self) -> None:
        """Release files, threads, processes and memory; an answer under way is ended first, in whatever thread.

        Closing twice does nothing. Everything else but `cancel` raises OffmoeError from now on.
        """
        with self._one.close(self.cancel) as first, self._encoding, ExitStack() as each:
            if first:
                for part in (self.tokenizer, self.model.checkpoint, self.store, self.decoder):
                    if part is not None:
                        each.callback(part.close)  # the last is closed first; all are, even if one fails

    def __enter__(self) -> Engine:
        self._one.check_open()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of `prompt`: at least one, all inside the vocabulary. Raises OffmoeError."""
        self._one.check_open()
        values = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else listed(prompt)
        ids = token_ids(values)
        if ids is None and self.tokenizer is None:
            raise OffmoeError(f"{self.model.checkpoint.path} has no tokenizer: give token ids")
        if ids is None and self.tokenizer is not None:
            with self._encoding:
                self._one.check_open()
                if isinstance(prompt, str) and self.tokenizer.chat_template is None:
                    ids = self.tokenizer.encode(prompt, control_tokens=False)
                else:
                    ids = self.tokenizer.encode_chat(cast("list[Message]", messages_of(values)))
        if not ids:
            raise OffmoeError("the prompt is empty: write something")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab:
            raise OffmoeError(f"a token id lies outside the model's vocabulary of {self.config.vocab}")
        return ids

    @property
    def prompt_notes(self) -> list[str]:
        """Remarks on the last conversation, to be shown to the user: messages that the chat template left out."""
        return self.tokenizer.prompt_notes if self.tokenizer else []

    def think(self, value: str | None) -> None:
        """Set whether, or how much, the model reasons before it answers; see Tokenizer.think."""
        self._one.check_open()
        if self.tokenizer is None:
            raise OffmoeError(f"{self.model.checkpoint.path} has no tokenizer: nothing tells it how much to think")
        with self._encoding:
            self.tokenizer.think(value)

    def prefill(self, ids: list[int]) -> Tensor:
        """Run the part of `ids` that the KV cache does not hold; return logits [V] float32 after the last token.

        Raises ContextFull.
        """
        with self._one.alone():
            self._cancelled = cancelled = Flag()
            return self.forward.prefill(ids, lambda: cancelled.on)

    def step(self, token: int) -> Tensor:
        """Run one token, eagerly; return logits [V] float32 after it."""
        with self._one.alone():
            return self.forward.step(token)

    def _answer(
        self, ids: list[int], sampling: Sampling, submitted: float, continues: bool, cancelled: Flag
    ) -> Iterator[Piece]:
        self._cancelled = cancelled
        self.answer_tokens, self.answer_is_plain, self._parser = [], True, None
        self._meter = meter = Meter(self.store, submitted, len(ids))
        logits = self._prefill_metered(ids, meter, cancelled)
        if cancelled.on:
            return
        parser = self.tokenizer.answer_parser(ids, sampling.stop, continues) if self.tokenizer else None
        self._parser = parser
        eos = self.tokenizer.eos if self.tokenizer else frozenset()
        with closing(self.decoder.tokens(logits, ids, sampling, frozenset(eos), meter)) as tokens:
            for token in tokens:
                if token in eos:
                    meter.finish_reason = "stop"
                    break
                if cancelled.on:
                    break
                self.answer_tokens.append(token)
                meter.tokens += 1
                completed = list(pieces(parser, token))
                reason = self._finished(parser is not None and parser.stopped, sampling, meter)
                if reason:  # said before the last text, behind which a reader may close
                    meter.finish_reason = reason
                yield from completed
                if reason or cancelled.on:
                    break
        if parser:
            for reasoning, text in parser.flush():
                yield Piece(text, None, reasoning)
            self.answer_is_plain = parser.saw_no_marker

    def _prefill_metered(self, ids: list[int], meter: Meter, cancelled: Flag) -> Tensor:
        began = time.perf_counter()
        logits = self.forward.prefill(ids, lambda: cancelled.on)
        meter.reused_tokens = self.forward.reused
        meter.prefilled(began)
        return logits

    def _make_decoder(self, progress: Progress) -> EagerDecoder | Decoder:
        if self.plan.device.type == "cpu":
            return EagerDecoder(self.forward.step, self.kv, self.plan.device)
        from offmoe.decode.graph import Decoder  # imports triton

        trunk, store = cast("DeviceTrunk", self.trunk), cast("VramStore", self.store)
        progress("kernels", 0, 1)  # the first start on a machine compiles them: half a minute
        compile_prompt_kernels(trunk, store, self.kv)
        decoder = Decoder(self.plan, trunk, store, self.kv)
        progress("kernels", 1, 1)
        return decoder

    def _finished(self, stopped: bool, sampling: Sampling, meter: Meter) -> str | None:
        """Return the finish reason if the answer ends after the current token, else None."""
        if stopped:
            return "stop"
        if sampling.max_tokens is not None and meter.tokens >= sampling.max_tokens:
            return "length"
        return "context" if len(self.kv.tokens) >= self.plan.ctx else None


def pieces(parser: AnswerParser | None, token: int) -> Iterator[Piece]:
    """Yield the pieces of text that `token` completes; the first one carries the token itself."""
    parts = parser.push(token) if parser else []
    for index, (reasoning, text) in enumerate(parts or [(bool(parser and parser.in_reasoning), "")]):
        yield Piece(text, None if index else token, reasoning)


def turns_of(prompt: Prompt) -> int:
    """Return how many messages of the user are in `prompt`."""
    if isinstance(prompt, str):
        return 1
    return sum(isinstance(message, Mapping) and message.get("role") == "user" for message in prompt)


def sampling_defaults(checkpoint: Checkpoint) -> Sampling:
    """Return the model's own defaults (`generation_config.json`), completed by offmoe's."""
    own = checkpoint.json("generation_config.json") or {}
    named = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip
    values = {ours: own[theirs] for theirs, ours in named.items() if own.get(theirs) is not None}
    try:
        return Sampling.of(**values).merged(SAMPLING_DEFAULTS)
    except OffmoeError as error:
        raise OffmoeError(f"{checkpoint.path}/generation_config.json: {error}") from None


def backend(plan: Plan) -> tuple[type[ExpertStore], type[Trunk] | type[DeviceTrunk]]:
    """Return the classes that hold the experts and all other weights on the plan's device."""
    if plan.device.type == "cpu":
        return HostStore, Trunk
    from offmoe.experts.vram_store import VramStore
    from offmoe.trunk.device_trunk import DeviceTrunk

    return VramStore, DeviceTrunk
