"""How the GPU asks the host for records in the middle of a step: int32 words in pinned memory, for k records at most.

The GPU writes the first line and stores its sequence number last, after a fence; the host answers in the second and
stores the number there last. One request at a time: the next comes after the copies of the one before.

| words | written by | what |
|---|---|---|
| 0 | GPU | sequence number of the request |
| 1 | GPU | n |
| 2 … 2 + n | GPU | records, all of one layer |
| A = answer_word(k) | host | sequence number of the request that is answered |
| A + 1 | host | 0, or 1: it failed |
| A + 2 … A + 2 + 2n | host | addresses, int64 |
"""

from __future__ import annotations

COUNT, RECORDS = 1, 2
ERROR, ADDRESSES = 1, 2  # from answer_word on


def answer_word(k: int) -> int:
    """Return the word at which the host's half begins: in a 64-byte line of its own."""
    return -(-(RECORDS + k) // 16) * 16


def mailbox_words(k: int) -> int:
    return answer_word(k) + -(-(ADDRESSES + 2 * k) // 16) * 16
