"""Checkpoints: tensors and byte ranges by name, out of GGUF files and safetensors directories."""
