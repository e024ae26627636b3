"""Gated short convolution (LFM2, arXiv 2511.23404): every channel sees its last inputs."""
