"""The policy lab: traces, replay, live measurements and tuning. Its commands are in the files named *_cli."""
