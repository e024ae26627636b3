"""Routing traces: recording, conversion, statistics (`offmoe trace`)."""
