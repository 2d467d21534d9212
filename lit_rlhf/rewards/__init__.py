"""What makes a response good: reward models, Python functions, verifiable answers, and how they become one score."""

from lit_rlhf.rewards.answers import ExactAnswer, NumericAnswer
from lit_rlhf.rewards.function import RewardFunction
from lit_rlhf.rewards.model import RewardModel
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.rewards.scores import Scores, ScoreShaping

__all__ = ["ExactAnswer", "NumericAnswer", "Reward", "RewardFunction", "RewardModel", "ScoreShaping", "Scores"]
