"""The mathematics: tensors in, tensors out; no configuration files, no Lightning, no transformers."""
