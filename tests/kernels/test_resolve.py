"""Residency on the device chooses what the host's table chooses: the same victims, tables and scores, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from exhaustive import cases
from synthetic_traces import synthetic
from tolerance import assert_close

pytest.importorskip("triton")

import formula_policies
import triton
import triton.language as tl

from offmoe.cache.policies.echo import Echo
from offmoe.cache.policies.formula import Formula
from offmoe.cache.policy import Policy, make_policy
from offmoe.cache.residency import Residency
from offmoe.decode.device_formula import device_formula
from offmoe.decode.device_table import device_table, lose, pull, push, reach
from offmoe.errors import OffmoeError
from offmoe.kernels.gpu.foretell import foretell, popcount
from offmoe.kernels.gpu.resolve import candidates, evaluate
from offmoe.kernels.gpu.route import predict, route
from offmoe.kernels.gpu.table import Table
from offmoe.kernels.ring import COUNTED, COUNTERS
from offmoe.kernels.route import Rule, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIGNED = f"{formula_policies.HERE}:Signed,h=3"
POLICIES = ("lru", "lfu", "lfru", "crf:h=3", "echo:h=3,w=16", pytest.param(SIGNED, id="formula"))
HIDDEN = 16


@dataclass
class Device:
    """One mirror with everything else that the kernels want; the ids are forced, the router's only run."""

    table: Table
    layers: int
    experts: int
    k: int
    forced: torch.Tensor

    def __post_init__(self) -> None:
        def ints(*shape: int) -> torch.Tensor:
            return torch.full(shape, -7, dtype=torch.int32, device=DEVICE)

        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(HIDDEN, generator=generator).to(DEVICE)
        self.norm = torch.rand(HIDDEN, generator=generator).to(DEVICE)
        self.router = torch.randn((self.experts, HIDDEN), generator=generator).to(DEVICE)
        self.logits, self.normed = torch.zeros(self.experts, device=DEVICE), torch.zeros(HIDDEN, device=DEVICE)
        self.ids, self.slots, self.hit = ints(self.k), ints(self.k), ints(self.k)
        self.miss_records, self.miss_slots, self.miss_count = ints(self.k), ints(self.k), ints(1)
        self.fetch_records, self.fetch_slots = ints(self.layers, self.k), ints(self.layers, self.k)
        self.fetch_count = torch.zeros((self.layers, 1), dtype=torch.int32, device=DEVICE)
        self.weights = torch.zeros(self.k, device=DEVICE)
        self.log = ints(self.layers * self.k)
        self.ticket, self.status, self.step, self.counters = (
            torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (1, 1, 1, COUNTED)
        )

    def find(self) -> None:
        t = self.table
        candidates(t.owner, t.arriving, t.a, t.b, t.decay, t.clock, t.candidates, kind=t.kind, foretold=t.foretold,
                   worth=t.worth)  # fmt: skip

    def foretell(self) -> None:
        """When all layers are routed."""
        if self.table.past:
            foretell(self.table.past, self.log, self.status, k=self.k, experts=self.experts)

    def route(self, layer: int, **more: Any) -> None:
        route(
            self.x, self.norm, 1e-6, self.router, self.table, layer, layers=self.layers,
            logits=self.logits, normed=self.normed, ticket=self.ticket, ids=self.ids,
            weights=self.weights, slots=self.slots, hit=self.hit, miss_count=self.miss_count,
            miss_records=self.miss_records, miss_slots=self.miss_slots, status=self.status, counters=self.counters,
            log=self.log, step=self.step,
            **{"rule": Rule(top_k=self.k, renormalise=True), "forced": self.forced, "units": 2, **more},
        )  # fmt: skip

    def predict(
        self, layer: int, predicted: torch.Tensor | None, most: int, held: torch.Tensor, least: float = 0.0,
        **more: Any,
    ) -> None:  # fmt: skip
        predict(
            self.x, self.norm, 1e-6, self.router, self.table, layer, layers=self.layers,
            least=least,
            most=most, logits=self.logits, ticket=self.ticket, held=held, fetch_count=self.fetch_count[layer],
            fetch_records=self.fetch_records[layer], fetch_slots=self.fetch_slots[layer], status=self.status,
            counters=self.counters, step=self.step, units=2, emulated=predicted,
            **{"rule": Rule(top_k=self.k, renormalise=True), **more},
        )  # fmt: skip

    def count(self, name: str) -> int:
        return int(self.counters[COUNTERS.index(name)])


