"""One file a model family, named after its `model_type`."""
