"""The one tolerance of all tests."""

import torch


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, ratio: float) -> None:
    """Fails, naming the tensor, where RMS error / RMS value passes `ratio`, on NaN and on another shape."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.double().cpu(), want.double().cpu()
    for which, tensor in (("got", got), ("expected", want)):
        assert tensor.isfinite().all(), f"{name}: {which} holds {(~tensor.isfinite()).sum()} NaN or infinite values"
    error = (got - want).square().mean().sqrt()
    value = want.square().mean().sqrt()
    assert error <= ratio * value, f"{name}: RMS error {error:.3g} / RMS value {value:.3g} passes {ratio:g}"
