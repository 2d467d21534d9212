"""The models of an iteration (actor, critic and reference), and how they are loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.scoring import ScalarModel, freeze, load_critic, load_reward_model
from lit_rlhf.rewards import RewardModel

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class Place(Protocol):
    """The type of `AlignmentModule.place`."""

    def __call__(self, build: Callable[[], ModuleType], /) -> ModuleType:
        """Return the model that ``build`` makes, on the process's device, and sharded if the strategy requires it."""


def _as_built(build: Callable[[], ModuleType], /) -> ModuleType:
    return build()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of an iteration, except the reward models."""

    actor: Actor
    critic: ScalarModel | None  # None without a critic, and for a head on the actor's trunk
    reference: Actor  # frozen


def load_actor(
    source: ModelSource, temperature: float, value_head: bool = False, value_grad_scale: float = 1.0
) -> Actor:
    """Load an actor.

    Args:
        source: The source of the model.
        temperature: The number by which the actor's logits are divided.
        value_head: Whether the actor has a value head on its trunk, for a shared critic.
        value_grad_scale: The factor by which the value loss's gradient into the trunk is scaled.

    Raises:
        UserError: if the model cannot be loaded.
    """
    return Actor(load_model(source, "causal", "model.actor"), temperature, value_head, value_grad_scale)


def load_roles(
    actor: ModelSource,
    critic: ModelSource | None,
    reference: ModelSource | None,
    *,
    rewards: Sequence[RewardModel],
    temperature: float,
    value_grad_scale: float,
    place: Place = _as_built,
    place_actor: Place | None = None,
) -> Roles:
    """Load the actor, the reference and the critic, one after the other.

    Args:
        actor: The source of the actor.
        critic: ``actor`` or ``reward`` to start from the weights of the actor or the first reward model; ``shared`` for
            a head on the actor's trunk; otherwise the source of the critic; None for no critic.
        reference: The source of the reference; None for the source of the actor.
        rewards: The reward models, on which ``prepare`` has been called.
        temperature: The number by which the actor's and the reference's logits are divided.
        value_grad_scale: With a shared critic, the factor by which the value loss's gradient into the trunk is scaled.
        place: A function that calls its argument, which builds a model, and returns this model on the process's device,
            sharded if the strategy requires it; see `AlignmentModule.place`.
        place_actor: The same function for the actor; None for ``place``.

    Raises:
        UserError: if a model cannot be loaded, if the critic is ``reward`` but there is no reward model, or if the
            critic's or the reference's vocabulary differs in size from the actor's.
    """

    build_actor = partial(load_actor, actor, temperature, critic == "shared", value_grad_scale)

    def build_reference() -> Actor:
        built = Actor(load_model(reference or actor, "causal", "model.reference"), temperature)
        freeze(built)
        return built

    trained, frozen = (place_actor or place)(build_actor), place(build_reference)
    build_critic = _critic_builder(critic, actor, rewards)
    loaded_critic = None if build_critic is None else place(build_critic)
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


def _critic_builder(
    critic: ModelSource | None, actor: ModelSource, rewards: Sequence[RewardModel]
) -> Callable[[], ScalarModel] | None:
    """Return the function that loads the critic; None if there is no critic with weights of its own.

    Raises:
        UserError: if the critic is ``reward`` but there is no reward model.
    """
    if critic is None or critic == "shared":
        return None
    if critic == "reward":
        if not rewards:
            raise UserError("model.critic is 'reward', but no reward is a RewardModel")
        return partial(_load_rescaled, rewards[0])
    return partial(load_critic, actor if critic == "actor" else critic, "model.critic")


def _load_rescaled(reward: RewardModel) -> ScalarModel:
    """Load a reward model, rescaled to its term of the score: weight × (r − mean) / deviation."""
    critic = load_reward_model(reward.source, "model.critic")
    mean, deviation = reward.scale
    factor = reward.weight / deviation
    if (mean, factor) != (0.0, 1.0):
        head: Any = critic.head
        bias = 0.0 if head.bias is None else float(head.bias.detach())
        head.weight.data *= factor
        head.bias = nn.Parameter(torch.tensor([factor * (bias - mean)], device=head.weight.device))
    return critic


def vocabulary_size(model: nn.Module) -> int:
    """Return the size of a model's vocabulary, which is the number of rows of its input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
