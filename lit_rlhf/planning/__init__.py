"""What a training needs, computed from its configuration: memory, FLOPs and time."""
