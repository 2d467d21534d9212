"""The LightningModules of the training methods, and their options."""

from lit_rlhf.modules.dpo import DPO
from lit_rlhf.modules.guard import Guard
from lit_rlhf.modules.policy_gradient import PolicyGradient
from lit_rlhf.modules.reward_modeling import RewardModeling
from lit_rlhf.modules.sft import SFT
from lit_rlhf.modules.trpo import TRPO, TrustRegion
from lit_rlhf.modules.update import Update

__all__ = ["DPO", "SFT", "TRPO", "Guard", "PolicyGradient", "RewardModeling", "TrustRegion", "Update"]
