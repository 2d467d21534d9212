"""The models of an iteration: actor, critic and reference, each from its source."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.scoring import ScalarModel, freeze, load_critic
from lit_rlhf.rewards import RewardModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of an iteration, except those inside rewards."""

    actor: Actor
    critic: ScalarModel | None  # None without a critic, and for a head on the actor's trunk
    reference: Actor  # frozen


def load_roles(
    actor: ModelSource,
    critic: ModelSource | None,
    reference: ModelSource | None,
    *,
    rewards: Sequence[RewardModel],
    temperature: float,
    value_grad_scale: float,
) -> Roles:
    """Load actor, critic and reference.

    Args:
        actor: The source of the actor.
        critic: ``actor``, ``reward``, ``shared``, a source, or None for no critic.
        reference: The source of the reference; None for the actor's.
        rewards: The prepared reward models; ``critic: reward`` starts from the first.
        temperature: The divisor of the logits of actor and reference.
        value_grad_scale: With ``shared``, the factor on the gradient of the value loss into the trunk.

    Raises:
        UserError: if a model cannot be loaded, if ``reward`` is asked for without a reward model, or if the vocabulary
            of critic or reference differs in size from the actor's.
    """
    trained = Actor(load_model(actor, "causal", "model.actor"), temperature, critic == "shared", value_grad_scale)
    frozen = Actor(load_model(reference or actor, "causal", "model.reference"), temperature)
    freeze(frozen)
    loaded_critic = _load_critic(critic, actor, rewards)
    size = vocabulary_size(trained.model)
    for role, other in (
        ("critic", None if loaded_critic is None else loaded_critic.trunk),
        ("reference", frozen.model),
    ):
        if other is not None and vocabulary_size(other) != size:
            raise UserError(
                f"model.{role}: its vocabulary has {vocabulary_size(other)} tokens, the actor's {size}; "
                "the two read the same tokens"
            )
    return Roles(actor=trained, critic=loaded_critic, reference=frozen)


def _load_critic(critic: ModelSource | None, actor: ModelSource, rewards: Sequence[RewardModel]) -> ScalarModel | None:
    if critic is None or critic == "shared":
        return None
    if critic == "actor":
        return load_critic(actor, "model.critic")
    if critic == "reward":
        if not rewards or rewards[0].model is None:
            raise UserError("model.critic is 'reward', but no reward is a RewardModel")
        return _rescaled_copy(rewards[0])
    return load_critic(critic, "model.critic")


def _rescaled_copy(reward: RewardModel) -> ScalarModel:
    """Copy the reward model, rescaled to its term of the score: weight × (r − mean) / deviation."""
    critic = deepcopy(reward.model)
    assert critic is not None
    mean, deviation = reward.scale
    factor = reward.weight / deviation
    if (mean, factor) != (0.0, 1.0):
        head: Any = critic.head
        bias = 0.0 if head.bias is None else float(head.bias.detach())
        head.weight.data *= factor
        head.bias = nn.Parameter(torch.tensor([factor * (bias - mean)], device=head.weight.device))
    return critic.requires_grad_(True)


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the model's input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
