"""From prompts to responses: the engine protocol and the engines."""

from lit_rlhf.generation.engine import Engine, Sampling
from lit_rlhf.generation.native import NativeEngine

__all__ = ["Engine", "NativeEngine", "Sampling"]
