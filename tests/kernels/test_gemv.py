"""GEMV in every format against float64; what is not in a slot is NaN, and what is not to be written stays so."""

from __future__ import annotations

import pytest
from kernel_tensors import DEVICE, nan, randn
from quantised_matrices import EXTREMES, TESTED, random_matrix
from tolerance import assert_close
from torch import Tensor

from offmoe.kernels import gemv as naive
from offmoe.kernels.formats import FORMATS
from offmoe.kernels.planes import matrix, rearrange_matrix

pytest.importorskip("triton")
from offmoe.kernels.gpu import gemv as fast

RATIO = 2e-6


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("fmt", TESTED)
def test_extreme_blocks(fmt: str, kind: str) -> None:
    """Sums in float64 of codes that are all alike, of scales that are subnormal, or 0."""
    cols = 512 if FORMATS[fmt].block > 32 else 160
    form = matrix(fmt, 5, cols)
    buffer = rearrange_matrix(random_matrix(fmt, 5, cols, kind=kind)[0], form).to(DEVICE)
    x, out = 1 + 0.1 * randn(1, cols), nan(1, 5)
    want = out.double()
    fast.dense(x, [(buffer, form)], out)
    naive.dense(x, [(buffer, form)], want)
    if kind == "zero":
        assert (out == 0).all()
        assert (want == 0).all()
    else:
        assert want.abs().min() > 0
        # Q8_0's -1 is 127 - 128 there: what is left of two large sums
        assert_close(f"{fmt} {kind}", out, want, 2e-5 if (fmt, kind) == ("Q8_0", "ones") else RATIO)


def parts_of(cols: int, *formats: str) -> list[tuple[Tensor, fast.Matrix]]:
    """37, 5 and 18 rows: no whole number of programs."""
    parts = []
    for i, (fmt, rows) in enumerate(zip(formats, (37, 5, 18), strict=False)):
        form = matrix(fmt, rows, cols)
        parts.append((rearrange_matrix(random_matrix(fmt, rows, cols, seed=i)[0], form).to(DEVICE), form))
    return parts


@pytest.mark.parametrize("formats", [("Q5_0",), ("Q4_K", "F16", "Q6_K"), ("Q8_0", "Q4_0", "BF16"), ("F32", "MXFP4")])
@pytest.mark.parametrize("tokens", [1, 2])
def test_parts_of_different_formats_with_norm(formats: tuple[str, ...], tokens: int) -> None:
    cols = 256 if any(FORMATS[f].block == 256 for f in formats) else 224
    parts = parts_of(cols, *formats)
    x, norm = 30 * randn(tokens, cols), randn(cols, seed=5)
    out = nan(tokens, sum(form.rows for _, form in parts))
    want = out.double()
    fast.dense(x, parts, out, norm=norm, eps=1e-5)
    naive.dense(x, parts, want, norm=norm, eps=1e-5)
    assert_close("out", out, want, RATIO)


@pytest.mark.parametrize("fmt", ["Q5_K", "Q4_1"])
def test_residual(fmt: str) -> None:
    """Twice, so that a result which is not added shows."""
    cols = 768 if fmt == "Q5_K" else 96
    parts = parts_of(cols, fmt)
    x, out = randn(2, cols), randn(2, 37, seed=6)
    want = out.double()
    for bias in (None, randn(37, seed=7)):
        fast.dense(x, parts, out, residual=True, bias=bias)
        naive.dense(x, parts, want, residual=True, bias=bias)
    assert_close("out", out, want, RATIO)


def test_a_row_of_several_warps() -> None:
    parts, x = parts_of(5120, "Q6_K", "Q4_0", "MXFP4_PAIRS"), randn(1, 5120)
    out = nan(1, 60)
    want = out.double()
    fast.dense(x, parts, out)
    naive.dense(x, parts, want)
    assert_close("out", out, want, RATIO)
