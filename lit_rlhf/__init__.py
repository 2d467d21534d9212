"""lit-rlhf: align language models with human preferences by reinforcement learning, built on Lightning.

Each public name is imported when it is first used, so that ``import lit_rlhf`` itself is fast.
"""

import importlib
from typing import Any

_PUBLIC = {
    "algorithms.advantages": (
        "GAE",
        "TD0",
        "AdvantageEstimator",
        "MonteCarlo",
        "NStep",
    ),
    "algorithms.corrections": ("Correction",),
    "algorithms.group_baselines": ("BestOfN", "GroupNormalized", "LeaveOneOut"),
    "algorithms.kl": ("AdaptiveKL", "FixedKL", "KLController", "ReferenceKL"),
    "algorithms.objectives": ("Clip", "KLPenalty", "Objective", "PolicyLoss", "Surrogate", "VanillaPG"),
    "algorithms.off_policy_objectives": ("CISPO", "DPPO"),
    "algorithms.preference_losses": ("IPO", "Hinge", "PreferenceLoss", "SimPO"),
    "algorithms.vtrace": ("VTrace",),
    "callbacks": (
        "ActivationCheckpointing",
        "CollapseGuard",
        "CompileLayers",
        "ExportAtEnd",
        "GradientShares",
        "IterationCheckpoint",
        "KLGuard",
        "LogDetails",
        "MetricsFile",
        "Predictions",
        "PrintPlan",
        "ProgressBar",
        "Samples",
        "Summary",
        "Throughput",
        "WriteReport",
        "default_callbacks",
    ),
    "data": ("Demonstrations", "Preferences", "Prompts"),
    "errors": ("UserError",),
    "generation": ("Ahead", "Engine", "NativeEngine", "Sampling", "VLLMEngine"),
    "models.adapters": ("LoRA",),
    "models.loading": ("RandomWeights",),
    "modules": (
        "DPO",
        "Guard",
        "SFT",
        "TRPO",
        "PolicyGradient",
        "RewardModeling",
        "TrustRegion",
        "Update",
    ),
    "modules.averaging": ("Averaging",),
    "modules.schedules": ("LinearDecay",),
    "modules.dynamic_sampling": ("DynamicSampling",),
    "modules.hooks": ("OnPolicyCallback",),
    "rewards": (
        "ChatEndpoint",
        "ExactAnswer",
        "Judge",
        "NumericAnswer",
        "OverlongPenalty",
        "PairwiseJudge",
        "RemoteReward",
        "Reward",
        "RewardFunction",
        "RewardModel",
        "ScoreShaping",
    ),
    "strategies": ("FSDP", "FSDP2"),
    "types": ("RewardInputs", "Estimates", "Experience", "ScoredRollout", "PromptBatch", "Rollout", "Trajectory"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_rlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
