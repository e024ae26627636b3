"""Description of a model and its cost on this machine, computed without reading any weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offmoe.machine.bandwidth import disk_bandwidth, link_bandwidth, slot_bandwidth
from offmoe.machine.disk_reader import PAGE
from offmoe.mixers.recurrent import STATES
from offmoe.models.config import ModelConfig
from offmoe.models.model import Model
from offmoe.models.parameters import Weights, count_weights
from offmoe.plan import Plan, make_plan, plan_numbers
from offmoe.settings import Settings, format_size

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class TierCost:
    """Cost of a decoded token whose experts are all read from one tier."""

    tier: str  # vram, pcie or nvme
    bytes: int
    bandwidth: float  # bytes per second, measured on this machine

    @property
    def ms(self) -> float:
        return self.bytes / self.bandwidth * 1e3


@dataclass(frozen=True)
class ModelInfo:
    """Contents of `offmoe info`."""

    model: Model
    plan: Plan
    weights: Weights
    costs: tuple[TierCost, ...]
    direct: bool  # whether the disk can be read with O_DIRECT, past the page cache

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers of `offmoe info --json`."""
        c, w = self.model.config, self.weights
        return {
            "path": str(self.model.checkpoint.path),
            "model_type": c.model_type,
            "parameters": w.total,
            "active_parameters": w.active,
            "active_parameters_without_embedding": w.active_without_embedding,
            "layers": c.layers,
            "hidden": c.hidden,
            "experts": c.experts,
            "top_k": c.top_k,
            "routing": str(c.moe.rule),
            "shared_experts": c.moe.shared,
            "dense_layers": len(c.dense),
            "trained_context": c.ctx,
            "record_bytes": sorted({layout.nbytes for layout in self.model.layouts}),
            "record_formats": self.formats(),
            "routed_bytes": self.model.record_bytes,
            "other_bytes": w.trunk_bytes,
            "token_cost": {
                cost.tier: {"bytes": cost.bytes, "ms": cost.ms, "bytes_per_s": cost.bandwidth} for cost in self.costs
            },
            "o_direct": self.direct,
            "plan": plan_numbers(self.plan),
        }

    def sections(self) -> dict[str, Rows]:
        """Return the tables for people: title → rows of (label, value)."""
        return {
            "Model": self._model_rows(),
            "A decoded token": self._cost_rows(),
            "Placement": self._plan_rows(),
        }

    def formats(self) -> list[str]:
        """Return the formats of the experts' matrices, one string for each kind of layer: `gate:Q4_K up:Q4_K
        down:Q6_K`.
        """
        kinds = {" ".join(f"{part.name}:{part.format}" for part in layout.parts) for layout in self.model.layouts}
        return sorted(kinds)

    def _model_rows(self) -> Rows:
        c, w, sizes = self.model.config, self.weights, {layout.nbytes for layout in self.model.layouts}
        kinds = [f"{len(c.dense)} without experts"] if c.dense else []
        label = c.mixers[c.recurrent[0]].label if c.recurrent else ""
        kinds += [f"{len(c.recurrent)} with a {label} instead of attention"] if c.recurrent else []
        layer_kinds = f" ({', '.join(kinds)})" if kinds else ""
        record = " to ".join(format_size(size) for size in sorted({min(sizes), max(sizes)}))
        return [
            ("family", f"{c.model_type} ({self.model.checkpoint.kind})"),
            ("parameters", f"{format_count(w.total)} in total, {format_count(w.active)} active per token"),
            ("", f"{format_count(w.active_without_embedding)} active without the input embedding"),
            ("layers", f"{c.layers}{layer_kinds}, hidden {c.hidden}, {attention(c)}"),
            ("experts", f"{c.experts} per layer, {c.top_k} routed per token, {c.moe.shared or 'none'} shared"),
            ("routing", str(c.moe.rule)),
            ("size of an expert", f"{record} ({'; '.join(self.formats())})"),
            ("all experts", format_size(self.model.record_bytes)),
            ("everything else", f"{format_size(w.trunk_bytes)} in the file"),
        ]

    def _cost_rows(self) -> Rows:
        names = {"vram": "all experts in slots", "pcie": "all in RAM", "nvme": "all on disk"}
        return [
            (
                names[cost.tier],
                f"{format_size(cost.bytes)}, {cost.ms:.3g} ms at {cost.bandwidth / 1e9:.3g} GB/s",
            )
            for cost in self.costs
        ]

    def _plan_rows(self) -> Rows:
        p = self.plan
        unpacked = f", {format_size(p.real_slot_bytes)} in memory after unpacking" if p.device.type == "cpu" else ""
        states = f", and {format_size(STATES * p.state_bytes)} for recurrent states" if p.state_bytes else ""
        return [
            ("device", f"{p.device}, {str(p.dtype).removeprefix('torch.')}"),
            ("slots", f"{p.slots} for {p.records} experts, {format_size(p.vram_bytes)} of the budget{unpacked}"),
            (
                "slot waste",
                f"{format_size(p.waste_bytes)} (a slot of {format_size(p.stride)} holds the largest expert)",
            ),
            ("RAM tier", f"{p.ram_rows} experts, {format_size(p.ram_bytes)}"),
            ("tiers", p.tiers),
            ("policy", f"{p.policy}, scope {p.scope}"),
            ("other weights", f"{format_size(p.trunk_bytes)} in {str(p.dtype).removeprefix('torch.')}"),
            ("context", f"{p.ctx} tokens, {format_size(p.kv_bytes)}{states}"),
        ]


def inspect_model(model: Model, settings: Settings) -> ModelInfo:
    """Plan `model` and measure the bandwidth of each tier, which takes half a second."""
    plan = make_plan(model, settings)
    c = model.config
    read = model.record_bytes * c.top_k // c.experts
    used = plan.real_slot_bytes // plan.slots * c.moe_layers * c.top_k  # slots on the CPU are unpacked
    paged = (
        read + c.moe_layers * c.top_k * len(model.layouts[0].parts) * PAGE
    )  # alignment reads one more page per part, on average
    disk, direct = disk_bandwidth(model.checkpoint.files[0])
    costs = (
        TierCost("vram", used, slot_bandwidth(plan.device)),
        TierCost("pcie", read, link_bandwidth(plan.device)),
        TierCost("nvme", paged if direct else read, disk),
    )
    return ModelInfo(model, plan, count_weights(model), costs, direct)


def attention(config: ModelConfig) -> str:
    """Return heads and what is cached for them: `32 heads, 8 or 2 key-value heads`."""
    mixers = [config.mixers[layer] for layer in config.attended]
    amounts, units = (dict.fromkeys(cached) for cached in zip(*(mixer.cached for mixer in mixers), strict=True))
    return f"{mixers[0].heads_of_attention} heads, {' or '.join(amounts)} {' or '.join(units)}"


def format_count(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
