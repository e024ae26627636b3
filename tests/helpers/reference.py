"""What transformers computes in float64, and how far from it float32 may be: the one bound on whole models."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Relative noise on every weight whose effect on the logits bounds the error of a float32 run: four times float32's eps.
# float32 rounds weights, activations and partial sums by up to half an eps each. Over all tiny models, the error of our
# runs and that of transformers' own float32 runs are 0.1 to 0.35 of what this noise does.
NOISE = 2.0**-21
LEAST = 1e-6  # the bound on routing weights is no lower: LFM2 adds as much to the sum it divides by, offmoe 1e-20


class InDouble(TorchFunctionMode):
    """Makes casts to float32, which transformers has in norms, softmaxes and rotary embeddings, casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    logits: Tensor  # [T, V]
    routing: list[tuple[Tensor, Tensor]]  # ids and weights [T, k] of every layer with experts, as its router gave them

    def spread(self, moe_layer: int, experts: int) -> Tensor:
        return spread(*self.routing[moe_layer], experts)


@dataclass(frozen=True)
class Reference:
    """A float64 run, and two whose weights are disturbed by NOISE and by its negative."""

    exact: Run
    disturbed: tuple[Run, Run]

    def bound(self, part: Callable[[Run], Tensor]) -> float:
        """Return RMS error / RMS value that float32 may reach on `part` of a run."""
        want = part(self.exact)
        errors = torch.stack([part(run) - want for run in self.disturbed])
        return float(errors.square().mean().sqrt() / want.square().mean().sqrt())

    def ids(self) -> list[Tensor]:
        """Return the routed ids [T, moe_layer, k] of every run, in its routers' order: of the exact run first."""
        return [torch.stack([ids for ids, _ in run.routing], 1) for run in (self.exact, *self.disturbed)]

    def check_logits(self, got: Tensor, first: int = 0, end: int | None = None, name: str = "logits") -> None:
        """Fail where logits after the tokens first:end are further away than float32's error there, or over all."""
        rows = slice(first, end)
        bound = max(self.bound(lambda run: run.logits[rows]), self.bound(lambda run: run.logits))
        assert_close(name, got, self.exact.logits[rows], bound)

    def check_routing(self, moe_layer: int, got: Tensor) -> None:
        """Fail unless weights [T, E], NaN where an expert was not chosen, are of the same ids and close."""
        want, name = self.exact.spread(moe_layer, got.shape[1]), f"router {moe_layer}"
        assert torch.equal(got.isnan(), want.isnan()), f"ids of {name}"
        bound = self.bound(lambda run: run.spread(moe_layer, got.shape[1]).nan_to_num())
        assert_close(f"weights of {name}", got.nan_to_num(), want.nan_to_num(), max(bound, LEAST))


def spread(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Ids and weights [T, k] -> weights [T, E], NaN where an expert was not chosen: the order of the k says nothing."""
    return weights.new_full((len(ids), experts), float("nan")).scatter_(1, ids, weights)


def reference_of(model: Any, ids: list[int]) -> Reference:
    """Return the reference of a transformers model; hooks on it stay in force.

    Fails where the noise changes which experts are chosen: there float32 need not choose as float64 does, and other
    inputs have to be found.
    """
    runs = [run_in_double(model, ids, noise) for noise in (0.0, NOISE, -NOISE)]
    for moe_layer, chosen in enumerate(zip(*(run.routing for run in runs), strict=True)):
        exact, *others = (ids.sort(-1).values for ids, _ in chosen)
        assert all(torch.equal(exact, other) for other in others), (
            f"router {moe_layer}: a near tie, choose other inputs"
        )
    return Reference(runs[0], (runs[1], runs[2]))


@torch.no_grad()
def run_in_double(model: Any, ids: list[int], noise: float) -> Run:
    model = deepcopy(model).double()
    model.set_experts_implementation("eager")  # the default one multiplies in float32 at most
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    seen: list[tuple[Tensor, Tensor]] = []

    def heard(_module: Any, _inputs: Any, out: Any) -> None:
        weights, ids = out[1:] if len(out) == 3 else out[0].max(-1, keepdim=True)  # Llama 4's: zeros but for one
        seen.append((ids, weights))

    for module in model.modules():
        if type(module).__name__.endswith(("Router", "V1Gate")):
            module.register_forward_hook(heard)
    with InDouble():
        logits = model(torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float64
    return Run(logits, seen)
