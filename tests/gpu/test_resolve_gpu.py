"""Ten thousand tokens of a real trace: the device evicts what the host's table evicts, in graphs of one token each.

OFFMOE_TRACES, .traces or ../shared/traces: the folder of gpt-oss-20b.npz (bench/gpu.sh insists on it).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paths import ROOT, SHARED

from offmoe.cache.policies.echo import Echo
from offmoe.cache.policy import make_policy
from offmoe.cache.residency import Residency
from offmoe.cache.trace import Trace
from offmoe.decode.device_table import device_table, pull, push, reach
from offmoe.kernels.gpu.foretell import foretell
from offmoe.kernels.gpu.launch import pdl_supported
from offmoe.kernels.gpu.resolve import candidates
from offmoe.kernels.gpu.route import Choice, Fetches, Router, RouterScratch, TokenState, predict, route
from offmoe.kernels.ring import COUNTED, COUNTERS
from offmoe.kernels.route import Rule

FOLDERS = [Path(f) for f in (os.environ.get("OFFMOE_TRACES"), ROOT / ".traces", SHARED / "traces") if f]
TRACE = next((f / "gpt-oss-20b.npz" for f in FOLDERS if (f / "gpt-oss-20b.npz").exists()), None)

pytestmark = [
    pytest.mark.skipif(TRACE is None, reason="gpt-oss-20b.npz is not here: set OFFMOE_TRACES"),
]
CUDA = torch.device("cuda")
FORMULA = f"{ROOT / 'tests/helpers/formula_policies.py'}:Signed"
TOKENS, SLOTS, HIDDEN, MOST, PREDICTED = 10_000, 8, 64, 2, 4
Guesses = NDArray[np.int16]


@pytest.fixture(scope="module")
def trace() -> Trace:
    assert TRACE is not None
    whole = Trace.load(TRACE)
    return Trace(whole.experts[:TOKENS], np.array([0, TOKENS]), whole.meta)


class Replayer:
    """The launches of one token's routing, its ids forced; counts of a token go into row `token` of `seen`."""

    def __init__(self, trace: Trace, residency: Residency, guesses: Guesses | None) -> None:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=CUDA)

        self.tokens, self.layers, self.k = trace.experts.shape
        experts, generator = residency.experts, torch.Generator(CUDA).manual_seed(1)
        self.table = device_table(residency, reach(residency, self.k, MOST if guesses is not None else 0), CUDA)
        self.scope = residency.scope
        self.forced = torch.from_numpy(trace.experts.astype(np.int16)).to(CUDA)
        self.guesses = None if guesses is None else torch.from_numpy(guesses).to(CUDA)
        self.x = torch.randn(HIDDEN, device=CUDA, generator=generator)
        self.router = torch.randn((experts, HIDDEN), device=CUDA, generator=generator)
        self.norm, self.normed = torch.ones(HIDDEN, device=CUDA), torch.zeros(HIDDEN, device=CUDA)
        self.logits, self.weights = torch.zeros(experts, device=CUDA), torch.zeros(self.k, device=CUDA)
        self.ids, self.slots, self.hit = ints(self.k), ints(self.k), ints(self.k)
        self.miss_records, self.miss_slots, self.miss_count = ints(self.k), ints(self.k), ints(self.layers)
        self.fetch_count = ints(self.layers, 1)
        self.fetch_records, self.fetch_slots = ints(self.layers, self.k), ints(self.layers, self.k)
        self.ticket, self.ahead_ticket, self.status, self.counters = ints(1), ints(1), ints(1), ints(COUNTED)
        self.log, self.step = ints(self.layers * self.k), ints(1) + 1  # steps count from 1
        self.seen, self.row = ints(self.tokens, self.layers), torch.zeros(1, dtype=torch.int64, device=CUDA)
        push(residency, self.table, 0)

    def find(self) -> None:
        t = self.table
        candidates(
            t.owner, t.arriving, t.a, t.b, t.decay, t.clock, t.candidates, kind=t.kind, scratch=t.scratch,
            foretold=t.foretold, worth=t.worth,
        )  # fmt: skip

    def token(self) -> None:
        if self.scope == "layer":
            self.find()
        for layer in range(self.layers):
            if self.scope == "global":
                self.find()
            self.route(layer)
            if self.guesses is not None and layer + 1 < self.layers:
                self.predict(layer + 1)
                self.table.landed.fill_(1)
        if self.table.past:
            foretell(self.table.past, self.log, self.status, k=self.k, experts=self.router.shape[0])
        self.seen.index_copy_(0, self.row, self.miss_count[None])
        self.row += 1
        self.step += 1
        self.table.clock[:1] += 1

    def route(self, layer: int) -> None:
        choice = Choice(
            self.ids,
            self.weights,
            self.slots,
            self.hit,
            self.miss_count[layer : layer + 1],
            self.miss_records,
            self.miss_slots,
        )
        route(
            self.x,
            self.chosen_by(),
            self.table,
            layer,
            choice,
            self.state(),
            RouterScratch(self.logits, self.ticket),
            layers=self.layers,
            normed=self.normed,
            fetched=None if self.guesses is None else self.fetches(layer),
            forced=self.forced,
            pdl=layer > 0 and self.scope == "layer" and self.guesses is None and pdl_supported(self.device()),
        )

    def predict(self, layer: int) -> None:
        predict(
            self.x,
            self.chosen_by(),
            self.table,
            layer,
            self.fetches(layer),
            self.state(),
            RouterScratch(self.logits, self.ahead_ticket),
            layers=self.layers,
            least=0.0,
            most=MOST,
            held=self.slots,
            emulated=self.guesses,
        )

    def chosen_by(self) -> Router:
        return Router(self.norm, 1e-6, self.router, Rule(top_k=self.k, renormalise=True))

    def state(self) -> TokenState:
        return TokenState(self.status, self.counters, self.log, self.step)

    def fetches(self, layer: int) -> Fetches:
        return Fetches(self.fetch_count[layer], self.fetch_records[layer], self.fetch_slots[layer])

    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def replay(self) -> NDArray[np.int32]:
        """All tokens; misses [tokens, layers]."""
        self.status.fill_(1)  # compiles, and changes nothing but what is set again below
        self.token()
        self.row.zero_()
        self.step.fill_(1)
        self.table.clock[:1] = 0
        self.table.landed.zero_()
        self.status.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.token()
        for _ in range(self.tokens):
            graph.replay()
        seen: NDArray[np.int32] = self.seen.cpu().numpy()
        return seen


