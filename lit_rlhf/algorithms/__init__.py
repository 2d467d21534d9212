"""The mathematics of the training methods on tensors, independent of configuration, Lightning and transformers."""
