"""`compiled_at_once` on a driver that cannot launch: prints what came of two kernels, as a line of JSON."""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from offmoe.kernels.gpu import norm_rope
from offmoe.kernels.gpu.launch import compiled_at_once


class Paper:
    """A GPU on paper."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


driver.set_active(Paper())
run = triton.JITFunction.run
out = torch.full((1, 2048), float("nan"))
with compiled_at_once():
    for width in (2048, 1024):
        x = torch.ones((1, width))
        norm_rope.rms_norm(x, x[0], 1e-6, out[:, :width].contiguous())
    during = triton.JITFunction.run
kernels = norm_rope._rms_norm.device_caches[0][0].values()
print(json.dumps({
    "compiled": sorted(type(kernel).__name__ for kernel in kernels),
    "untouched": bool(out.isnan().all()),
    "restored": triton.JITFunction.run is run and during is not run,
}))  # fmt: skip
