"""The fast twins, in Triton: each file beside the naive one of its name in offmoe.kernels. Needs triton to import."""
