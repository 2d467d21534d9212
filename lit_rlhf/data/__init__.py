"""Prompts to answer and demonstrations to imitate."""

from lit_rlhf.data.demonstrations import Demonstrations
from lit_rlhf.data.prompts import Prompts
from lit_rlhf.data.records import Source

__all__ = ["Demonstrations", "Prompts", "Source"]
