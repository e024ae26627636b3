"""Tokenizers, chat templates, and the parts of an answer."""
