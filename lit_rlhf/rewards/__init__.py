"""Rewards (models, judges, functions, services and checkable answers) and their combination into one score."""

from lit_rlhf.rewards.answers import ExactAnswer, NumericAnswer
from lit_rlhf.rewards.chat import ChatEndpoint
from lit_rlhf.rewards.function import RewardFunction
from lit_rlhf.rewards.judge import Judge, PairwiseJudge
from lit_rlhf.rewards.length import OverlongPenalty
from lit_rlhf.rewards.model import RewardModel
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.reward import Reward, make_reward_inputs
from lit_rlhf.rewards.scores import Scores, ScoreShaping

__all__ = [
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
    "Scores",
    "make_reward_inputs",
]
