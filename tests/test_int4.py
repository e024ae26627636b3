"""Codes of 4 bits in groups: what they mean, and the files of compressed-tensors, AWQ and GPTQ that hold them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offmoe.kernels.formats import FORMATS, dequantise

INT4 = [name for name in FORMATS if name.startswith("INT4")]
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16}


def written(codes: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """(q - z) · s in the scales' own type, as AutoAWQ's and GPTQModel's dequantisation and compressed-tensors' have it:
    codes [R, C], zeros and scales [R, G]."""
    codes, zeros = codes.to(scale.dtype), zeros.to(scale.dtype)
    each = codes.shape[1] // scale.shape[1]
    return (codes - zeros.repeat_interleave(each, 1)) * scale.repeat_interleave(each, 1)


def record_bytes(codes: Tensor, zeros: Tensor | None, scale: Tensor) -> Tensor:
    """Of every group the scale and, in 2 bytes, the zero point; then the codes, two neighbours in a byte."""
    heads = [scale.view(torch.int16), *([] if zeros is None else [zeros.to(torch.int16)])]
    return torch.cat(
        (torch.stack(heads, -1).flatten().view(torch.uint8), (codes[:, ::2] | codes[:, 1::2] << 4).flatten())
    )


@pytest.mark.parametrize("fmt", INT4)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_values_are_those_of_the_published_formula(fmt: str, data: st.DataObject) -> None:
    """Scales of any bits: 0, denormal, infinite, NaN."""
    rows, groups, dtype = 2, 3, SCALES[fmt.split("_")[2]]
    codes = torch.randint(0, 16, (rows, groups * FORMATS[fmt].block), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if fmt.endswith("ZEROS") else None
    extreme = st.sampled_from([0, 1, 0x8000, 0x0080, 0x7BFF, 0x7C00, 0x7F80, 0x7FFF, 0xFF80]) | st.integers(0, 65535)
    bits = data.draw(st.lists(extreme, min_size=rows * groups, max_size=rows * groups))
    scale = torch.tensor(bits).to(torch.uint16).view(dtype).view(rows, groups)
    want = written(codes, torch.full((rows, groups), 8) if zeros is None else zeros, scale)
    got = dequantise(record_bytes(codes, zeros, scale), fmt, *codes.shape, dtype)
    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
    assert same.all()
