"""Triton kernels; each file is the fast twin of the naive one of its name in offmoe.kernels. Importing needs triton."""
