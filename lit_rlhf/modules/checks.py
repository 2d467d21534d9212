"""Checks of an on-policy module's settings before anything is loaded."""

import difflib
from pathlib import Path

from lit_rlhf.algorithms.advantages import AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.kl import FixedKL, KLController, ReferenceKL
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Ahead, Engine, Sampling
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.modules.dynamic_sampling import DynamicSampling
from lit_rlhf.modules.update import Update
from lit_rlhf.rewards import Scores

CRITICS = ("actor", "reward", "shared")
"""The values of the option ``critic`` that are not models."""


def check_settings(
    scores: Scores,
    sampling: Sampling,
    dynamic_sampling: DynamicSampling | None,
    engine: Engine,
    advantages: AdvantageEstimator,
    correction: Correction | None,
    update: Update,
    critic: ModelSource | None,
    value_grad_scale: float,
    bootstrap_truncated: bool,
) -> None:
    """Check that the settings of an on-policy module fit together.

    Args:
        scores: The rewards and their combination.
        sampling: The options for sampling.
        dynamic_sampling: The options of dynamic sampling; None for no dynamic sampling.
        engine: The engine.
        advantages: The advantage estimator.
        correction: The correction for responses that another policy drew; None for no correction.
        update: The options of the update.
        critic: The source of the critic's weights, or ``shared`` for a critic on the actor's trunk; None for no critic.
        value_grad_scale: The factor on the value loss's gradient into the actor's trunk.
        bootstrap_truncated: Whether the critic's value replaces the rewards after a truncated response.

    Raises:
        UserError: if there is no reward, the temperature is 0, truncated responses are to be bootstrapped without a
            critic, the estimator or dynamic sampling compares the responses to a prompt but each prompt has only one, a
            critic would be trained although nothing uses it, the critic is to be warmed up but there is none with its
            own weights, the value loss's gradient into the trunk has a negative factor, or one that has no effect
            because the critic is not on the trunk, potentials have no effect or do not fit another setting, the
            estimator and the correction would both weight the tokens, dynamic sampling would have to draw further
            prompts while `Ahead` generates, or the critic is a misspelt keyword.
    """
    if not scores.rewards:
        raise UserError("model.rewards is empty: name at least one reward")
    if sampling.temperature == 0:
        raise UserError("model.sampling.temperature must be positive: the most likely response alone teaches nothing")
    _check_critic(critic, value_grad_scale, update)
    if bootstrap_truncated and critic is None:
        raise UserError("model.bootstrap_truncated needs a critic: it uses the value after the last token")
    if dynamic_sampling is not None:
        if sampling.responses < 2:
            raise UserError(
                "model.sampling.responses is 1, but model.dynamic_sampling compares the responses to a prompt: it "
                "needs 2 or more"
            )
        if isinstance(engine, Ahead) and engine.lag and dynamic_sampling.max_draws > 1:
            raise UserError(
                f"model.dynamic_sampling.max_draws must be 1 with Ahead, not {dynamic_sampling.max_draws}: Ahead "
                "generates before the scores say how many prompts are needed"
            )
    name = type(advantages).__name__
    if scores.shaping.potential_every is not None:
        _check_potentials(scores, advantages, bootstrap_truncated)
    if advantages.weights_by_ratio and correction is not None and correction.uses_ratio:
        raise UserError(f"model.correction weights the tokens, as {name} already does: set it, or its level, to null")
    if advantages.needs_group:
        if sampling.responses < 2:
            raise UserError(
                f"model.sampling.responses is 1, but {name} compares the responses to a prompt: it needs 2 or more"
            )
        if critic is not None and not bootstrap_truncated:
            raise UserError(
                f"model.critic must be null with {name}, which compares the responses to a prompt: the critic's "
                "training would cost memory and time, and nothing but model.bootstrap_truncated uses it"
            )


def _check_potentials(scores: Scores, advantages: AdvantageEstimator, bootstrap_truncated: bool) -> None:
    """Check that potentials have an effect, and leave the best policy as it is.

    Raises:
        UserError: if they have not, or do not.
    """
    if advantages.needs_group:
        name = type(advantages).__name__
        raise UserError(f"model.scores.potential_every has no effect with {name}, which compares whole responses")
    if bootstrap_truncated or scores.can_fail:
        other = "model.bootstrap_truncated" if bootstrap_truncated else "a reward with on_failure: leave_out"
        raise UserError(f"model.scores.potential_every cannot be combined with {other}")
    gamma = getattr(advantages, "gamma", 1.0)
    if gamma != 1:
        raise UserError(
            "model.scores.potential_every leaves the best policy as it is only without a discount, but "
            f"model.advantages.gamma is {gamma}: set it to 1"
        )


def _check_critic(critic: ModelSource | None, value_grad_scale: float, update: Update) -> None:
    """Check that the critic is not a misspelt keyword, and that the options of its training have an effect.

    Raises:
        UserError: if it is, or if they have not.
    """
    if isinstance(critic, str) and critic not in CRITICS and "/" not in critic and not Path(critic).exists():
        for nearest in difflib.get_close_matches(critic, CRITICS, n=1, cutoff=0.7):  # before the hub is asked
            raise UserError(f"model.critic: there is no folder {critic!r}, did you mean {nearest!r}?")
    if update.critic_warmup and critic in (None, "shared"):
        raise UserError(
            f"model.update.critic_warmup is {update.critic_warmup}, but the critic has no weights of its own "
            f"(model.critic: {'null' if critic is None else critic}): set it to 0"
        )
    if value_grad_scale < 0:
        raise UserError(f"model.value_grad_scale must be 0 or more, not {value_grad_scale}")
    if value_grad_scale != 1 and critic != "shared":
        raise UserError(
            f"model.value_grad_scale is {value_grad_scale}, but no critic is on the actor's trunk: set it to 1, or "
            "model.critic to shared"
        )


def check_reference(
    reference_kl: ReferenceKL | None, kl: KLController, reference: ModelSource | None, advantages: AdvantageEstimator
) -> None:
    """Check that the settings of an on-policy module fit its use of the reference.

    Args:
        reference_kl: How the KL to the reference is used; None for no reference.
        kl: The controller of the KL's coefficient.
        reference: The source of the reference; None for the initial actor.
        advantages: The advantage estimator.

    Raises:
        UserError: if a reference is named, or the controller follows the KL to it, although there is none, or if one
            part of the full KL would be on another scale than the other.
    """
    if reference_kl is not None:
        if reference_kl.is_full and reference_kl.where == "reward" and not advantages.keeps_scale:
            raise UserError(
                "model.reference_kl.estimator full in the reward has a part in the loss, on the scale of the rewards, "
                f"but {type(advantages).__name__} changes the scale for each prompt: set where to loss, or take k1"
            )
        return
    if reference is not None:
        raise UserError(
            "model.reference names a model, but model.reference_kl is null, which leaves out the reference: remove one"
        )
    if not isinstance(kl, FixedKL):
        raise UserError(
            f"model.kl: {type(kl).__name__} follows the KL to the reference, which model.reference_kl: null leaves "
            "out; use FixedKL, which then has no effect"
        )
