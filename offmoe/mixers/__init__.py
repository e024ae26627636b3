"""Ways of mixing tokens, one package each: attention heads, latent attention, gated DeltaNet, short convolution."""
