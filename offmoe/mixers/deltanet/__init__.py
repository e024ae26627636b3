"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state is one matrix a head."""
