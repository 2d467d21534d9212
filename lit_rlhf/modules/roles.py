"""The models of an iteration (actor, critic and reference), and how they are loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.quantization import check_whole
from lit_rlhf.models.scoring import ScalarModel, freeze, load_critic, load_reward_model
from lit_rlhf.rewards import RewardModel

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class Place(Protocol):
    """The type of `AlignmentModule.place`."""

    def __call__(self, build: Callable[[], ModuleType], sharded: bool = True) -> ModuleType:
        """Return the model that ``build`` makes, on the process's device and sharded if the strategy requires it."""


def nothing() -> None:
    """Do nothing, because there are no rewards to prepare."""


def _as_built(build: Callable[[], ModuleType], sharded: bool = True) -> ModuleType:
    return build()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of an iteration, except the reward models."""

    actor: Actor
    critic: ScalarModel | None  # None if there is no critic, or if it is a head on the actor's trunk
    reference: Actor | None  # frozen; None if it is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSources:
    """The sources of the models of an iteration, and the options for loading them.

    Args:
        actor: The source of the actor.
        critic: ``actor`` or ``reward`` to start from the weights of the actor or the first reward model; ``shared`` for
            a head on the actor's trunk; otherwise the source of the critic; None for no critic.
        reference: The source of the reference; None for the initial actor.
        temperature: The number by which the actor's and the reference's logits are divided.
        adapter: The options of the adapters of the actor and the critic; None to train whole models.
        rewards: The rewards that are reward models.
        value_grad_scale: With a shared critic, the factor by which the value loss's gradient into the trunk is scaled.
        copies: The names of further new, untrained adapters with the same options.
        needs_reference: Whether the reference is loaded.
    """

    actor: ModelSource
    critic: ModelSource | None
    reference: ModelSource | None
    temperature: float
    adapter: LoRA | None = None
    rewards: Sequence[RewardModel] = ()
    value_grad_scale: float = 1.0
    copies: tuple[str, ...] = ()
    needs_reference: bool = True


def load_actor(
    source: ModelSource,
    temperature: float,
    adapter: LoRA | None = None,
    value_head: bool = False,
    value_grad_scale: float = 1.0,
) -> Actor:
    """Load an actor.

    Args:
        source: The source of the model.
        temperature: The number by which the actor's logits are divided.
        adapter: The options of the adapter that is trained; None to train the whole model.
        value_head: Whether the actor has a value head on its trunk, for a shared critic.
        value_grad_scale: The factor by which the value loss's gradient into the trunk is scaled.

    Raises:
        UserError: if the model or its adapters cannot be loaded (see `load_adapted`), or if the model is quantized and
            would have to be trained as a whole.
    """
    if adapter is None:
        whole = check_whole(load_model(source, "causal", "model.actor"), "model.actor")
        return Actor(whole, temperature, value_head, value_grad_scale)
    model = load_adapted(source, adapter, "model.actor", trained=["actor"])
    return Actor(model, temperature, value_head, value_grad_scale, adapter="actor")


def load_roles(
    sources: RoleSources,
    *,
    prepare: Callable[[], None] = nothing,
    place: Place = _as_built,
    shards_actor: bool = True,
) -> Roles:
    """Load the reward models, the actor, the reference and the critic as whole models, one after the other.

    Args:
        sources: The sources of the models.
        prepare: A function that prepares the rewards; it is called when the reward models are loaded.
        place: A function that calls its argument, which builds a model, and returns this model on the process's device,
            sharded if the strategy requires it; see `AlignmentModule.place`.
        shards_actor: Whether ``place`` may shard the actor.

    Raises:
        UserError: if a model or a reward cannot be loaded, if the critic is ``reward`` but there is no reward model, or
            if the critic's or the reference's vocabulary differs in size from the actor's.
    """
    for reward in sources.rewards:
        reward.model = place(reward.load)
    prepare()
    options = sources.temperature, None, sources.critic == "shared", sources.value_grad_scale
    actor = place(partial(load_actor, sources.actor, *options), sharded=shards_actor)
    build_reference = partial(load_reference, sources.reference or sources.actor, sources.temperature)
    reference = place(build_reference) if sources.needs_reference else None
    build_critic = _critic_builder(sources.critic, sources.actor, sources.rewards)
    critic = None if build_critic is None else place(build_critic)
    if critic is not None:
        check_vocabulary("critic", critic.trunk, actor)
    if reference is not None:
        check_vocabulary("reference", reference.model, actor)
    return Roles(actor=actor, critic=critic, reference=reference)


def load_reference(source: ModelSource, temperature: float) -> Actor:
    """Load a whole model as a frozen reference.

    Args:
        source: The source of the model.
        temperature: The number by which the reference's logits are divided.

    Raises:
        UserError: if the model cannot be loaded.
    """
    reference = Actor(load_model(source, "causal", "model.reference"), temperature)
    freeze(reference)
    return reference


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
    critic = load_reward_model(reward.source, "model.critic")
    rescale(critic.head, reward)
    return critic


def rescale(head: Any, reward: RewardModel) -> None:
    """Rescale a copy of a reward model's head in place so that it gives the reward's term of the score.

    This term is weight × (r − mean) / std for the head's original output r.

    Args:
        head: A linear map from a hidden state to one number.
        reward: The reward, on which ``prepare`` has been called.
    """
    mean, deviation = reward.scale
    factor = reward.weight / deviation
    if (mean, factor) != (0.0, 1.0):
        bias = 0.0 if head.bias is None else float(head.bias.detach())
        head.weight.data *= factor
        head.bias = nn.Parameter(torch.tensor([factor * (bias - mean)], device=head.weight.device))


def check_vocabulary(role: str, model: nn.Module, actor: Actor) -> None:
    """Check that the vocabulary of a model has the same size as the actor's.

    Args:
        role: The name of the model's option, for the error message.
        model: The critic's trunk or the reference's model.
        actor: The actor.

    Raises:
        UserError: if the vocabularies differ in size.
    """
    found, size = vocabulary_size(model), vocabulary_size(actor.model)
    if found != size:
        raise UserError(
            f"model.{role}: its vocabulary has {found} tokens, but the actor's has {size}; both must be the same"
        )


def vocabulary_size(model: nn.Module) -> int:
    """Return the size of a model's vocabulary, which is the number of rows of its input embedding."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]
