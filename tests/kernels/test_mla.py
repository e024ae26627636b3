"""Latent attention through Triton's interpreter, against its naive twins."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels.formats import dequantise
from offmoe.kernels.mla import Latent, expand, latent_attention
from offmoe.kernels.planes import Matrix, matrix, rearrange_matrix
from offmoe.kernels.rope import rope_table
from offmoe.kernels.striped import stripe, unstripe
from offmoe.mixers.latent.rows import positioned

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)
from offmoe.kernels.gpu import mla as fast

CTX, SCALE = 192, 0.3
SMALL = Latent(0, 64, 32, 16, 32)
CPU = torch.device("cpu")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    heads: int = 4
    z: Latent = SMALL
    dtype: torch.dtype = torch.float32
    format: str = "F32"

    def part(self, *shape: int, seed: int) -> tuple[Tensor, tuple[Tensor, Matrix]]:
        """A matrix for every head [heads, …], dequantised, and in slot layout."""
        weight = randn(*shape, seed=seed) / shape[-1] ** 0.5
        raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[self.format]))
        form = matrix(self.format, shape[0] * shape[1], shape[2])
        raw = raw.contiguous().view(torch.uint8).flatten()
        return dequantise(raw, self.format, form.rows, form.cols).view(shape), (rearrange_matrix(raw, form), form)


CASES = {
    "f32": Case(),
    "f16 cache": Case(dtype=torch.float16),
    "q8_0": Case(format="Q8_0"),
    "q4_0, one head more than a program has": Case(heads=17, format="Q4_0"),
    "two programs of ten heads": Case(heads=20, z=Latent(0, 32, 64, 16, 64)),
    "widths that are no powers of two": Case(heads=3, z=Latent(0, 96, 96, 24, 96)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("here", "splits"), [(0, 1), (7, 1), (16, 4), (45, 2), (63, 4), (190, 12)])
def test_one_token_is_the_twins(name: str, here: int, splits: int) -> None:
    case, z, heads = CASES[name], CASES[name].z, CASES[name].heads
    (k_b, k_part), (v_b, v_part) = (
        case.part(heads, z.kv_rank, z.qk_nope, seed=1),
        case.part(heads, z.value, z.kv_rank, seed=2),
    )
    query, fresh = randn(1, heads * z.key, seed=3 + here), 2 * randn(1, z.width, seed=4 + here)
    norm, table = 1 + 0.3 * randn(z.kv_rank, seed=5), rope_table(CTX, z.qk_rope, 1e4, CPU)
    cache, position = randn(CTX, z.width, seed=6).to(case.dtype), torch.tensor([here])
    cache[here:] = torch.nan
    qk_nope, qk_rope, row = positioned(query, fresh, norm, table, position, heads, z)
    known = torch.cat((cache[:here].float(), row.to(case.dtype).float()))
    want = latent_attention(qk_nope, qk_rope, known, k_b, v_b, position, SCALE).flatten()

    mixed, absorbed = torch.full((heads * z.value,), torch.nan), torch.full((heads * z.kv_rank,), torch.nan)
    partial = torch.full((fast.partial_size(heads, z, splits, CPU),), torch.nan)
    given = torch.cat((stripe(query[0, : heads * z.qk_nope]), query[0, heads * z.qk_nope :]))
    fast.decode_latents(
        given, fresh[0], cache, position, table, norm, k_part, v_part, mixed, absorbed, partial, heads=heads, latent=z,
        scale=SCALE, splits=splits, split_size=16, block=16,
    )  # fmt: skip
    ratio = 1e-5 if case.dtype == torch.float32 else 2e-3
    assert_close("the new row", cache[here : here + 1], row, ratio)
    assert cache[here + 1 :].isnan().all(), "a later row was written"
    assert_close(f"{name}: mixed at {here}", unstripe(mixed), want, ratio)


def test_nothing_is_written_behind_the_context() -> None:
    """At position ctx (a step launched past the end)."""
    case, z = Case(), Case().z
    (_, k_part), (_, v_part) = case.part(4, z.kv_rank, z.qk_nope, seed=1), case.part(4, z.value, z.kv_rank, seed=2)
    cache = randn(2 * CTX, z.width, seed=6)
    before = cache.clone()
    fast.decode_latents(
        randn(4 * z.key, seed=1), randn(z.width, seed=2), cache[:CTX], torch.tensor([CTX]),
        rope_table(CTX, z.qk_rope, 1e4, CPU), torch.ones(z.kv_rank), k_part, v_part, torch.zeros(4 * z.value),
        torch.zeros(4 * z.kv_rank), torch.zeros(fast.partial_size(4, z, 2, CPU)), heads=4, latent=z, scale=1.0,
        splits=2, split_size=32,
    )  # fmt: skip
    assert torch.equal(cache, before)


def test_absorbed_and_expanded_attention_agree() -> None:
    """The latents' space is only another order of products."""
    z, heads, tokens = Latent(0, 64, 32, 16, 24), 4, 9
    k_b, v_b = randn(heads, z.kv_rank, z.qk_nope, seed=1), randn(heads, z.value, z.kv_rank, seed=2)
    qk_nope, qk_rope, cache = (
        randn(*s, seed=i) for i, s in enumerate(((tokens, heads, 32), (tokens, heads, 16), (12, 80)))
    )
    positions = torch.arange(3, 12)
    keys, values = expand(cache, k_b, v_b)
    scores = torch.einsum("thd,hsd->hts", torch.cat((qk_nope, qk_rope), 2), keys) * SCALE
    scores.masked_fill_(torch.arange(12) > positions[:, None], -torch.inf)
    want = torch.einsum("hts,hsv->thv", scores.softmax(-1), values)
    assert_close("mixed", latent_attention(qk_nope, qk_rope, cache, k_b, v_b, positions, SCALE), want, 1e-5)


def test_splits_are_few_enough_to_be_joined() -> None:
    assert fast.pick_splits(128, 16) == (1, 128)
    assert fast.pick_splits(8192, 16) == (64, 128)
    assert fast.pick_splits(163840, 128) == (16, 128)
    assert [fast.group_of(heads) for heads in (4, 16, 17, 20, 40, 64, 128)] == [4, 16, 1, 10, 10, 16, 16]
