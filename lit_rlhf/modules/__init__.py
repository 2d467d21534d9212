"""The LightningModules."""

from lit_rlhf.modules.policy_gradient import PolicyGradient
from lit_rlhf.modules.sft import SFT
from lit_rlhf.modules.update import Update

__all__ = ["SFT", "PolicyGradient", "Update"]
