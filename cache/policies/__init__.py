"""The policies by name: to add one, write its file and its line here."""

from offmoe.cache.policies.base import Policy
from offmoe.cache.policies.belady import Belady, BeladyBypass
from offmoe.cache.policies.crf import CRF
from offmoe.cache.policies.echo import Echo
from offmoe.cache.policies.least_stale import LeastStale
from offmoe.cache.policies.lfru import LFRU
from offmoe.cache.policies.lfu import LFU
from offmoe.cache.policies.lru import LRU
from offmoe.cache.policies.none import NoCache
from offmoe.cache.policies.random import Random
from offmoe.cache.policies.slru import SLRU
from offmoe.cache.policies.static import Static, StaticLRU
from offmoe.cache.policies.tinylfu import TinyLFU

# An engine and a replay may use these,
POLICIES: dict[str, type[Policy]] = {
    "lru": LRU,
    "crf": CRF,
    "lfu": LFU,
    "lfru": LFRU,
    "slru": SLRU,
    "least-stale": LeastStale,
    "static+lru": StaticLRU,
    "random": Random,
    "echo": Echo,
}
# these a replay alone: they know the future, or leave misses without a slot.
REPLAY_ONLY: dict[str, type[Policy]] = {
    "none": NoCache,
    "static": Static,
    "crf+tinylfu": TinyLFU,
    "belady": Belady,
    "belady-bypass": BeladyBypass,
}
