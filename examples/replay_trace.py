"""Replay a routing trace under several policies and cache sizes: `python examples/replay_trace.py TRACE.npz`.

Traces come from `offmoe trace record MODEL --built-in -o TRACE.npz`.
"""

import sys

from offmoe.cache.replay import replay
from offmoe.cache.trace import Trace

trace = Trace.load(sys.argv[1])
tokens, layers, k = trace.experts.shape
print(f"{trace.meta['model']}: {tokens} tokens, {layers} MoE layers, {k} of {trace.meta['experts']} experts a token")
for share in (0.25, 0.5, 0.75):
    slots = max(k, int(trace.meta["experts"] * share))
    rates = {policy: replay(trace, policy, slots).hit_rate for policy in ("lru", "crf:h=16", "echo", "belady")}
    print(f"{slots:4} slots a layer  " + "  ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
