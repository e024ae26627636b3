"""The policies by name: to add one, write its file and its line here."""

from offmoe.cache.policies.base import Policy
from offmoe.cache.policies.belady import Belady, BeladyBypass
from offmoe.cache.policies.crf import CRF
from offmoe.cache.policies.lfru import LFRU
from offmoe.cache.policies.lfu import LFU
from offmoe.cache.policies.lru import LRU

POLICIES: dict[str, type[Policy]] = {"lru": LRU, "crf": CRF, "lfu": LFU, "lfru": LFRU}
OFFLINE: dict[str, type[Belady]] = {"belady": Belady, "belady-bypass": BeladyBypass}
