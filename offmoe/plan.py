"""The plan: all sizes and placements, decided once from the model's headers, the settings and the free memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch

from offmoe.cache.policies import POLICIES
from offmoe.cache.policy import PolicySpec, parse_policy
from offmoe.errors import OffmoeError
from offmoe.machine.cgroup import memory_left
from offmoe.mixers.base import MixerConfig
from offmoe.mixers.recurrent import STATES
from offmoe.models.model import Model
from offmoe.models.parameters import bias_weights, count_weights, trunk_weights
from offmoe.prefetch import Gate
from offmoe.settings import Budget, Settings, format_size
from offmoe.trunk.kv_cache import kv_nbytes, state_nbytes

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEFAULT_POLICY = parse_policy("echo")
DEFAULT_SCOPE = "layer"  # hits 1.6–3 points more than one global pool on traces of gpt-oss-20b and the demo model
DEFAULT_CTX = 8192
SHARE_OF_FREE = 0.6  # of free memory: the rest is left to the desktop
VRAM_MARGIN = 512 << 20  # libraries, kernels and graphs took at most 231 MiB more than planned (bench/memory.py)
# Bytes of records that cross the link together: 2 ms on PCIe 5; with half as many, a prompt took 1.3 × the time.
BATCH_BYTES = 96 << 20
BATCHES = 3  # two under way, one rearranged
CHUNK, CHUNK_GPU = 512, 4096  # a GPU streams all absent experts past every chunk: the fewer the better
STAGING_ROWS = 32  # RAM rows kept even with --ram 0, for records on their way from disk to slots


@dataclass(frozen=True)
class Plan:
    """The placement of one model under one set of budgets."""

    device: torch.device
    dtype: torch.dtype
    ctx: int
    policy: PolicySpec
    scope: str
    slots: int
    stride: int  # bytes of a slot and of a RAM row: the largest record
    ram_rows: int
    records: int
    real_slot_bytes: int  # of all slots; on the CPU device they hold unpacked records
    trunk_bytes: int
    kv_bytes: int
    state_bytes: int  # of recurrent layers: what a token reads and writes
    waste_bytes: int  # in slots that are larger than their record
    chunk: int  # tokens of a prompt that are run at once
    batch: int  # records that cross the link together while a prompt is run
    workspace_bytes: int  # VRAM for a chunk's activations and batches of records; 0 on the CPU device
    kv: str  # what keys and values are kept in: "same" as the activations, or "int8"
    prefetch: Gate

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values: on a GPU float16 where activations are bfloat16, for three bits more."""
        return torch.float16 if (self.dtype, self.device.type) == (torch.bfloat16, "cuda") else self.dtype

    @property
    def vram_bytes(self) -> int:
        """Bytes charged to --vram: slots times the bytes of a record in the file."""
        return self.slots * self.stride

    @property
    def ram_bytes(self) -> int:
        return self.ram_rows * self.stride

    @property
    def context_bytes(self) -> int:
        """Bytes of keys, values and recurrent states, with the states' snapshots."""
        return self.kv_bytes + STATES * self.state_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of fast memory (VRAM on a GPU) that the plan takes."""
        return self.trunk_bytes + self.context_bytes + self.real_slot_bytes + self.workspace_bytes

    @property
    def all_in_slots(self) -> bool:
        return self.slots >= self.records

    @property
    def tiers(self) -> str:
        """Tiers that hold routed records, fastest first, as shown to users."""
        fast = "VRAM" if self.device.type == "cuda" else "memory slots"
        if self.all_in_slots:
            return fast
        return f"{fast} ← RAM" if self.ram_rows >= self.records else f"{fast} ← RAM ← disk"

    def summary(self) -> str:
        """One line for the head of a chat."""
        share = self.slots / self.records
        return (
            f"{self.slots} of {self.records} experts in slots ({share:.0%}, {format_size(self.vram_bytes)}) · "
            f"{self.tiers} · {self.policy} {self.scope} · {self.device} · context {self.ctx}"
        )


@dataclass
class Free:
    """Bytes that may be used."""

    ram: int
    vram: int | None = field(default=None)


def make_plan(model: Model, settings: Settings) -> Plan:
    """Place `model`. Raises OffmoeError with the smallest budget that works where one is too small."""
    if settings.kv == "int8" and not all(mixer.int8_cache for mixer in model.config.mixers):
        raise OffmoeError("--kv int8 does not go with latent attention, whose cache is small already: leave it out")
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    ctx = pick_ctx(settings.ctx, model.config.ctx)
    on_cpu = device.type == "cpu"
    chunk = min(settings.chunk or (CHUNK if on_cpu else CHUNK_GPU), ctx)
    kv = kv_nbytes(model.config, ctx, dtype.itemsize, settings.kv == "int8")
    state = state_nbytes(model.config)
    context = kv + STATES * state
    if on_cpu:
        held = trunk_weights(model.config) + bias_weights(model.config)
        trunk, real, workspace = held * dtype.itemsize, model.record_weights * dtype.itemsize, 0
    else:
        weights = count_weights(model)
        trunk, real = weights.trunk_bytes + weights.unpacked_bytes, model.slot_bytes
        workspace = workspace_nbytes(model, chunk, ctx, dtype.itemsize)
    free = free_memory(device)
    slots = pick_slots(model, settings.vram, default_slots(model, free, trunk + context + workspace, real))
    scope = settings.scope or DEFAULT_SCOPE
    if scope == "layer":
        slots -= slots % model.config.moe_layers
    left = free.ram - (trunk + context + slots * real if device.type == "cpu" else 0)
    plan = Plan(
        device=device,
        dtype=dtype,
        ctx=ctx,
        policy=pick_policy(settings.policy, device),
        scope=scope,
        slots=slots,
        stride=model.slot_bytes,
        ram_rows=pick_ram_rows(model, settings.ram, slots, left),
        records=model.records,
        real_slot_bytes=slots * real,
        trunk_bytes=trunk,
        kv_bytes=kv,
        state_bytes=state,
        waste_bytes=wasted(model, slots),
        chunk=chunk,
        batch=batch_records(model),
        workspace_bytes=workspace,
        kv=settings.kv or "same",
        prefetch=pick_prefetch(settings, device),
    )
    check_fits(plan, free)
    return plan


def pick_prefetch(settings: Settings, device: torch.device) -> Gate:
    """Return the prefetcher's parameters; refuse prefetching and int8 keys and values without a GPU."""
    gate = settings.prefetch or Gate()
    if device.type == "cpu" and (gate.most or settings.kv == "int8"):
        asked = f"--prefetch {gate}" if gate.most else "--kv int8"
        raise OffmoeError(f"{asked} works on a GPU, and the device is the CPU: leave it out")
    return gate