def host_misses(residency: Residency, trace: Trace, guesses: Guesses | None) -> NDArray[np.int32]:
    """The same on the host; what is prefetched lands at once. lru counts layers, so it cannot take a token at once."""
    seen = np.zeros(trace.experts.shape[:2], np.int32)
    for now, token in enumerate(trace.experts):
        if residency.scope == "layer" and guesses is None and residency.policy.name != "lru":
            access = residency.access_token(token, now)
            residency.landed(access.slots[~access.hit])
            seen[now] = (~access.hit).reshape(seen.shape[1], -1).sum(1)
            continue
        for layer, experts in enumerate(token):
            access = residency.access(layer, experts, now)
            residency.landed(access.slots[~access.hit])
            seen[now, layer] = np.count_nonzero(~access.hit)
            if guesses is not None and layer + 1 < len(token):
                likely = guesses[now, layer + 1]
                residency.landed(residency.prefetch(layer + 1, likely[likely >= 0], now, MOST, access.slots)[1])
    return seen


def compare(policy: str, scope: str, trace: Trace, guesses: Guesses | None = None) -> tuple[Replayer, Residency]:
    """Same misses in every event, same table and same scores in the end, bit for bit."""
    make: Callable[[], Residency] = lambda: Residency(  # noqa: E731
        trace.meta["layers"], trace.meta["experts"], SLOTS * trace.meta["layers"],
        make_policy(policy, trace.records), scope,
    )  # fmt: skip
    host, mirror = make(), make()
    replayer = Replayer(trace, host, guesses)
    got = replayer.replay()
    want = host_misses(host, trace, guesses)
    differ = np.argwhere(got != want)
    assert not len(differ), f"{len(differ)} events differ, first at (token, layer) {differ[0]}"
    assert pull(mirror, replayer.table) == len(trace.experts)
    mirror.check()
    for name in ("owner", "slot_of", "prefetched"):
        assert (getattr(mirror, name) == getattr(host, name)).all(), name
    for name in host.policy.state:
        assert (getattr(mirror.policy, name) == getattr(host.policy, name)).all(), name
    if isinstance(host.policy, Echo) and isinstance(mirror.policy, Echo):
        assert (mirror.policy.rows == host.policy.rows).all()
        assert (mirror.policy.foretold == host.policy.foretell()).all()
    return replayer, host


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "crf:h=16", "echo", FORMULA])
def test_the_victims_of_ten_thousand_tokens(policy: str, scope: str, trace: Trace) -> None:
    compare(policy, scope, trace)


@pytest.mark.parametrize(("policy", "scope"), [("crf:h=16", "layer"), ("lru", "global")])
def test_the_prefetches_of_two_thousand_tokens(policy: str, scope: str, trace: Trace) -> None:
    """Two of the next layer's experts and two others are predicted."""
    rng = np.random.default_rng(2)
    short = Trace(trace.experts[:2000], np.array([0, 2000]), trace.meta)
    guesses = rng.integers(0, trace.meta["experts"], (*short.experts.shape[:2], PREDICTED)).astype(np.int16)
    guesses[..., :2] = short.experts[..., :2]
    for column in (2, 3):  # no expert is named twice
        twice = (guesses[..., column, None] == guesses[..., :column]).any(-1)
        guesses[..., column] = np.where(twice, -1, guesses[..., column])
    replayer, host = compare(policy, scope, short, guesses)
    counts = dict(zip(COUNTERS, replayer.counters.tolist(), strict=False))
    assert counts["covered"] > 0 == counts["late"]
    assert counts["wasted"] == host.wasted > 0
    assert counts["hits"] + counts["misses"] == short.experts.size
