"""Kimi K2: DeepSeek-V3's layout under a name of its own, with more experts in one group."""

from dataclasses import replace

from offmoe.models.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, model_type="kimi_k2", published="Kimi-K2-Instruct", priority=0)