def batch_records(model: Model) -> int:
    return max(1, min(BATCH_BYTES // model.slot_bytes, model.config.experts))


def workspace_nbytes(model: Model, chunk: int, ctx: int, itemsize: int) -> int:
    """VRAM that a chunk needs for activations, unpacked matrices and batches of records."""
    c, moe = model.config, model.config.moe
    inner = max(moe.dense_hidden, moe.shared_hidden)
    # Of the experts; of a dense or shared part: gate, up, glu of gate, product.
    values = moe.top_k * (c.hidden + moe.expert_hidden) + 4 * inner
    rows, cols, passing = max(c.hidden, inner), c.hidden, 0
    for mixers in by_type(c.kinds):
        values += max(mixer.activations for mixer in mixers) + max(mixer.staged for mixer in mixers)
        rows, cols = max(rows, *(m.widest[0] for m in mixers)), max(cols, *(m.widest[1] for m in mixers))
        passing += max(mixer.chunk_nbytes(ctx, itemsize) for mixer in mixers)
    a_token = c.hidden * (12 + 4 * itemsize) + values * itemsize
    records = BATCHES * batch_records(model) * model.slot_bytes
    return chunk * a_token + passing + rows * cols * itemsize + records + 16 * c.vocab


def by_type(mixers: Iterable[MixerConfig]) -> list[list[MixerConfig]]:
    """Mixers of one kind together."""
    kinds: dict[type[MixerConfig], list[MixerConfig]] = {}
    for mixer in mixers:
        kinds.setdefault(type(mixer), []).append(mixer)
    return list(kinds.values())


def pick_device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if available else "cpu"))
    if device.type == "cpu":
        return device
    if not available:
        raise OffmoeError(
            "device 'cuda' was asked for and torch sees no GPU: `offmoe doctor` says why; or --device cpu"
        )
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise OffmoeError(f"device 'cuda:{index}' was asked for and there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """float32 on the CPU; bfloat16 on a GPU that has it (sm_80 and later), else float16."""
    if name:
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def pick_ctx(asked: int | None, trained: int) -> int:
    if asked is not None and asked > trained:
        raise OffmoeError(f"--ctx {asked} is more than the {trained} positions that the model was trained for")
    return asked or min(trained, DEFAULT_CTX)


def free_memory(device: torch.device) -> Free:
    free = Free(ram=free_ram())
    if device.type == "cuda":
        free.vram = torch.cuda.mem_get_info(device)[0]
    return free


def free_ram() -> int:
    """Return the free RAM in bytes, or less where the process's control groups (containers, slices) allow less."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def token_records(model: Model) -> int:
    """Return the records that one token is routed to: the smallest number of slots that works."""
    return model.config.moe_layers * model.config.top_k


def default_slots(model: Model, free: Free, resident: int, real: int) -> int:
    """Return the slots that fit; on the CPU device half of the room, if the RAM tier needs the rest."""
    if free.vram is not None:
        return max(0, free.vram - resident - VRAM_MARGIN) // model.slot_bytes
    room = max(0, int(free.ram * SHARE_OF_FREE) - resident)
    return model.records if model.records * real <= room else room // 2 // real


def pick_slots(model: Model, budget: Budget | None, default: int) -> int:
    smallest = token_records(model)
    if budget is None:
        slots, asked = default, f"the free memory, {format_size(max(default, 0) * model.slot_bytes)},"
    else:
        wanted = model.records * budget.percent / 100 if budget.percent else (budget.bytes or 0) / model.slot_bytes
        slots, asked = int(wanted + 1e-9), f"--vram {budget}"
    if slots < smallest:
        percent = -(-smallest * 1000 // model.records) / 10
        raise OffmoeError(
            f"{asked} holds {slots} expert slots; a token is routed to {smallest} records and needs them all: "
            f"the smallest that works is {smallest * model.slot_bytes} bytes "
            f"({format_size(smallest * model.slot_bytes)}, {percent:g}%)"
        )
    return min(slots, model.records)


def pick_ram_rows(model: Model, asked: int | None, slots: int, left: int) -> int:
    """Return the rows of the RAM tier: just a few for staging if every record has a slot."""
    staging = max(STAGING_ROWS, model.config.top_k)
    if slots >= model.records:
        return min(staging, model.records)
    budget = int(left * SHARE_OF_FREE) if asked is None else asked
    return min(max(budget // model.slot_bytes, staging), model.records)


def pick_policy(asked: PolicySpec | None, device: torch.device) -> PolicySpec:
    """Return the policy to run; refuse one without `state` on a GPU, where it scores nothing in a captured graph."""
    policy = asked or DEFAULT_POLICY
    if device.type != "cpu" and not policy.kind.state:
        able = ", ".join(name for name, kind in POLICIES.items() if kind.state)
        raise OffmoeError(f"policy {policy.name!r} works on the CPU and in replay: on a GPU choose {able}")
    return policy


def smaller(plan: Plan, model: Model) -> Plan:
    """Return the plan with an eighth fewer slots. Raises OffmoeError if a token needs more."""
    slots, unit = plan.slots * 7 // 8, model.config.moe_layers if plan.scope == "layer" else 1
    slots -= slots % unit
    if slots < token_records(model):
        raise OffmoeError(
            f"the GPU's memory holds not even {plan.slots} expert slots in addition to the model's other weights: "
            "close what else uses it (`nvidia-smi`), or give a smaller --ctx or --chunk"
        )
    real = plan.real_slot_bytes // plan.slots * slots
    return replace(plan, slots=slots, real_slot_bytes=real, waste_bytes=wasted(model, slots))


def wasted(model: Model, slots: int) -> int:
    """Return the bytes of `slots` that records smaller than the largest leave unused, on average."""
    return int(slots * (model.slot_bytes - model.record_bytes / model.records))


def check_fits(plan: Plan, free: Free) -> None:
    resident = plan.resident_bytes
    if free.vram is not None and resident > free.vram:
        smallest = plan.vram_bytes - (resident - free.vram)
        raise OffmoeError(
            f"the GPU has {format_size(free.vram)} free; the model's other weights need "
            f"{format_size(plan.trunk_bytes)}, the context {format_size(plan.context_bytes)}, a chunk of the prompt "
            f"{format_size(plan.workspace_bytes)} and the slots {format_size(plan.real_slot_bytes)}: "
            f"give at most --vram {max(smallest, 0)}, or a smaller --ctx"
        )
    on_host = plan.ram_bytes + (resident if free.vram is None else 0)
    if on_host > free.ram:
        raise OffmoeError(
            f"the plan needs {format_size(on_host)} of memory and {format_size(free.ram)} are free: "
            "lower --vram, --ram or --ctx"
        )


def plan_numbers(plan: Plan) -> dict[str, Any]:
    """Return the plan's numbers, as `--json` prints them."""
    names = (
        "ctx",
        "policy",
        "scope",
        "slots",
        "records",
        "vram_bytes",
        "ram_bytes",
        "ram_rows",
        "real_slot_bytes",
        "workspace_bytes",
        "chunk",
        "kv",
        "prefetch",
        "state_bytes",
    )
    numbers = {name: getattr(plan, name) for name in (*names, "trunk_bytes", "kv_bytes", "waste_bytes", "tiers")}
    numbers |= {"policy": str(plan.policy), "prefetch": str(plan.prefetch)}
    return {**numbers, "device": str(plan.device), "dtype": str(plan.dtype).removeprefix("torch.")}
