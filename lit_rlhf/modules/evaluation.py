"""What a validation measures on held-out prompts."""

from collections.abc import Mapping

from torch import Tensor

from lit_rlhf.modules.metrics import Means
from lit_rlhf.types import Rollout


class Evaluation:
    """Mean score and its deviation, KL, length, truncation, and the win rate against the reference.

    The win rate is the share of prompts where the actor's score is above the reference's on the same random numbers; a
    tie counts half. The reference does not change, so its scores are kept, by batch.
    """

    def __init__(self) -> None:
        self.means = Means()
        self.reference_scores: dict[int, Tensor] = {}

    def start(self) -> None:
        """Start the sums."""
        self.means = Means()

    def add(
        self, batch_idx: int, rollout: Rollout, scores: Tensor, rewards: Mapping[str, Tensor], kl_to_ref: Tensor
    ) -> None:
        """Take a batch in.

        Args:
            batch_idx: Which; the reference's scores of it must be there.
            rollout: The actor's responses.
            scores: [B].
            rewards: [B] each, by name.
            kl_to_ref: [B], nats a response.
        """
        against = self.reference_scores[batch_idx]
        for name, value in {
            "score": scores,
            "score_squared": scores.double() ** 2,
            "kl_to_ref": kl_to_ref,
            "length": rollout.response_lengths,
            "truncated_fraction": (~rollout.terminated).float(),
            "win_rate": (scores > against).float() + 0.5 * (scores == against),
            **{f"rewards/{name}": reward for name, reward in rewards.items()},
        }.items():
            self.means.add(name, value)

    def compute(self) -> dict[str, float]:
        """All of them over all batches and ranks."""
        measured = self.means.compute()
        measured["score_std"] = max(0.0, measured.pop("score_squared") - measured["score"] ** 2) ** 0.5
        return measured
