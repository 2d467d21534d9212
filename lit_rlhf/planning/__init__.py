"""What a run needs, computed from its configuration: memory, FLOPs and time."""
