"""A checkout of llama.cpp, named by LLAMA_CPP_SOURCE: published vocabularies and templates."""

from __future__ import annotations

import os
from pathlib import Path

LLAMA_CPP = Path(os.environ.get("LLAMA_CPP_SOURCE", "/nonexistent"))  # a checkout: models/templates/*.jinja
WANT_TOOLS = (  # templates for tools alone: they fail without, in transformers too
    *("CohereForAI-c4ai-command-r-plus-tool_use", "fireworks-ai-llama-3-firefunction-v2"),
    *("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
)
