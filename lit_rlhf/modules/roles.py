"""The models of an iteration (actor, critic and reference), and how they are loaded."""

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
    """The models of an iteration, except the reward models."""

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
    """Load the actor, the critic and the reference.

    Args:
        actor: The source of the actor.
        critic: ``actor`` or ``reward`` to start from the weights of the actor or the first reward model; ``shared`` for
            a head on the actor's trunk; otherwise the source of the critic; None for no critic.
        reference: The source of the reference; None for the source of the actor.
        rewards: The reward models, which ``prepare`` has loaded.
        temperature: The number by which the actor's and the reference's logits are divided.
        value_grad_scale: With a shared critic, the factor by which the value loss's gradient into the trunk is scaled.

    Raises:
        UserError: if a model cannot be loaded, if the critic is ``reward`` but there is no reward model, or if the
            critic's or the reference's vocabulary differs in size from the actor's.
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
    """Copy a reward model, with its output r rescaled to its term in the score, weight × (r − mean) / deviation."""
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
    """Return the size of a model's vocabulary, which is the number of rows of its input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
