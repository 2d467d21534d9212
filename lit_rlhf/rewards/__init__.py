"""Rewards (reward models, Python functions, services and checkable answers) and their combination into one score."""

from lit_rlhf.rewards.answers import ExactAnswer, NumericAnswer
from lit_rlhf.rewards.function import RewardFunction
from lit_rlhf.rewards.length import OverlongPenalty
from lit_rlhf.rewards.model import RewardModel
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.reward import Reward, make_reward_inputs
from lit_rlhf.rewards.scores import Scores, ScoreShaping

__all__ = [
    "ExactAnswer",
    "NumericAnswer",
    "OverlongPenalty",
    "RemoteReward",
    "Reward",
    "RewardFunction",
    "RewardModel",
    "ScoreShaping",
    "Scores",
    "make_reward_inputs",
]
