"""Checkpoints: tensors and their byte ranges by name, in GGUF files and safetensors directories."""
