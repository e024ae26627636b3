"""Names of the files of a model. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
TEMPLATES = "additional_chat_templates/"
ADAPTER, CONSOLIDATED = "adapter", "consolidated"  # beginnings of file names: LoRA adapters, Mistral's second copy


def join_names(names: Iterable[object], limit: int = 4) -> str:
    """Return the first `limit` names, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
