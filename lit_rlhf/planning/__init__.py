"""The memory, the FLOPs and the time that a run needs, computed from its configuration."""
