"""Replay of policies and predictors on traces (`offmoe bench policies`)."""
