"""Search for the fastest settings on this machine (`offmoe tune`)."""
