"""Trust region policy optimization (TRPO): one natural-gradient step per iteration, with a bound on the step's KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_rlhf.algorithms.advantages import GAE, AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.kl import FixedKL, KLController, ReferenceKL
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.objectives import Surrogate, probability_ratio
from lit_rlhf.algorithms.trust_region import (
    assign,
    conjugate_gradients,
    flatten,
    hessian_product,
    line_search,
    longest_step,
)
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import starts_from
from lit_rlhf.models.adapters import AdapterView, LoRA
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.scoring import freeze
from lit_rlhf.models.sharding import is_sharded
from lit_rlhf.modules.averaging import Averaging
from lit_rlhf.modules.dynamic_sampling import DynamicSampling
from lit_rlhf.modules.frozen import keep_out_of_checkpoints
from lit_rlhf.modules.guard import Guard
from lit_rlhf.modules.incident_rows import experience_records
from lit_rlhf.modules.incidents import all_finite, stop_at_step
from lit_rlhf.modules.losses import Losses, step_totals
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.modules.steps import (
    add_gradient,
    losses_of,
    measure_gradients,
    step_optimizers,
    within_memory,
)
from lit_rlhf.modules.update import Update
from lit_rlhf.progress import track
from lit_rlhf.rewards import Reward, ScoreShaping
from lit_rlhf.types import Experience


@dataclass(frozen=True)
class TrustRegion:
    """The size of the actor's step, and the accuracy with which the step is computed.

    Args:
        max_kl: δ > 0, the bound on the mean KL(π_old ‖ π) over the tokens of the iteration, in nats per token.
        cg_iterations: The maximum number of conjugate-gradient iterations; each takes one Fisher-vector product.
        cg_tolerance: The iterations stop as soon as the squared norm of the residual is at most this fraction of the
            squared norm of the gradient.
        damping: The constant that is added to the diagonal of the Fisher matrix; a larger value moves the step towards
            the plain gradient and makes the step more robust.
        fisher_every: n, where the Fisher matrix is averaged over the responses to every n-th prompt: 1 uses all
            prompts, 4 a quarter of them in a quarter of the time. The gradient, the line search and the bound use all
            prompts.
        backtracks: The maximum number of steps that the line search tries.
        backtrack_ratio: The ratio of each step in the line search to the step before it, in (0, 1).

    Raises:
        ValueError: if a number is out of range.

    >>> TrustRegion(max_kl=0.02).cg_iterations
    10
    """

    max_kl: float = 0.01
    cg_iterations: int = 10
    cg_tolerance: float = 1e-10
    damping: float = 0.1
    fisher_every: int = 4
    backtracks: int = 10
    backtrack_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name in ("cg_iterations", "fisher_every", "backtracks"):
            if getattr(self, name) < 1:
                raise ValueError(f"region.{name} must be 1 or more, not {getattr(self, name)}")
        if not self.max_kl > 0:
            raise ValueError(f"region.max_kl must be positive, not {self.max_kl}")
        for name in ("damping", "cg_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"region.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.backtrack_ratio < 1:
            raise ValueError(f"region.backtrack_ratio must be in (0, 1), not {self.backtrack_ratio}")


class TRPO(OnPolicy):
    """Moves the actor along the surrogate's natural gradient, as far as a bound on the KL to the old policy allows.

    Let g be the gradient of the surrogate over all responses of the iteration, and F the Fisher matrix of the actor's
    next-token distributions. Conjugate gradients give x = F⁻¹ g, and s = √(2 δ / xᵀ F x) x is the full step. A
    backtracking line search shortens s until the measured full KL is at most δ and the surrogate has improved; if no
    step achieves both, the actor does not move. The critic learns as in `PolicyGradient`.

    Cost: g takes one forward and one backward pass over the responses of the iteration. A product F v takes a forward
    pass, its backward pass, and the backward pass of both; together these take as long as 14 forward passes (measured
    on a Llama of 5 layers with 180 tokens on a CPU). There are ``cg_iterations`` + 1 products, over
    1 / ``fisher_every`` of the responses. Each step of the line search takes 3 forward passes. With the defaults, the
    actor's step takes about as long as 50 forward passes, while the actor's part of PPO's 4 epochs takes as long as 14.

    Memory: the actor has no optimizer state, but needs a frozen copy of itself (the old policy) and 8 vectors of its
    size. Under fsdp2, every process holds the actor, this copy and the vectors in full, and a shard of every other
    model. The products use PyTorch's plain attention, since the fused kernels cannot be differentiated twice; a
    micro-batch then holds [heads, S, S] numbers for each row and layer. If that is too much, reduce
    ``update.max_tokens``.

    Source: Schulman et al. 2015 (arXiv 1502.05477), section 6 and appendix C.

    Args:
        actor: The model to train: a folder, a hub id, or a configuration for random weights.
        rewards: The rewards of a response; at least one.
        critic: ``actor`` or ``reward`` to start from the weights of the actor or the first reward model; otherwise a
            model to start from (``./actor`` for a folder of that name); None for no critic.
        reference: The frozen model to which the actor's KL is measured; None for the initial actor.
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
        region: The size of the actor's step, and how the step is computed.
        correction: How the update corrects for responses that the engine drew from a policy other than the actor's;
            None for no correction.
        bootstrap_truncated: Whether the critic's value after the last token of a truncated response replaces the
            rewards that would have followed; if False, those rewards count as 0.
        update: The options of the update. Epochs, minibatches and clipping apply to the critic only; the entropy bonus
            is added to the actor's surrogate; micro-batches, aggregation and whitening apply to both.
        averaging: How the actor's weights are averaged over the iterations; validation and exports then use the
            average. None to use the actor's last weights.
        iterations: The number of iterations; None to leave the limit to the Trainer's max_epochs (max_steps counts the
            critic's steps).
        critic_optimizer: The optimizer of the critic; the actor has none.
        critic_scheduler: The critic's learning-rate schedule, stepped once per iteration; None for a constant rate.

    Raises:
        UserError: if settings are missing, wrong or contradictory; in ``configure_model``, if a model cannot be loaded.

    >>> from lit_rlhf import RewardFunction
    >>> trpo = TRPO(actor="Qwen/Qwen2.5-0.5B", rewards=[RewardFunction("lit_rlhf.data.reviews:reward")])
    >>> trpo.region.max_kl
    0.01
    """

    shards_actor = False  # sharded weights cannot be differentiated twice
    copies = ("old",)
    old: Actor  # set by configure_model, frozen: the actor at the start of the update

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
        region: TrustRegion = TrustRegion(),
        correction: Correction | None = None,
        bootstrap_truncated: bool = False,
        update: Update = Update(),
        averaging: Averaging | None = None,
        iterations: int | None = None,
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0, fused=True),
        critic_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if critic == "shared":
            raise UserError("model.critic is 'shared', but the critic's steps on the trunk would leave TRPO's region")
        if update.target_kl is not None:
            raise UserError("model.update.target_kl does nothing in TRPO: the bound is model.region.max_kl")
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
            objective=Surrogate(),
            correction=correction,
            bootstrap_truncated=bootstrap_truncated,
            update=update,
            averaging=averaging,
            value_grad_scale=1.0,
            iterations=iterations,
            optimizers={"value": (critic_optimizer, critic_scheduler)},
        )
        self.region = region
        keep_out_of_checkpoints(self, ("old.",))

    def configure_model(self) -> None:
        """Load the models and, for the old policy, a frozen copy of the actor or only of the actor's adapter.

        Raises:
            UserError: if a model or a reward cannot be loaded, or if the vocabularies of two models differ in size.
        """
        if self.is_configured:
            return
        super().configure_model()
        if self.adapter is None:
            self.old = self.place(self._load_old, sharded=False)
        else:
            below = starts_from(self.source, self.adapter)
            self.old = Actor(AdapterView(self.actor, (*below, "old")), self.sampling.temperature, adapter="old")

    def _load_old(self) -> Actor:
        old = Actor(load_model(self.source, "causal", "model.actor"), self.sampling.temperature)
        freeze(old)
        return old

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the critic's parameters by optimizer name, if there is a critic; the actor has no optimizer."""
        return {} if self.critic is None else {"value": list(self.critic.own_parameters().values())}

    def learn(self, experience: Experience, metrics: Metrics) -> None:
        """Step the actor once within its trust region, except during the critic's warm-up, and then train the critic.

        Args:
            experience: The rows of all processes; each process learns from its part of them.
            metrics: Receives the metrics of the update.

        Raises:
            UserError: if there are fewer rows than minibatches, a loss or a gradient norm is not finite, or memory runs
                out (see `within_memory`).
        """
        losses = losses_of(self)
        if not losses.only_critic:
            assign(_own(self.old), flatten([p.detach() for p in _own(self.actor)]))
            step_actor = partial(self._step_actor, experience, losses, metrics)
            within_memory(self, step_actor, experience.rollout.lengths, metrics)
        if experience.values is not None:
            count = self.update.epochs * self.update.minibatches
            for minibatch in track(self.minibatches(experience), "update", "minibatches of the critic", count):
                self._step_critic(minibatch, losses, metrics)

    # ------------------------------------------------------------------- actor

    def _step_actor(self, experience: Experience, losses: Losses, metrics: Metrics) -> None:
        """Step the actor from the old policy, even if an attempt that ran out of memory left the actor elsewhere."""
        parameters, start = _own(self.actor), flatten(_own(self.old))
        assign(parameters, start)
        batches = self.micro_batches(experience)
        totals = self.sum_over_ranks(step_totals(batches))
        loss, gradient = self._gradient(batches, totals, losses, metrics)
        checked = {"policy_loss": loss, "policy_gradient_norm": gradient.norm()}
        if not all_finite(self, checked):
            stop_at_step(self, checked, experience_records(self, experience, losses), gradients=())
        product = self._fisher(experience)
        direction = conjugate_gradients(product, -gradient, self.region.cg_iterations, self.region.cg_tolerance)
        step = longest_step(direction, product, self.region.max_kl)

        def try_step(fraction: float) -> tuple[float, float]:
            assign(parameters, start + fraction * step)
            new_loss, kl = self._loss_and_kl(batches, totals, losses)
            return float(loss - new_loss), float(kl)

        fraction = line_search(try_step, self.region.max_kl, self.region.backtracks, self.region.backtrack_ratio)
        assign(parameters, start + fraction * step)
        metrics.add("policy/grad_norm", gradient.norm())
        metrics.add("policy/step_share", fraction)
        self._measure_policy(batches, metrics)

    def _gradient(
        self, batches: Sequence[Experience], totals: Tensor, losses: Losses, metrics: Metrics
    ) -> tuple[Tensor, Tensor]:
        """Return the loss at the old policy (surrogate, entropy bonus and KL term), [], and its gradient, [N]."""
        parameters = _own(self.actor)
        loss, gradient = torch.zeros((), device=self.device), torch.zeros_like(flatten(parameters))
        for micro_batch in batches:
            part = losses.weighted_sum(losses.policy(micro_batch, metrics).loss, micro_batch, totals)
            gradient += flatten(torch.autograd.grad(part, parameters, materialize_grads=True))
            loss += part.detach()
        return self.sum_over_ranks(loss), self.sum_over_ranks(gradient)

    def _fisher(self, experience: Experience) -> Callable[[Tensor], Tensor]:
        """Return the function v ↦ (F + damping · I) v, where F is the actor's Fisher matrix, averaged over tokens."""
        rows = (experience.rollout.group % self.region.fisher_every == 0).nonzero().squeeze(1)
        batches = self.micro_batches(experience.select(rows))
        tokens = self.sum_over_ranks(step_totals(batches))[0]
        parameters = _own(self.actor)

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            with sdpa_kernel(SDPBackend.MATH):
                for micro_batch in batches:
                    rollout = micro_batch.rollout
                    stats = self.actor(rollout.tokens, rollout.response_tokens_mask, self.actor, shared=rollout.shared)
                    kl = masked_sum(rollout.at_responses(stats.full_kl), rollout.response_mask)
                    total += hessian_product(kl / tokens, parameters, vector)
            return self.sum_over_ranks(total) + self.region.damping * vector

        return product

    @torch.no_grad()
    def _loss_and_kl(self, batches: Sequence[Experience], totals: Tensor, losses: Losses) -> Tensor:
        """Return the current actor's loss, and the mean KL(π_old ‖ π) in nats per token, as one tensor, [2]."""
        total = torch.zeros(2, device=self.device)
        for micro_batch in batches:
            loss = losses.weighted_sum(losses.policy(micro_batch, Metrics(self.device)).loss, micro_batch, totals)
            kl = masked_sum(self._kl_to_old(micro_batch), micro_batch.rollout.response_mask)
            total += torch.stack([loss, kl / totals[0]])
        return self.sum_over_ranks(total)

    @torch.no_grad()
    def _measure_policy(self, batches: Sequence[Experience], metrics: Metrics) -> None:
        """Record KL(π_old ‖ π) and the largest probability ratio after the step."""
        for micro_batch in batches:
            rollout, mask = micro_batch.rollout, micro_batch.rollout.response_mask
            metrics.add_masked("policy/kl_to_old", self._kl_to_old(micro_batch), mask)
            stats = self.actor(rollout.tokens, rollout.response_tokens_mask, shared=rollout.shared)
            logprobs = rollout.at_responses(stats.logprobs)
            metrics.maximum("policy/ratio_max", probability_ratio(logprobs, micro_batch.old_logprobs, mask).max())

    def _kl_to_old(self, micro_batch: Experience) -> Tensor:
        """Return KL(π_old ‖ π) over the vocabulary, [b, t], in nats."""
        rollout = micro_batch.rollout
        stats = self.old(rollout.tokens, rollout.response_tokens_mask, self.actor, shared=rollout.shared)
        return rollout.at_responses(stats.full_kl)

    # ------------------------------------------------------------------ critic

    def _step_critic(self, minibatch: Experience, losses: Losses, metrics: Metrics) -> None:
        attempt = partial(self._add_critic_gradients, minibatch, losses, metrics)
        value_loss = within_memory(self, attempt, minibatch.rollout.lengths, metrics)
        records = partial(experience_records, self, minibatch, losses)
        norms = step_optimizers(self, self.update.clip_grad_norm, records, value_loss=value_loss)
        measure_gradients(norms, self.update, metrics)

    def _add_critic_gradients(self, minibatch: Experience, losses: Losses, metrics: Metrics) -> Tensor:
        """Compute the critic's gradient on a minibatch, and return the value loss to check, [].

        Unless the critic is sharded, this method averages the gradients over the ranks. DDP cannot average them, since
        its backward passes would have to reach the actor's parameters too.
        """
        batches, value_loss = self.micro_batches(minibatch), torch.zeros((), device=self.device)
        totals, parameters = self.sum_over_ranks(step_totals(batches)), self.trained_parameters()["value"]
        for micro_batch in batches:
            part = losses.of_critic(micro_batch, totals, metrics)
            value_loss += part.means["value_loss"]
            add_gradient(self, part.loss, last=False)
        if self.trainer.world_size > 1 and not is_sharded(cast(nn.Module, self.critic)):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            assign(gradients, self.sum_over_ranks(flatten(gradients)) / self.trainer.world_size)
        return value_loss


def _own(actor: Actor) -> list[nn.Parameter]:
    return list(actor.own_parameters().values())
