"""Routed experts: slots in VRAM, rows in RAM, and the disk behind them."""
