"""Policy-gradient methods: PPO, A2C, REINFORCE, GRPO, RLOO are configurations of this one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_rlhf.algorithms.advantages import GAE, Estimator
from lit_rlhf.algorithms.kl import FixedKL, KLController, k3
from lit_rlhf.algorithms.masked import masked_mean, masked_sum
from lit_rlhf.algorithms.objectives import Clip, KLPenalty, Objective, probability_ratio
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.sharding import gathered
from lit_rlhf.modules.metrics import Means
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.modules.update import ReferenceKL, Update, check_finite
from lit_rlhf.rewards import Reward, ScoreShaping
from lit_rlhf.types import Experience


class PolicyGradient(OnPolicy):
    """Trains an actor towards rewards: generate, judge, estimate advantages, update; one iteration a training step.

    A step of the design's table is a method of the same name: `generate`, `judge`, `reward`, `estimate`, `learn`.

    Args:
        actor: The model to train: a folder or hub id, or a configuration for random weights.
        rewards: What a response is worth: at least one.
        critic: ``actor`` or ``reward``: start from that model's weights; ``shared``: a head on the actor's trunk; a
            folder or hub id (``./actor`` for a folder of that name); None: no critic.
        reference: The frozen model that the KL is measured to; None: the actor as it is at the start.
        sampling: How responses are drawn.
        engine: What draws them.
        scores: What happens to the score before it enters the reward.
        kl: The KL's coefficient; ``FixedKL(coef=0)`` only measures it.
        reference_kl: Where the KL enters, and by which estimator.
        advantages: The estimator.
        objective: The policy's loss.
        bootstrap_truncated: Whether the critic's value stands for what a truncated response would still have earned.
        update: Epochs, minibatches, clipping, and the loss's other terms.
        value_grad_scale: With a shared critic: factor on the value loss's gradient into the trunk.
        iterations: Stop after so many; None: the Trainer's max_epochs decides.
        actor_optimizer: The actor's.
        critic_optimizer: The critic's.
        actor_scheduler: The actor's learning rate, stepped once an iteration; None: constant.
        critic_scheduler: The critic's.

    Raises:
        UserError: for settings that do not fit together, and in ``configure_model`` for models that do not load.
    """

    def __init__(
        self,
        actor: ModelSource = "",
        rewards: list[Reward] | None = None,
        critic: ModelSource | None = "actor",
        reference: ModelSource | None = None,
        sampling: Sampling = Sampling(),
        engine: Engine = NativeEngine(),
        scores: ScoreShaping = ScoreShaping(),
        kl: KLController = FixedKL(),
        reference_kl: ReferenceKL = ReferenceKL(),
        advantages: Estimator = GAE(),
        objective: Objective = Clip(),
        bootstrap_truncated: bool = False,
        update: Update = Update(),
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
            sampling=sampling,
            engine=engine,
            scores=scores,
            kl=kl,
            reference_kl=reference_kl,
            advantages=advantages,
            objective=objective,
            bootstrap_truncated=bootstrap_truncated,
            update=update,
            value_grad_scale=value_grad_scale,
            iterations=iterations,
            optimizers={
                "policy": (actor_optimizer, actor_scheduler),
                "value": (critic_optimizer, critic_scheduler),
            },
        )

    def learn(self, experience: Experience, means: Means) -> None:
        """Several epochs of minibatches, one optimizer step each."""
        for minibatch in self.minibatches(experience):
            if not self._step(minibatch, means):
                break
        if self.objective.follows_kl:
            self._follow_kl(experience, means)

    def _step(self, minibatch: Sequence[Experience], means: Means) -> bool:
        """Gradients of all micro-batches, then a step of each optimizer; False if the KL to the old policy is over."""
        for optimizer in self.optimizers_by_name().values():
            optimizer.zero_grad()
        kl_to_old, counts = torch.zeros((), device=self.device), self.count(minibatch)
        for number, piece in enumerate(minibatch, start=1):
            loss, piece_kl = self._loss(piece, counts, means)
            kl_to_old += piece_kl
            with self.synchronized(number == len(minibatch)):
                self.manual_backward(loss * self.trainer.world_size)
        kl_to_old = self.sum_over_ranks(kl_to_old) / counts[0]
        if self.update.target_kl is not None and kl_to_old > self.update.target_kl:
            return False
        for name, optimizer in self.optimizers_by_name().items():
            means.add(f"{name}/grad_norm", self.clip(optimizer, self.update.clip_grad_norm))
            optimizer.step()
        return True

    def _loss(self, piece: Experience, counts: Tensor, means: Means) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the step's loss, and its summed KL to the old policy."""
        mask = piece.rollout.response_mask
        total, stats = self.policy_loss(piece, means)
        check_finite(policy_loss=masked_mean(total, mask))
        if piece.values is not None:
            total = total + self.update.value_coef * self.value_loss(piece, stats, means)
        loss = masked_sum(self.weights(piece, counts) * total, mask)
        check_finite(loss=loss)
        with torch.no_grad():
            logprobs = piece.rollout.at_responses(stats.logprobs)
            kl_to_old = torch.where(mask, k3(piece.old_logprobs, logprobs), 0.0)
            means.add_masked("policy/kl_to_old", kl_to_old, mask)
            means.maximum("policy/ratio_max", probability_ratio(logprobs, piece.old_logprobs, mask).max())
            clipped = self.objective.clipped(
                logprobs=logprobs, old_logprobs=piece.old_logprobs, advantages=piece.advantages, mask=mask
            )
            means.add_masked("policy/clip_fraction", clipped.float(), mask)
        return loss, kl_to_old.sum()

    @torch.no_grad()
    def _follow_kl(self, experience: Experience, means: Means) -> None:
        """Measure the KL that the iteration's update ended with, and let the objective follow it."""
        total = torch.zeros(2, device=self.device)
        with gathered(self.actor):
            for piece in self.share(experience):
                mask = piece.rollout.response_mask
                stats = self.actor(piece.rollout.tokens, piece.rollout.scored)
                logprobs = piece.rollout.at_responses(stats.logprobs)
                total += torch.stack([masked_sum(k3(piece.old_logprobs, logprobs), mask), mask.sum()])
        kl, tokens = self.sum_over_ranks(total)
        means.add("policy/kl_to_old_end", kl / tokens)
        if isinstance(self.objective, KLPenalty):
            means.add("policy/beta", self.objective.beta)
        self.objective.update(float(kl / tokens))
