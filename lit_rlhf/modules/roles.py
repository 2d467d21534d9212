"""Actor, critic and reference, each from its source."""

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
    """The models of an iteration, but for those inside rewards."""

    actor: Actor
    critic: ScalarModel | None  # None: there is none, or it is a head on the actor's trunk
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
    """Load every role.

    Args:
        actor: Its source.
        critic: ``actor``, ``reward``, ``shared``, a source, or None for no critic.
        reference: Its source; None: the actor's.
        rewards: The reward models, prepared; the first is what ``critic: reward`` starts from.
        temperature: Divides the logits of actor and reference alike.
        value_grad_scale: With ``shared``: factor on the value loss's gradient into the trunk.

    Raises:
        UserError: if a model does not load, ``reward`` is asked for without a reward model, or a critic's vocabulary
            is not the actor's.
    """
    trained = Actor(load_model(actor, "causal", "model.actor"), temperature, critic == "shared", value_grad_scale)
    frozen = Actor(load_model(reference or actor, "causal", "model.reference"), temperature)
    freeze(frozen)
    made = _load_critic(critic, actor, rewards)
    size = vocabulary_size(trained.model)
    for role, other in (("critic", None if made is None else made.trunk), ("reference", frozen.model)):
        if other is not None and vocabulary_size(other) != size:
            raise UserError(
                f"model.{role}: its vocabulary has {vocabulary_size(other)} tokens, the actor's {size}; "
                "the two read the same tokens"
            )
    return Roles(actor=trained, critic=made, reference=frozen)


def _load_critic(critic: ModelSource | None, actor: ModelSource, rewards: Sequence[RewardModel]) -> ScalarModel | None:
    if critic is None or critic == "shared":
        return None
    if critic == "actor":
        return load_critic(actor, "model.critic")
    if critic == "reward":
        if not rewards or rewards[0].model is None:
            raise UserError("model.critic is 'reward', but no reward is a RewardModel")
        return _in_units_of(rewards[0])
    return load_critic(critic, "model.critic")


def _in_units_of(reward: RewardModel) -> ScalarModel:
    """A copy of the reward model that says what enters the score: weight × (r − mean) / deviation."""
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
    """Rows of the model's input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
