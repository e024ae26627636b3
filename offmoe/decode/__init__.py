"""Decoding one token at a time: a captured CUDA graph, or eagerly on the CPU."""
