"""Reports and figures of live measurements."""