def pair(policy: str, scope: str, slots: int, most: int = 0, tokens: int = 13) -> tuple[Residency, Device]:
    """Host and device, both empty, and a trace of 4 layers, 16 experts and top-4."""
    trace = synthetic(tokens, layers=4, experts=16, k=4, seed=11)
    residency = Residency(4, 16, slots * 4, make_policy(policy, 64), scope)
    forced = torch.from_numpy(trace.experts.astype(np.int16)).to(DEVICE)
    device = Device(device_table(residency, reach(residency, 4, most), DEVICE), 4, 16, 4, forced)
    push(residency, device.table, 1)
    return residency, device


def same(residency: Residency, device: Device, policy: str) -> None:
    """Every array of the mirror."""
    mirror = Residency(4, 16, residency.slots, make_policy(policy, 64), residency.scope)
    pull(mirror, device.table)
    assert (mirror.owner == residency.owner).all()
    assert (mirror.slot_of == residency.slot_of).all()
    assert (mirror.prefetched == residency.prefetched).all()
    for name in residency.policy.state:
        assert (getattr(mirror.policy, name) == getattr(residency.policy, name)).all(), name
    assert policy != "lru" or mirror.policy.event == residency.policy.event
    if isinstance(residency.policy, Echo):
        alike(mirror.policy, residency.policy, device.table)
    mirror.check()


def alike(mirror: Policy, policy: Echo, table: Table) -> None:
    """What echo keeps besides, and what it foretells of the next token."""
    assert isinstance(mirror, Echo)
    assert table.past
    assert mirror.filled == policy.filled
    assert (mirror.rows == policy.rows).all()
    assert (table.past.foretold.cpu().numpy() == policy.foretell()).all()
    assert (mirror.foretold == policy.foretell()).all()
    assert int(table.past.ticket) == 0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", cases([4, 7], [7]))
def test_the_same_victims(policy: str, scope: str, slots: int) -> None:
    """52 layer events; with 4 slots a layer an event takes a whole pool."""
    residency, device = pair(policy, scope, slots)
    for token, layers in enumerate(device.forced.cpu().numpy()):
        device.table.clock[0], device.step[0] = token + 1, token + 1
        if scope == "layer":
            device.find()
        for layer, experts in enumerate(layers):
            if scope == "global":
                device.find()
            device.route(layer)
            access = residency.access(layer, experts, token + 1)
            missed = ~access.hit
            residency.landed(access.slots[missed])
            assert device.slots.tolist() == access.slots.tolist(), (token, layer)
            assert device.hit.tolist() == access.hit.astype(int).tolist()
            count = int(device.miss_count)
            order = np.argsort(experts[missed])
            assert device.miss_records[:count].tolist() == (experts[missed][order] + layer * 16).tolist()
            assert device.miss_slots[:count].tolist() == access.slots[missed][order].tolist()
            assert device.log[layer * 4 : layer * 4 + 4].tolist() == experts.tolist()
        device.foretell()
    same(residency, device, policy)
    assert device.count("hits") + device.count("misses") == 13 * 16
    assert device.count("uploaded") == 2 * device.count("misses")


