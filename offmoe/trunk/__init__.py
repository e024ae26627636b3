"""Everything but the routed experts: resident weights, KV cache and recurrent state."""
