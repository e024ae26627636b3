"""Attention of query heads over cached keys and values: grouped, windowed or chunked, with sinks, gates and biases."""
