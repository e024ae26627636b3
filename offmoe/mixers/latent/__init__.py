"""Multi-head latent attention (MLA, arXiv 2405.04434): one latent a position stands for all heads' keys and values."""
