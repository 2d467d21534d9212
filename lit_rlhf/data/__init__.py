"""Prompts to answer, demonstrations to imitate, preferences to learn from."""

from lit_rlhf.data.demonstrations import Demonstrations
from lit_rlhf.data.preferences import Preferences
from lit_rlhf.data.prompts import Prompts

__all__ = ["Demonstrations", "Preferences", "Prompts"]
