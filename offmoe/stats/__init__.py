"""Counters of an answer, and the roof that they are compared with."""
