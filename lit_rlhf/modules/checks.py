"""Checks of an on-policy module's settings before anything is loaded."""

import warnings

from lit_rlhf.algorithms.advantages import AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.rewards import Scores


def check_settings(
    scores: Scores,
    sampling: Sampling,
    advantages: AdvantageEstimator,
    correction: Correction | None,
    *,
    has_critic: bool,
    bootstrap_truncated: bool,
) -> None:
    """Check that the settings of an on-policy module fit together; warn if a critic is trained but not used.

    Args:
        scores: The rewards and their combination.
        sampling: The options for sampling.
        advantages: The advantage estimator.
        correction: The correction for responses of another policy; None for no correction.
        has_critic: Whether the module has a critic, either with its own weights or on the actor's trunk.
        bootstrap_truncated: Whether the critic's value replaces the rewards after a truncated response.

    Raises:
        UserError: if there is no reward, the temperature is 0, truncated responses are to be bootstrapped without a
            critic, an estimator that compares the responses to a prompt gets only one, or the estimator and the
            correction would both weight the tokens.
    """
    if not scores.rewards:
        raise UserError("model.rewards is empty: name at least one reward")
    if sampling.temperature == 0:
        raise UserError("model.sampling.temperature must be positive: the most likely response alone teaches nothing")
    if bootstrap_truncated and not has_critic:
        raise UserError("model.bootstrap_truncated needs a critic: it uses the value after the last token")
    name = type(advantages).__name__
    if advantages.weights_by_ratio and correction is not None and correction.uses_ratio:
        raise UserError(f"model.correction weights the tokens, as {name} already does: set it, or its level, to null")
    if advantages.needs_group:
        if sampling.responses < 2:
            raise UserError(
                f"model.sampling.responses is 1, but {name} compares the responses to a prompt: it needs 2 or more"
            )
        if has_critic:
            warnings.warn(
                f"{name} has its own baseline: the critic is trained, but nothing uses it "
                "(model.critic: null saves its memory and time)",
                stacklevel=2,
            )