@pytest.mark.parametrize("rule", [
    Rule(top_k=16, renormalise=True), Rule("sigmoid", top_k=16), Rule("sigmoid", biased=True, top_k=16, scale=2.0),
    Rule(top_k=16, top_p=0.99, renormalise=True),
])  # fmt: skip
def test_a_token_may_ask_for_every_expert(rule: Rule) -> None:
    """A pool of little more than a layer: each layer takes the place of the one before; a top-p's cap may be all."""
    residency = Residency(4, 16, 18, make_policy("lru", 64), "global")
    device = Device(device_table(residency, reach(residency, 16, 0), DEVICE), 4, 16, 16, torch.empty(0))
    push(residency, device.table, 1)
    bias = torch.linspace(-0.2, 0.2, 16, device=DEVICE) if rule.biased else None
    for token in (1, 2):
        device.table.clock[0], device.step[0] = token, token
        for layer in range(4):
            device.find()
            device.route(layer, forced=None, rule=rule, bias=bias)
            ids, weights = select(device.logits[None], rule, bias)
            assert torch.equal(device.ids, ids[0].int())
            assert_close("weights", device.weights, weights[0], 1e-6)
            asked = ids[0, ids[0] >= 0].numpy()
            access = residency.access(layer, asked, token)
            residency.landed(access.slots[~access.hit])
            assert device.slots[: len(asked)].tolist() == access.slots.tolist()
            assert int(device.miss_count) == (~access.hit).sum()
            assert rule.top_p < 1 or int(device.miss_count) == 16
            assert len(asked) > 1
    same(residency, device, "lru")


