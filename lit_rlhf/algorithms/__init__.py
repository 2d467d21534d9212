"""The mathematics as functions of tensors, independent of configuration files, Lightning and transformers."""
