"""Routing traces: recorded, converted, described."""
