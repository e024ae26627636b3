"""Replay of policies and predictors over traces (`offmoe bench policies`)."""
