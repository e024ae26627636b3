"""Dequantisers against gguf's, bit for bit, on any bytes at any place in memory."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from offmoe.kernels.formats import FORMATS, GGML, Format, dequantise

every_format = pytest.mark.parametrize("fmt", GGML.values(), ids=GGML)


def oracle(raw: torch.Tensor, fmt: Format, rows: int, cols: int) -> torch.Tensor:
    quant = gguf.GGMLQuantizationType(fmt.gguf_type)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.contiguous().numpy().reshape(-1, fmt.nbytes(1, cols)), quant)
    return torch.from_numpy(values).reshape(*raw.shape[:-1], rows, cols)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits (so -0 is not 0); any NaN equals any other."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype == torch.float32
    same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    assert same.all(), f"{(~same).sum()} of {same.numel()} weights differ"


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_table_is_ggmls() -> None:
    for name, fmt in GGML.items():
        quant = gguf.GGMLQuantizationType[name]
        assert (fmt.name, fmt.gguf_type) == (name, quant)
        assert (fmt.block, fmt.bytes) == gguf.GGML_QUANT_SIZES[quant]


@every_format
def test_random_bytes(fmt: Format) -> None:
    rows, cols = 3, 2 * max(fmt.block, 16)
    raw = random_bytes(50, fmt.nbytes(rows, cols))
    assert_same_bits(dequantise(raw, fmt, rows, cols), oracle(raw, fmt, rows, cols))


@every_format
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_extreme_blocks(fmt: Format, data: st.DataObject) -> None:
    """Runs of 00, 7f, 80, ff and friends: infinite and NaN scales, denormals, -0, the ends of every field."""
    extreme = st.sampled_from([0x00, 0x01, 0x7F, 0x80, 0x7C, 0xFC, 0xFE, 0xFF]) | st.integers(0, 255)
    cols = max(fmt.block, 32)
    size = fmt.nbytes(2, cols)
    raw = torch.tensor(data.draw(st.lists(extreme, min_size=size, max_size=size)), dtype=torch.uint8)
    assert_same_bits(dequantise(raw, fmt, 2, cols), oracle(raw, fmt, 2, cols))


@every_format
@pytest.mark.parametrize("offset", [1, 2, 6])
def test_parts_of_packed_records(fmt: Format, offset: int) -> None:
    """A batch of records, the part starting anywhere in each, the records an odd number of bytes apart."""
    rows, cols = 2, max(fmt.block, 32)
    size = fmt.nbytes(rows, cols)
    records = random_bytes(4, offset + size + 3)
    before = records.clone()
    part = records[:, offset : offset + size]
    assert_same_bits(dequantise(part, fmt, rows, cols), oracle(part, fmt, rows, cols))
    assert_same_bits(dequantise(part[1], fmt, rows, cols), oracle(part[1], fmt, rows, cols))
    assert torch.equal(records, before), "the records themselves changed"


@every_format
def test_other_dtypes_round_once(fmt: Format) -> None:
    cols = max(fmt.block, 32)
    raw = random_bytes(fmt.nbytes(4, cols))
    for dtype in (torch.bfloat16, torch.float16):
        got, want = dequantise(raw, fmt.name, 4, cols, dtype), dequantise(raw, fmt, 4, cols).to(dtype)
        assert got.dtype == dtype
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_q8_0_is_close_to_what_was_quantised() -> None:
    """The oracle's own round trip, so that the layout is checked against values and not only against gguf."""
    want = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    raw = torch.from_numpy(gguf.quants.quantize(want.numpy(), gguf.GGMLQuantizationType.Q8_0))
    assert_close("q8_0", dequantise(raw.flatten(), "Q8_0", 8, 64), want, 0.01)


def test_pairs_are_mxfp4_with_neighbours_in_a_byte() -> None:
    """As transformers unpacks gpt-oss's blocks and scales, and not as ggml has them."""
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_bytes(2, 6, 3, 16), random_bytes(2, 6, 3, seed=1) // 2 + 64
    raw = torch.cat((scales.flatten(1), blocks.flatten(1)), dim=1)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT  # theirs are transposed
    assert torch.equal(dequantise(raw, "MXFP4_PAIRS", 6, 96), want)  # their -0 is our 0


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 33 weights is no whole number of Q4_0 blocks of 32"):
        FORMATS["Q4_0"].nbytes(1, 33)
    with pytest.raises(ValueError, match=r"Q4_0 \[1, 32\] is 18 bytes, got 17"):
        dequantise(torch.zeros(17, dtype=torch.uint8), "Q4_0", 1, 32)


def test_assert_close_can_fail() -> None:
    one = torch.ones(3)
    assert_close("same", one, one, 0.0)
    for bad in (one * 1.02, torch.ones(3, 1), one.clone().fill_(float("nan"))):
        with pytest.raises(AssertionError, match="weights"):
            assert_close("weights", bad, one, 0.01)
    with pytest.raises(AssertionError, match="weights: expected holds 3"):
        assert_close("weights", one, one * float("inf"), 0.01)
