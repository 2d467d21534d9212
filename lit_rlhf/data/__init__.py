"""Prompts to answer and demonstrations to imitate."""

from lit_rlhf.data.demonstrations import Demonstrations
from lit_rlhf.data.prompts import Prompts

__all__ = ["Demonstrations", "Prompts"]
