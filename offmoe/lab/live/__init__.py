"""Live measurements of an engine (`offmoe bench latency`)."""
