"""Policy-gradient methods: PPO, A2C, REINFORCE, GRPO and RLOO are configurations of this one module."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lit_rlhf.algorithms.advantages import GAE, AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.kl import FixedKL, KLController, ReferenceKL, k3
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.objectives import Clip, KLPenalty, Objective
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.modules.averaging import Averaging
from lit_rlhf.modules.dynamic_sampling import DynamicSampling
from lit_rlhf.modules.guard import Guard
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.modules.steps import losses_of, step_within_target
from lit_rlhf.modules.update import Update
from lit_rlhf.progress import track
from lit_rlhf.rewards import Reward, ScoreShaping
from lit_rlhf.types import Experience


class PolicyGradient(OnPolicy):
    """Trains an actor to get higher rewards; each training step is one iteration.

    The stages of an iteration are methods: `generate`, `judge`, `reward` and `estimate` of `OnPolicy`, and `learn`.

    Args:
        actor: The model to train: a folder, a hub id, or a configuration for random weights.
        rewards: The rewards of a response; at least one.
        critic: ``actor`` or ``reward`` to start from the weights of the actor or the first reward model; ``shared`` for
            a head on the actor's trunk; otherwise a model to start from (``./actor`` for a folder of that name); None
            for no critic.
        reference: The frozen reference model for the actor's KL; None for the initial actor.
        adapter: The options of the low-rank adapters that the actor and the critic train on one frozen base, which
            the roles share; None to train whole models.
        sampling: How responses are sampled.
        dynamic_sampling: How prompts whose responses all have the same score are left out and replaced; None to learn
            from all prompts.
        engine: The engine that samples the responses.
        guard: The check that the engine samples from the actor's policy.
        scores: How scores are normalised, clipped, and lowered for truncated responses before they enter the reward.
        kl: The coefficient of the KL to the reference; with ``FixedKL(coef=0)`` the KL is only measured.
        reference_kl: Where the KL to the reference enters the training, and how it is estimated. None to do without a
            reference: it is not loaded, its KL is not measured, held-out responses are not compared with its responses,
            and ``kl``, which must be a ``FixedKL``, has no effect.
        advantages: The advantage estimator.
        objective: The loss of the policy.
        correction: How the update corrects for responses that the engine drew from a policy other than the actor's;
            None for no correction.
        bootstrap_truncated: Whether the critic's value after the last token of a truncated response replaces the
            rewards that would have followed; if False, those rewards count as 0.
        update: The options of the update: epochs, minibatches, clipping, and the other terms of the loss.
        value_grad_scale: With a shared critic, the factor by which the value loss's gradient into the trunk is scaled.
        averaging: How the actor's weights are averaged over the iterations; validation and exports then use the
            average. None to use the actor's current weights.
        iterations: The number of iterations; None to leave the limit to the Trainer's max_epochs.
        actor_optimizer: The optimizer of the actor.
        critic_optimizer: The optimizer of the critic.
        actor_scheduler: The actor's learning-rate schedule, stepped once per iteration; None for a constant rate.
        critic_scheduler: The critic's learning-rate schedule, stepped once per iteration; None for a constant rate.

    Raises:
        UserError: if settings are missing, wrong or contradictory; in ``configure_model``, if a model cannot be loaded.

    >>> from lit_rlhf import GroupNormalized, RewardFunction
    >>> reward = RewardFunction("lit_rlhf.data.reviews:reward")
    >>> grpo = PolicyGradient(
    ...     actor="Qwen/Qwen2.5-0.5B",
    ...     rewards=[reward],
    ...     critic=None,
    ...     sampling=Sampling(responses=8),
    ...     advantages=GroupNormalized(),
    ... )
    >>> grpo.objective
    Clip(eps=0.2, eps_high=None, dual=None, ratio='token')
    """

    def __init__(
        self,
        actor: ModelSource = "",
        rewards: list[Reward] | None = None,
        critic: ModelSource | None = "actor",
        reference: ModelSource | None = None,
        adapter: LoRA | None = None,
        sampling: Sampling = Sampling(),
        dynamic_sampling: DynamicSampling | None = None,
        engine: Engine = NativeEngine(),
        guard: Guard = Guard(),
        scores: ScoreShaping = ScoreShaping(),
        kl: KLController = FixedKL(),
        reference_kl: ReferenceKL | None = ReferenceKL(),
        advantages: AdvantageEstimator = GAE(),
        objective: Objective = Clip(),
        correction: Correction | None = None,
        bootstrap_truncated: bool = False,
        update: Update = Update(),
        averaging: Averaging | None = None,
        value_grad_scale: float = 1.0,
        iterations: int | None = None,
        actor_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, fused=True),
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True),
        actor_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            actor=actor,
            rewards=rewards,
            critic=critic,
            reference=reference,
            adapter=adapter,
            sampling=sampling,
            dynamic_sampling=dynamic_sampling,
            engine=engine,
            guard=guard,
            scores=scores,
            kl=kl,
            reference_kl=reference_kl,
            advantages=advantages,
            objective=objective,
            correction=correction,
            bootstrap_truncated=bootstrap_truncated,
            update=update,
            averaging=averaging,
            value_grad_scale=value_grad_scale,
            iterations=iterations,
            optimizers={
                "policy": (actor_optimizer, actor_scheduler),
                "value": (critic_optimizer, critic_scheduler),
            },
        )

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by optimizer name: the actor's, with a shared trunk, and any critic's."""
        head = [] if self.actor.value_head is None else list(self.actor.value_head.parameters())
        actor = [p for p in self.actor.own_parameters().values() if not any(p is h for h in head)]
        critic = head if self.critic is None else list(self.critic.own_parameters().values())
        return {"policy": actor, "value": critic} if critic else {"policy": actor}

    def learn(self, experience: Experience, metrics: Metrics) -> None:
        """Do one optimizer step per minibatch in each epoch; stop if the KL to the old policy exceeds its target.

        Args:
            experience: The rows of all processes; each process learns from its part of every minibatch.
            metrics: Receives the metrics of the update.

        Raises:
            UserError: if there are fewer rows than minibatches, a loss or a gradient norm is not finite, or memory runs
                out (see `within_memory`).
        """
        losses = losses_of(self)
        count = self.update.epochs * self.update.minibatches
        for minibatch in track(self.minibatches(experience), "update", "minibatches", count):
            if not step_within_target(self, minibatch, losses, metrics):
                break
        if self.objective.follows_kl and not losses.only_critic:
            self._follow_kl(experience, metrics)

    @torch.no_grad()
    def _follow_kl(self, experience: Experience, metrics: Metrics) -> None:
        """Measure the KL to the old policy at the end of the iteration, and adapt the objective to it."""
        total = torch.zeros(2, device=self.device)
        with unsharded(self.actor):
            for micro_batch in self.micro_batches(experience):
                rollout, mask = micro_batch.rollout, micro_batch.rollout.response_mask
                stats = self.actor(rollout.tokens, rollout.response_tokens_mask, shared=rollout.shared)
                logprobs = rollout.at_responses(stats.logprobs)
                total += torch.stack([masked_sum(k3(micro_batch.old_logprobs, logprobs), mask), mask.sum()])
        summed_kl, tokens = self.sum_over_ranks(total)
        metrics.add("policy/kl_to_old_end", summed_kl / tokens)
        if isinstance(self.objective, KLPenalty):
            metrics.add("policy/beta", self.objective.beta)
        self.objective.update(float(summed_kl / tokens))
