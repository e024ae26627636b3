"""What every mixer promises, with random weights: sizes, names, and that chunks, prompts and steps mix alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels.deltanet import Delta
from offmoe.kernels.formats import FORMATS, as_it_lies
from offmoe.kernels.mla import Latent
from offmoe.kernels.planes import matrix, rearrange_matrix
from offmoe.kernels.rope import AttentionTemperature
from offmoe.kernels.shortconv import ShortConv
from offmoe.kernels.striped import unstripe
from offmoe.mixers.base import MixerConfig
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.heads import cache as head_cache
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.mixers.latent.config import LatentConfig
from offmoe.mixers.protocols import Part, StepTensors
from offmoe.mixers.recurrent import LayerState, RecurrentConfig, States
from offmoe.mixers.registry import CONFIGS, device_mixer, host_mixer
from offmoe.mixers.rope import RopeConfig, RopeTables
from offmoe.mixers.shortconv.config import ShortConvConfig

CTX, HIDDEN, CPU = 32, 64, torch.device("cpu")
ROPE = RopeConfig(16, 10_000.0)
HEADS = HeadsConfig(heads=4, kv_heads=2, head_dim=16, rope=ROPE, eps=1e-6)
MIXERS: dict[str, MixerConfig] = {
    "heads": HEADS,
    "normed heads": replace(HEADS, qk_norm="head", value_norm=True, qkv_bias=True, o_bias=True),
    "all heads normed, clipped": replace(HEADS, qk_norm="full", clip=1.0, scale=0.5),
    "normed after": replace(HEADS, qk_norm="after"),
    "windowed, with sinks": replace(HEADS, window=5, sinks=True),
    "chunked": replace(HEADS, window=6, chunked=True, qk_norm="unit"),
    "no positions": replace(HEADS, rope=None, qk_norm="unit", temperature=AttentionTemperature(3, 0.5)),
    "gated": replace(HEADS, gated=True, rope=RopeConfig(8, 10_000.0)),
    "latent": LatentConfig(4, Latent(0, 32, 32, 16, 32), ROPE),
    "latent queries": LatentConfig(3, Latent(64, 32, 32, 16, 64), ROPE),
    "deltanet": DeltaConfig(Delta(2, 4, 16, 16, 4), 1e-6),
    "shortconv": ShortConvConfig(ShortConv(HIDDEN, 3)),
}
every = pytest.mark.parametrize("name", MIXERS)


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_cache, "SLACK", 3)


class Random:
    """Tensors of one layer by role: normal numbers, the same every time, norms around 1."""

    device, dtype, tiled = CPU, torch.float32, False

    def __init__(self, config: MixerConfig) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ropes, self._config = RopeTables(CTX, CPU), config
        self._weights = {
            role: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 3)
            + float(role.endswith("norm"))
            for role, shape in config.shapes(HIDDEN).items()
        }

    def has(self, role: str) -> bool:
        return role in self._weights

    def load(self, role: str, dtype: torch.dtype | None = None) -> Tensor:
        order = self._config.row_order(role, interleaved=False)
        return self._weights[role] if order is None else self._weights[role][order]

    def raw(self, role: str) -> tuple[str, Tensor]:
        order, weight = self._config.row_order(role, interleaved=False, striped=True), self._weights[role]
        weight = weight if order is None else weight[order]
        return "F32", weight.contiguous().view(torch.uint8).view(len(weight), -1)

    def parts(self, *roles: str, cols: int) -> tuple[Part, ...]:
        return tuple(self.in_slots(*self.raw(role), cols) for role in roles)

    def in_slots(self, fmt: str, raw: Tensor, cols: int) -> Part:
        form = matrix(fmt, len(raw), cols)
        return rearrange_matrix(as_it_lies(raw, FORMATS[fmt]), form), form


def cache_of(config: MixerConfig) -> Any:
    if isinstance(config, RecurrentConfig):
        return LayerState(States([config], CPU), 0)
    return config.cache(CTX, CPU, torch.float32, False)


def projected(config: MixerConfig, tokens: int) -> Tensor:
    return torch.randn(tokens, config.projected, generator=torch.Generator().manual_seed(2))


def run(mixer: Any, cache: Any, given: Tensor, *stops: int) -> Tensor:
    """Mix `given` [T, P] in chunks that end at `stops`."""
    starts = (0, *stops[:-1])
    rows = [mixer.mix(given[a:b].clone(), cache, torch.arange(a, b), a) for a, b in zip(starts, stops, strict=True)]
    return torch.cat(rows)


@every
def test_sizes_follow_from_the_shapes(name: str) -> None:
    """in_proj and out_proj have as many rows and columns as a layer's matrices."""
    config = MIXERS[name]
    shapes, held = config.shapes(HIDDEN), config.held
    rows = sum(len(config.held_rows(role)) if held.get(role) == "q" else shapes[role][0] for role in config.in_proj)
    assert config.projected == rows
    assert shapes[config.out_proj] == (HIDDEN, config.mixed)
    assert all(role in shapes for role in (*config.in_bias, *([config.out_bias] if config.out_bias else [])))
    config.check()


