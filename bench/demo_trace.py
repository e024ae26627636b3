"""Records tests/data/demo_trace.npz: the demo model's routing over real prompts, greedy, with its prompts.

python bench/demo_trace.py tests/data/demo_trace.npz
"""

import sys

import numpy as np

import offmoe
from offmoe.cache.trace import Trace

PROMPTS = (
    "Hello! How are you today?",
    "Tell me a short story about a fox who learns to share.",
    "What is the capital of France, and what is it famous for?",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for staying healthy.",
    "Write a Python function that adds two numbers.",
    "Describe the sea on a stormy night.",
    "What should I cook for dinner with rice and beans?",
)
TOKENS = 64


def record(prompts: tuple[str, ...], tokens: int) -> Trace:
    """One sequence a prompt, at most `tokens` decoded."""
    with offmoe.load("demo", device="cpu") as engine:
        layers, k = engine.config.layers, engine.config.top_k
        passes: list[list[np.ndarray]] = []

        def routed(layer: int, ids: np.ndarray, weights: object) -> None:
            if layer == 0:
                passes.append([])
            passes[-1].append(ids.astype(np.uint8))

        engine.store.routed = routed
        decoded, prefill = [], []
        for prompt in prompts:
            passes.clear()
            engine.reset()
            list(engine.generate(prompt, temperature=0.0, max_tokens=tokens + 1))
            forwards = [np.stack(layer, axis=1) for layer in passes]  # [T, layers, k] each
            prefill.append(forwards[0])
            decoded.append(np.concatenate(forwards[1:]) if forwards[1:] else np.empty((0, layers, k), np.uint8))
    kept = [i for i, sequence in enumerate(decoded) if len(sequence)]
    meta = {"model": "SmolMoE-92M-A56M-demo", "layers": layers, "experts": engine.config.experts, "top_k": k,
            "phase": "decode", "licence": "Apache-2.0"}  # fmt: skip
    return Trace(
        experts=np.concatenate([decoded[i] for i in kept]),
        offsets=np.cumsum([0] + [len(decoded[i]) for i in kept]),
        meta=meta,
        prefill=np.concatenate([prefill[i] for i in kept]),
        prefill_offsets=np.cumsum([0] + [len(prefill[i]) for i in kept]),
    )


if __name__ == "__main__":
    record(PROMPTS, TOKENS).save(sys.argv[1])
