"""Conversion of safetensors to GGUF (`offmoe pack`)."""
