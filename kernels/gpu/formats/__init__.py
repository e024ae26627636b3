"""Quantised formats in Triton: dot products (`dot_*`) and tiles (`tile_*`)."""
