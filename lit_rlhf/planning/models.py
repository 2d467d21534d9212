"""The models of a run: whole models or, in a run with adapters, models that mostly share one base model."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.modules import DPO, SFT, TRPO, RewardModeling
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.modules.optimizer_options import make_optimizer
from lit_rlhf.planning.adapted import AdaptedModels, saved_adapter
from lit_rlhf.planning.dry_run import Outputs
from lit_rlhf.planning.roles import Role, Stepping, stepping_of, whole
from lit_rlhf.rewards import RewardModel

LANGUAGE, SCORES = Outputs(logprobs=True, values=False), Outputs(logprobs=False, values=True)


class Models(NamedTuple):
    """The models of a run."""

    base: Role | None  # the base model that the roles' adapters share; None without adapters
    roles: tuple[Role, ...]


def models_of(module: AlignmentModule) -> Models:
    """Return the models of a module; they are built without weights.

    Raises:
        UserError: if runs with the module's class cannot be planned, if an optimizer cannot be used, if the
            configuration or the tokenizer of a model or the configuration of an adapter cannot be loaded, if an adapter
            does not name its base model, or if a target module is not a linear layer or is the language-model head.
    """
    factories = module.optimizer_factories.items()
    steps = {name: stepping_of(partial(make_optimizer, make, name=name)) for name, (make, _) in factories}
    if isinstance(module, TRPO) or not isinstance(module, SFT | RewardModeling | DPO | OnPolicy):
        raise UserError(f"plan: {type(module).__name__} is not among the modules that can be planned")
    if module.adapter is not None:
        return _adapted(module, steps, AdaptedModels(module.source, f"model.{module.role}", module.adapter))
    if isinstance(module, SFT):
        return Models(None, (whole("actor", module.source, LANGUAGE, module.max_tokens, steps["actor"]),))
    if isinstance(module, RewardModeling):
        return Models(None, (whole("reward", module.source, SCORES, module.max_tokens, steps["model"]),))
    if isinstance(module, DPO):
        actor = whole("actor", module.source, LANGUAGE, module.max_tokens, steps["model"])
        reference = module.reference_source or module.source
        return Models(None, (actor, whole("reference", reference, LANGUAGE, module.max_tokens)))
    return Models(None, _on_policy(module, steps))


def _on_policy(module: OnPolicy, steps: dict[str, Stepping]) -> tuple[Role, ...]:
    rewards, tokens = _reward_models(module), module.update.max_tokens
    roles = [whole("actor", module.source, _actor_outputs(module), tokens, steps["policy"])]
    if module.critic_source is not None and module.critic_source != "shared":
        first_reward = rewards[0].source if rewards else module.source
        sources = {"actor": module.source, "reward": first_reward}
        source = sources.get(str(module.critic_source), module.critic_source)
        roles.append(whole("critic", source, SCORES, tokens, steps["value"]))
    if module.reference_kl is not None:
        roles.append(whole("reference", module.reference_source or module.source, LANGUAGE, tokens))
    return (*roles, *(whole("reward", reward.source, SCORES, reward.max_tokens) for reward in rewards))


def _adapted(
    module: SFT | RewardModeling | DPO | OnPolicy, steps: dict[str, Stepping], models: AdaptedModels
) -> Models:
    if isinstance(module, RewardModeling):
        own = tuple(models.starts)
        reward = models.role("reward", models.starts, SCORES, module.max_tokens, steps["model"], own)
        return Models(models.base(with_head=False), (reward,))
    if isinstance(module, OnPolicy):
        return Models(models.base(with_head=True), _on_policy_adapted(module, steps, models))
    (stepping,) = steps.values()
    actor = models.actor(LANGUAGE, module.max_tokens, stepping)
    if isinstance(module, SFT):
        return Models(models.base(with_head=True), (actor,))
    reference = _frozen("reference", module.reference_source, LANGUAGE, module.max_tokens, models)
    return Models(models.base(with_head=True), (actor, reference))


def _on_policy_adapted(module: OnPolicy, steps: dict[str, Stepping], models: AdaptedModels) -> tuple[Role, ...]:
    tokens = module.update.max_tokens
    roles = [models.actor(_actor_outputs(module), tokens, steps["policy"])]
    if module.critic_source is not None and module.critic_source != "shared":
        roles.append(_critic(module, steps["value"], models))
    if module.reference_kl is not None:
        roles.append(_frozen("reference", module.reference_source, LANGUAGE, tokens, models))
    for number, reward in enumerate(_reward_models(module)):
        own = saved_adapter(f"reward{number}", reward.source) if models.shares(reward.source) else {}
        if own:
            roles.append(models.role("reward", own, SCORES, reward.max_tokens, own=tuple(own)))
        else:
            roles.append(whole("reward", reward.source, SCORES, reward.max_tokens))
    return tuple(roles)


def _critic(module: OnPolicy, stepping: Stepping, models: AdaptedModels) -> Role:
    """Return the critic: a new adapter on top of the adapter of the initial actor, the reward model or its own source.

    A critic that starts from the reward model is counted in the same way if the reward model is not an adapter, as in
    plans for random weights; ``fit`` refuses such a critic.
    """
    tokens, rewards = module.update.max_tokens, _reward_models(module)
    if module.critic_source == "actor":
        return models.role("critic", models.starts, SCORES, tokens, stepping)
    if module.critic_source == "reward":
        below = saved_adapter("reward0", rewards[0].source) if rewards else {}
        return models.role("critic", below, SCORES, tokens, stepping)
    below = saved_adapter("critic_start", module.critic_source)  # type: ignore[arg-type]
    return models.role("critic", below, SCORES, tokens, stepping, own=tuple(below))


def _frozen(name: str, source: Any, outputs: Outputs, max_tokens: int, models: AdaptedModels) -> Role:
    """Return a frozen role: the base model with or without a saved adapter, or a whole model.

    If ``source`` is None, the role computes the same outputs as the initial actor.
    """
    if source is None:
        return models.role(name, models.starts, outputs, max_tokens)
    if not models.shares(source):
        return whole(name, source, outputs, max_tokens)
    own = saved_adapter(name, source)
    return models.role(name, own, outputs, max_tokens, own=tuple(own))


def _actor_outputs(module: OnPolicy) -> Outputs:
    return Outputs(logprobs=True, values=module.critic_source == "shared")


def _reward_models(module: OnPolicy) -> list[RewardModel]:
    return [reward for reward in module.scores.rewards if isinstance(reward, RewardModel)]
