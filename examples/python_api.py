"""Load a model, stream an answer, print what it cost: `python examples/python_api.py [MODEL]`."""

import sys

import offmoe

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo"

with offmoe.load(MODEL, vram="50%") as engine:
    for piece in engine.generate("What is the capital of France?", temperature=0, max_tokens=32):
        print(piece.text, end="", flush=True)
    stats = engine.stats()

print()
print(f"{stats.tokens} tokens, {stats.decode_tok_s:.1f} tok/s, hit rate {stats.hit_rate:.1%}")
if stats.roof:
    print(f"roof {stats.roof.tok_s:.1f} tok/s, set by {stats.roof.limit}")
