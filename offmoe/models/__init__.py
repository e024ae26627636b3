"""Model families over their weights; the engine drives them layer by layer."""
