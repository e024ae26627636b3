"""Live measurements of the engine (`offmoe bench latency`)."""