@every
def test_every_role_has_a_name_in_both_formats(name: str) -> None:
    for names in (
        {role for config in CONFIGS for role in config.hf_names},
        {role for config in CONFIGS for role in config.gguf_names},
    ):
        assert names >= MIXERS[name].shapes(HIDDEN).keys()
    assert type(MIXERS[name]) in CONFIGS


@every
@pytest.mark.parametrize("striped", [False, True])
def test_row_orders_lose_no_row(name: str, striped: bool) -> None:
    for role, shape in MIXERS[name].shapes(HIDDEN).items():
        order = MIXERS[name].row_order(role, interleaved=True, striped=striped)
        if order is not None:
            assert order.sort().values.tolist() == list(range(min(shape[0], len(order))))


@every
def test_a_cache_is_as_large_as_the_plan_says(name: str) -> None:
    config, cache = MIXERS[name], cache_of(MIXERS[name])
    held = sum(tensor.nbytes for tensor in cache.tensors())
    assert held == config.cache_nbytes(CTX, 4, False) + config.state_nbytes
    if config.int8_cache and not isinstance(config, RecurrentConfig):
        small = config.cache(CTX, CPU, torch.float32, True)
        assert sum(tensor.nbytes for tensor in small.tensors()) == config.cache_nbytes(CTX, 4, True)


@every
def test_chunks_mix_as_one_prompt_does(name: str) -> None:
    config, given = MIXERS[name], projected(MIXERS[name], 24)
    mixer = host_mixer(config, Random(config))
    whole = run(mixer, cache_of(config), given, 24)
    assert whole.shape == (24, config.mixed)
    assert_close("chunks", run(mixer, cache_of(config), given, 7, 8, 17, 24), whole, 1e-5)


@every
def test_a_token_sees_none_behind_it_and_all_that_it_should(name: str) -> None:
    config, given = MIXERS[name], projected(MIXERS[name], 12)
    mixer, other = host_mixer(config, Random(config)), given.clone()
    other[6] += 1
    before, after = (run(mixer, cache_of(config), x, 12) for x in (given, other))
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[7], after[7]) or config.sees == 6, "a chunk begins at 6, and there 7 sees it"
    assert torch.allclose(before[11], after[11]) == (config.sees == 5 or isinstance(config, ShortConvConfig))


@every
def test_a_gpu_mixes_prompts_and_steps_as_the_cpu_does(name: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels themselves")
    config, given = MIXERS[name], projected(MIXERS[name], 14)
    want = run(host_mixer(config, Random(config)), cache_of(config), given, 14)
    mixer, cache = device_mixer(config, Random(config)), cache_of(config)
    assert_close("a prompt", run(mixer, cache, as_projected(config, given)[:12], 5, 12), want[:12], 1e-5)
    for at in (12, 13):
        scratch = {n: torch.zeros(size, dtype=kind) for n, (size, kind) in mixer.scratch(CTX, 4, CPU).items()}
        position, status = (torch.tensor([n], dtype=torch.int32) for n in (at, 0))
        step = StepTensors(position, status, scratch, CTX, 4, pdl=False)
        mixed = torch.full((1, config.mixed), torch.nan)
        mixer.launch(as_projected(config, given)[at : at + 1].contiguous(), mixed, cache, step)
        assert_close(f"the step at {at}", unstripe(mixed[0]), want[at], 1e-5)


def as_projected(config: MixerConfig, given: Tensor) -> Tensor:
    """Columns of `given` in the order in which a GPU's in_proj gives them."""
    if not isinstance(config, LatentConfig):
        return given
    role, rows = config.in_proj[0], given.shape[1] - config.latent.width
    natural, striped = (config.row_order(role, False, striped=flag) for flag in (False, True))
    place = torch.arange(rows) if natural is None else natural.argsort()  # of each of the file's rows
    assert striped is not None
    return torch.cat((given[:, :rows][:, place[striped]], given[:, rows:]), dim=1)
