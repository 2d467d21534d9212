"""The LightningModules."""

from lit_rlhf.modules.policy_gradient import PolicyGradient
from lit_rlhf.modules.sft import SFT
from lit_rlhf.modules.trpo import TRPO, TrustRegion
from lit_rlhf.modules.update import ReferenceKL, Update

__all__ = ["SFT", "TRPO", "PolicyGradient", "ReferenceKL", "TrustRegion", "Update"]