@pytest.mark.parametrize(
    ("policy", "scope", "ahead", "most", "seed"),
    [
        ("lru", "layer", 1, 2, 16),
        ("lfu", "layer", 2, 3, 2),
        ("lfru", "layer", 1, 1, 4),
        ("crf:h=3", "layer", 2, 2, 6),
        ("echo:h=3,w=16", "layer", 2, 2, 6),
        ("lru", "global", 1, 3, 17),
        ("lfu", "global", 1, 3, 3),
        ("lfru", "global", 1, 2, 5),
        ("crf:h=3", "global", 2, 1, 7),
        pytest.param(SIGNED, "layer", 2, 2, 6, id="formula-layer"),
        pytest.param(SIGNED, "global", 2, 1, 7, id="formula-global"),
    ],
)
def test_the_same_prefetches(policy: str, scope: str, ahead: int, most: int, seed: int) -> None:
    """A layer further down is predicted, half right; what has landed is covered, what has not is late."""
    rng = np.random.default_rng(seed)
    residency, device = pair(policy, scope, 4 + most if scope == "layer" else 3, most=most)
    covered = late = 0
    for token, layers in enumerate(device.forced.cpu().numpy()):
        device.table.clock[0], device.step[0] = token + 1, token + 1
        if scope == "layer":
            device.find()
        guesses = np.stack([rng.permutation(np.unique(np.r_[ids[:2], rng.integers(0, 16, 9)]))[:4] for ids in layers])
        predicted = torch.from_numpy(np.repeat(guesses[None], 13, 0).astype(np.int16)).to(DEVICE)
        for layer, experts in enumerate(layers):
            if scope == "global":
                device.find()
            device.route(layer, fetched=(device.fetch_count[layer], device.fetch_slots[layer]))
            access = residency.access(layer, experts, token + 1)
            covered, late = covered + access.covered.sum(), late + access.late.sum()
            residency.landed(np.flatnonzero(residency.arriving & (residency.owner // 16 == layer)))  # the join
            assert device.slots.tolist() == access.slots.tolist(), (token, layer)
            assert device.hit.tolist() == access.hit.astype(int).tolist()
            assert int(device.miss_count) == (~access.hit & ~access.late).sum()
            if layer + ahead < 4:
                device.predict(layer + ahead, predicted, most, device.slots)
                held = access.slots if scope == "global" else access.slots[:0]
                records, slots = residency.prefetch(layer + ahead, guesses[layer + ahead], token + 1, most, held)
                count = int(device.fetch_count[layer + ahead])
                assert device.fetch_records[layer + ahead, :count].tolist() == records.tolist(), (token, layer)
                assert device.fetch_slots[layer + ahead, :count].tolist() == slots.tolist()
                if rng.random() < 0.5:
                    device.table.landed[device.fetch_slots[layer + ahead, :count].long()] = 1
                    residency.landed(slots)
        device.foretell()
    same(residency, device, policy)
    assert (device.count("covered"), device.count("late")) == (covered, late)
    assert covered > 0 < late
    assert device.count("wasted") == residency.wasted > 0


@pytest.mark.parametrize(("w", "before"), [(16, 40), (70, 75), (200, 100)])
def test_the_same_is_foretold(w: int, before: int) -> None:
    """From a ring that is full or not, of one part or more, over its end; a step behind the end adds nothing."""
    trace = synthetic(before + 12, layers=3, experts=20, k=3, seed=8)
    residency = Residency(3, 20, 24, make_policy(f"echo:w={w}", 60), "layer")
    echo = residency.policy
    assert isinstance(echo, Echo)
    for now in range(before):
        residency.landed(np.flatnonzero(residency.arriving))
        residency.access_token(trace.experts[now].astype(np.int64), now)
    residency.landed(np.flatnonzero(residency.arriving))
    forced = torch.from_numpy(trace.experts.astype(np.int16)).to(DEVICE)
    device = Device(device_table(residency, 3, DEVICE), 3, 20, 3, forced)
    push(residency, device.table, before)
    for now in range(before, before + 12):
        device.log.copy_(torch.from_numpy(trace.experts[now].ravel().astype(np.int32)))
        device.table.clock[0] = now + 1
        for status in (0, 1):
            device.status.fill_(status)
            device.foretell()
        echo.touch(
            np.concatenate([ids.astype(np.int64) + layer * 20 for layer, ids in enumerate(trace.experts[now])]), now
        )
        mirror = Residency(3, 20, 24, make_policy(f"echo:w={w}", 60), "layer")
        pull(mirror, device.table)
        alike(mirror.policy, echo, device.table)
        assert mirror.policy.token == echo.token
    assert echo.foretell().any()


@triton.jit
def _popcounts(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, popcount(tl.load(x + i)))


def test_bits_are_counted() -> None:
    x = np.random.default_rng(1).integers(-(2**31), 2**31, 64).astype(np.int32)
    x[:4] = -1, 0, 2**31 - 1, -(2**31)
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    _popcounts[(1,)](torch.from_numpy(x).to(DEVICE), out, N=64)
    assert out.tolist() == np.bitwise_count(x.view(np.uint32)).tolist()


def test_a_step_behind_the_end_changes_nothing() -> None:
    residency, device = pair("crf:h=3", "layer", 7)
    device.status[0] = 1
    device.find()
    device.route(0)
    assert int(device.miss_count) == 0
    assert device.slots.tolist() == [0, 0, 0, 0]
    same(residency, device, "crf:h=3")
    assert not device.counters.any()


@pytest.mark.parametrize("experts", [16, 300])
def test_the_router_is_the_naive_one(experts: int) -> None:
    """Without forced ids: norm, softmax over all, top-k, renormalised."""
    residency = Residency(1, experts, 8, make_policy("lru", experts), "layer")
    device = Device(device_table(residency, 4, DEVICE), 1, experts, 4, torch.zeros((1, 1, 4), dtype=torch.int16))
    push(residency, device.table, 1)
    device.find()
    device.route(0, forced=None)
    x = device.x.double()
    normed = x * torch.rsqrt(x.square().mean() + 1e-6) * device.norm.double()
    best, ids = (device.router.double() @ normed).topk(5)
    assert best.diff().max() < -1e-4, "a near tie, choose another seed"
    assert device.ids.tolist() == ids[:4].tolist()
    assert_close("weights", device.weights, best[:4].softmax(0), 1e-6)
    assert_close("normed", device.normed, normed, 1e-6)
    device.router[7] = device.router[3]
    device.router[3:8:4] *= 50
    device.find()
    device.route(0, forced=None)
    assert {3, 7} <= set(device.ids.tolist()) or float(device.logits[3]) < 0


@pytest.mark.parametrize("experts", [16, 24, 384])
@pytest.mark.parametrize("rule", [
    Rule(), Rule(renormalise=True, scale=1.5), Rule(biased=True), Rule(groups=8, kept=3),
    Rule("sigmoid"), Rule("sigmoid", biased=True, groups=4, kept=2, group_best=2, renormalise=True, scale=2.5),
    Rule("sigmoid", biased=True, groups=8, kept=2), Rule("none"), Rule("none", biased=True, scale=0.5),
    Rule("mixer", jitter=0.3), Rule(top_p=0.3), Rule("sigmoid", biased=True, top_p=0.9, renormalise=True),
], ids=str)  # fmt: skip
def test_every_rule_is_the_naive_one(rule: Rule, experts: int) -> None:
    """Ids, weights, and that of a gated shared expert behind them; a prediction takes the same ids."""
    rule, bias = replace(rule, top_k=4), torch.linspace(-1, 1, experts).flip(0)[torch.arange(experts) * 7 % experts]
    residency = Residency(2, experts, 16, make_policy("lru", 2 * experts), "layer")
    device = Device(device_table(residency, 8, DEVICE), 2, experts, 4, torch.zeros((1, 2, 4), dtype=torch.int16))
    device.logits = torch.full((experts + 1,), float("nan"), device=DEVICE)
    device.weights = torch.full((5,), float("nan"), device=DEVICE)
    device.router = torch.randn((experts + 1, HIDDEN), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    given = {"rule": rule, "bias": bias.to(DEVICE) if rule.biased else None}
    push(residency, device.table, 1)
    device.find()
    device.route(0, forced=None, **given)
    logits = device.logits.cpu()
    assert_close("logits", logits, device.router.double() @ device.normed.double(), 1e-6)
    ids, weights = select(logits[None, :experts], rule, bias if rule.biased else None)
    assert device.ids.tolist() == ids[0].tolist()
    assert_close("weights", device.weights[:4], weights[0], 1e-6)
    assert_close("of the shared expert", device.weights[4], logits[experts].double().sigmoid(), 1e-6)
    device.predict(1, None, 4, device.slots, -1e9, **given)
    there = ids[0] >= 0
    assert bool(there.all()) == (rule.top_p == 1)
    assert torch.equal(device.slots.cpu() >= 0, there)
    assert torch.equal(device.hit.cpu() >= 0, there)
    assert int(device.miss_count) == device.count("misses") == int(there.sum())
    assert device.log[:4].tolist() == ids[0].tolist()
    fetched = int(device.fetch_count[1])
    assert device.fetch_records[1, :fetched].tolist() == (ids[0, there] + experts).tolist()


def test_the_norm_before_a_router_may_be_a_layernorm() -> None:
    residency = Residency(2, 16, 16, make_policy("lru", 32), "layer")
    device = Device(device_table(residency, 8, DEVICE), 2, 16, 4, torch.zeros((1, 2, 4), dtype=torch.int16))
    shift, raw = torch.randn(HIDDEN, device=DEVICE), torch.empty(HIDDEN, device=DEVICE)
    device.x += 3.0
    push(residency, device.table, 1)
    device.find()
    device.route(0, forced=None, shift=shift, raw=raw)
    assert torch.equal(raw, device.x)
    normed = torch.nn.functional.layer_norm(device.x.double(), (HIDDEN,), device.norm.double(), shift.double(), 1e-6)
    assert_close("normed", device.normed, normed, 1e-6)
    assert_close("logits", device.logits[:16], device.router[:16].double() @ normed, 1e-6)
    ids = device.ids.tolist()
    device.predict(1, None, 4, device.slots, -1e9, shift=shift)
    assert device.fetch_records[1].tolist() == [id + 16 for id in ids]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_512_experts_are_routed_ten_at_a_time(scope: str) -> None:
    """As Qwen3-Next has them: the router's own ids over tokens that share some, hits and victims those of the host."""
    experts, k, hits = 512, 10, 0
    residency = Residency(2, experts, 2 * 24, make_policy("crf:h=3", 2 * experts), scope)
    device = Device(device_table(residency, reach(residency, k, 0), DEVICE), 2, experts, k, torch.zeros((1, 2, k)))
    device.logits = torch.zeros(experts + 1, device=DEVICE)
    device.weights = torch.zeros(k + 1, device=DEVICE)
    device.router = torch.randn((experts + 1, HIDDEN), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    push(residency, device.table, 1)
    first = device.x.clone()
    for token in range(6):
        device.table.clock[0], device.step[0] = token + 1, token + 1
        device.x.copy_(first + 0.3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(token)).to(DEVICE))
        for layer in range(2):
            if scope == "global" or layer == 0:
                device.find()
            device.route(layer, forced=None, rule=Rule(top_k=k, renormalise=True))
            ids, weights = select(device.logits[None, :experts].cpu(), Rule(top_k=k, renormalise=True))
            assert device.ids.tolist() == ids[0].tolist()
            assert_close("weights", device.weights[:k], weights[0], 1e-6)
            access = residency.access(layer, ids[0].numpy(), token + 1)
            residency.landed(access.slots[~access.hit])
            assert device.slots.tolist() == access.slots.tolist(), (token, layer)
            hits += int(access.hit.sum())
    assert 0 < hits < 6 * 2 * k


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_pool_is_listed_in_parts(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With free slots, arriving ones, ties, and counters near the end of int32."""
    monkeypatch.setattr("offmoe.kernels.gpu.resolve.PART", 8)
    rng = np.random.default_rng(4)
    residency = Residency(4, 16, 29, make_policy(policy, 64), "global")
    records = rng.permutation(64)[:25]
    residency._fill(rng.permutation(29)[:25].astype(np.int32), records)
    residency.arriving[:] = rng.random(29) < 0.2
    residency.arriving &= residency.owner >= 0
    for name in residency.policy.state:
        low, high = (0, 2**31 - 1) if policy[:3] == "lfu" or name == "uses" else (0, 12)
        getattr(residency.policy, name)[records[::2]] = rng.integers(low, high, 13)
    table = device_table(residency, 10, DEVICE)
    push(residency, table, 2**31 - 1 if policy == "lfru" else 12)
    if isinstance(residency.policy, Echo) and table.past:
        residency.policy.foretold = rng.choice([0, 0.25, 3.5], 64).astype(np.float32)
        table.past.foretold.copy_(torch.from_numpy(residency.policy.foretold))
    for scratch in (None, table.scratch, table.scratch):
        table.candidates.fill_(-7)
        candidates(table.owner, table.arriving, table.a, table.b, table.decay, table.clock, table.candidates,
                   kind=table.kind, scratch=scratch, foretold=table.foretold, worth=table.worth)  # fmt: skip
        keys = residency._keys(slice(0, 29), np.empty(0, np.int32), int(table.clock[0]))
        order = keys.argsort(kind="stable")
        assert table.candidates[0].tolist() == order[:10].tolist()
    assert int(table.scratch[0]) == 0


@pytest.mark.parametrize("name", ["Signed,h=3", "Signed,h=7", "Plain", "Curved"])
def test_a_formula_is_the_same_bit_for_bit(name: str) -> None:
    """Over values and ages of all sizes; but a GPU's exp2 and log2 are near."""
    policy = make_policy(f"{formula_policies.HERE}:{name}", 4096)
    assert isinstance(policy, Formula)
    rng = np.random.default_rng(5)
    value = rng.exponential(8, 4096).astype(np.float32)
    age, uses = (rng.integers(low, 9999, 4096).astype(np.float32) for low in (0, 1))
    use, worth = device_formula(policy, DEVICE)
    got = evaluate(*(torch.from_numpy(x).to(DEVICE) for x in (value, age, uses)), use=use, worth=worth).cpu().numpy()
    want = policy.use(value.copy(), age, uses, **policy.values), policy.worth(value, age, **policy.values)
    assert all(each.dtype == np.float32 for each in want)
    assert (got[0].view(np.int32) == want[0].view(np.int32)).all()
    if name == "Curved":
        assert np.allclose(got[1], want[1], rtol=1e-6, atol=1e-6)
    else:
        assert (got[1].view(np.int32) == want[1].view(np.int32)).all()


def test_what_no_kernel_can_do_is_refused_in_one_line() -> None:
    with pytest.raises(OffmoeError, match=r"Looped' does not compile for a GPU \(.+\): it runs on the CPU") as caught:
        pair(f"{formula_policies.HERE}:Looped", "layer", 4)
    assert "\n" not in str(caught.value)
    with pytest.raises(OffmoeError, match="Touching' has no score for a GPU"):
        pair(f"{formula_policies.HERE}:Touching", "layer", 4)


def test_a_list_ends_where_nothing_may_leave() -> None:
    residency, device = pair("lru", "layer", 4)
    residency.landed(residency.access(1, np.arange(4), 0).slots[:3])
    push(residency, device.table, 1)
    device.find()
    assert device.table.candidates[:2].tolist() == [[0, 1, 2, 3], [4, 5, 6, -1]]


def test_what_an_aborted_step_admitted_is_absent_again() -> None:
    """Its copies may not have been made; a slot that it left alone stays."""
    residency, device = pair("lru", "layer", 6)
    residency.landed(residency.access(0, device.forced[0, 0, :2].cpu().numpy(), 0).slots)
    push(residency, device.table, 1)
    device.find()
    device.step.fill_(1)
    device.miss_records.zero_()
    device.miss_slots.zero_()  # a pair that is no miss of anyone
    device.route(0)
    device.status.fill_(2)
    device.route(1)
    pull(residency, device.table)
    assert np.count_nonzero(residency.owner >= 0) == 4
    lose(residency, device.miss_records, device.miss_slots)
    residency.check()
    assert set(residency.owner[residency.owner >= 0].tolist()) <= set(device.forced[0, 0, :2].tolist())
    assert (residency.slot_of[device.forced[0, 0, 2:].cpu().numpy()] == -1).all()
    assert residency.access(0, device.forced[0, 0].cpu().numpy(), 1).hit.sum() >= 1


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_nan_is_routed_somewhere() -> None:
    """A step that is broken goes on to its end, where NaN is noticed; it must not write outside its tables."""
    residency, device = pair("crf:h=3", "layer", 4)
    device.x[3] = float("nan")
    device.find()
    device.route(0, forced=None)
    residency.landed(residency.access(0, device.ids.cpu().numpy(), 1).slots)
    assert sorted(device.ids.tolist()) == [0, 1, 2, 3]
    same(residency, device, "crf:h=3")


@pytest.mark.parametrize("experts", [16, 300])
def test_what_the_router_of_a_later_layer_finds_likely_is_fetched(experts: int) -> None:
    """Its top 4 but for what is there already and what is less likely than asked, the likeliest first."""
    residency = Residency(2, experts, 16, make_policy("lru", 2 * experts), "layer")
    forced = torch.zeros((1, 2, 4), dtype=torch.int16, device=DEVICE)
    device = Device(device_table(residency, reach(residency, 4, 2), DEVICE), 2, experts, 4, forced)
    normed = device.x.double() * torch.rsqrt(device.x.double().square().mean() + 1e-6) * device.norm.double()
    weights, ids = (device.router.double() @ normed).softmax(0).topk(4)
    residency.landed(residency.access(1, ids[1:2].cpu().numpy(), 0).slots)
    push(residency, device.table, 1)
    device.find()
    for least, most, fetched in ((float(weights[2:4].mean()), 4, [0, 2]), (0.0, 4, [3]), (0.0, 4, [])):
        device.predict(1, None, most, device.slots, least)
        count = int(device.fetch_count[1])
        records = (ids[fetched] + experts).tolist()
        assert device.fetch_records[1, :count].tolist() == records
        want = residency.prefetch(1, ids[: 3 if least else 4].cpu().numpy(), 1, most)
        assert device.fetch_slots[1, :count].tolist() == want[1].tolist()
        assert device.table.owner[device.fetch_slots[1, :count].long()].tolist() == records
