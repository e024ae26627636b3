"""The machine: pinned memory, disk reads, bandwidths, CUDA streams."""
