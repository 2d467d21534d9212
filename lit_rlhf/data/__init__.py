"""The data modules: prompts to answer, demonstrations to imitate, and preferences to learn from.

Records and their tokens are memory-mapped from the cache of `datasets`, in the folder that the environment variable
``HF_DATASETS_CACHE`` names (``~/.cache/huggingface/datasets`` by default); that folder can be deleted between runs.
The records of a Python function and their tokens stay in memory.
"""

from lit_rlhf.data.demonstrations import Demonstrations
from lit_rlhf.data.preferences import Preferences
from lit_rlhf.data.prompts import Prompts

__all__ = ["Demonstrations", "Preferences", "Prompts"]
