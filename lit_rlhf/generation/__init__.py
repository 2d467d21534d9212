"""Generation of responses: the engine interface and the engines."""

from lit_rlhf.generation.ahead import Ahead
from lit_rlhf.generation.engine import Engine, Sampling
from lit_rlhf.generation.native import NativeEngine
from lit_rlhf.generation.vllm import VLLMEngine

__all__ = ["Ahead", "Engine", "NativeEngine", "Sampling", "VLLMEngine"]
