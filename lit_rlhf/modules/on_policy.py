"""On-policy reinforcement learning: everything up to the update, and the evaluation on held-out prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor

from lit_rlhf.algorithms.advantages import AdvantageEstimator
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.kl import KLController, ReferenceKL
from lit_rlhf.algorithms.objectives import Objective, probability_ratio
from lit_rlhf.algorithms.rewards import token_rewards
from lit_rlhf.batching import gather_experience, micro_batches, minibatches
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, Sampling
from lit_rlhf.generation.engine import SpecialTokens, find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.models.sharding import owners, unsharded
from lit_rlhf.modules.adapted_roles import load_adapted_roles
from lit_rlhf.modules.averaging import AveragedWeights, Averaging
from lit_rlhf.modules.checks import check_reference, check_settings
from lit_rlhf.modules.decoding import as_records, decode
from lit_rlhf.modules.dynamic_sampling import DynamicSampling, counted, draw_responses, drop_uncounted, responses_so_far
from lit_rlhf.modules.engine_run import EngineRun
from lit_rlhf.modules.estimation import bootstrap_values, estimate_experience
from lit_rlhf.modules.forwards import ActorOutputs, actor_outputs, critic_values, response_logprobs, rounds_float32
from lit_rlhf.modules.frozen import keep_out_of_checkpoints
from lit_rlhf.modules.guard import Guard
from lit_rlhf.modules.held_out import evaluate, summarize_held_out
from lit_rlhf.modules.hooks import call_hook
from lit_rlhf.modules.incidents import check_iteration, check_sampled, sampling_explained
from lit_rlhf.modules.metrics import Metrics, Stopwatch, measure_experience
from lit_rlhf.modules.module import AlignmentModule, OptimizerFactories
from lit_rlhf.modules.potentials import potentials
from lit_rlhf.modules.roles import RoleSources, load_actor, load_roles
from lit_rlhf.modules.rollouts import Rollouts
from lit_rlhf.modules.update import Update
from lit_rlhf.randomness import Stream, generator
from lit_rlhf.rewards import Reward, RewardModel, Scores, ScoreShaping
from lit_rlhf.strategies import FSDP
from lit_rlhf.types import Experience, PromptBatch, RewardInputs, Rollout, ScoredRollout, Trajectory


class OnPolicy(AlignmentModule):
    """The base class of on-policy methods: every stage of an iteration except `learn`, which derived classes define.

    Each stage is a method: `generate`, `judge`, `reward`, `estimate`, `learn`. The arguments are those of
    `PolicyGradient`, with ``optimizers`` (as in `AlignmentModule`) in place of its optimizers and schedules.

    Raises:
        UserError: if settings are missing, wrong or contradictory; in ``configure_model``, if a model cannot be loaded.
    """

    batch_type = PromptBatch
    max_tokens_option = "model.update.max_tokens"
    copies: ClassVar[tuple[str, ...]] = ()  # the names of further new adapters, which are not trained

    critic: ScalarModel | None  # set by configure_model; None without a critic, or if it is a head on the actor's trunk
    reference: Actor | None  # set by configure_model, frozen; None if reference_kl is None

    def __init__(
        self,
        *,
        actor: ModelSource,
        rewards: list[Reward] | None,
        critic: ModelSource | None,
        reference: ModelSource | None,
        adapter: LoRA | None,
        sampling: Sampling,
        dynamic_sampling: DynamicSampling | None,
        engine: Engine,
        guard: Guard,
        scores: ScoreShaping,
        kl: KLController,
        reference_kl: ReferenceKL | None,
        advantages: AdvantageEstimator,
        objective: Objective,
        correction: Correction | None,
        bootstrap_truncated: bool,
        update: Update,
        averaging: Averaging | None,
        value_grad_scale: float,
        iterations: int | None,
        optimizers: OptimizerFactories,
    ) -> None:
        super().__init__(actor, iterations, optimizers, adapter)
        self.automatic_optimization = False
        self.critic_source = critic
        self.reference_source = reference
        self.sampling = sampling
        self.dynamic_sampling = dynamic_sampling
        self.engine = engine
        self.engine_run = EngineRun(engine, partial(load_actor, actor, sampling.temperature, adapter))
        self.rollouts = Rollouts(engine, sampling, guard)
        self.kl = kl
        self.reference_kl = reference_kl
        self.advantages = advantages
        self.objective = objective
        self.correction = correction
        self.bootstrap_truncated = bootstrap_truncated
        self.update = update
        self.averaging = averaging
        self.max_tokens = update.max_tokens
        self.value_grad_scale = value_grad_scale
        self.scores = Scores(rewards or [], scores)
        self.reference_answers: dict[int, tuple[RewardInputs, Tensor]] = {}  # with their scores, by held-out batch
        keep_out_of_checkpoints(self, ("reference.", "scores.rewards."))
        parts = self.scores, sampling, dynamic_sampling, engine, advantages, correction, update
        check_settings(*parts, critic, value_grad_scale, bootstrap_truncated)
        check_reference(reference_kl, kl, reference, advantages)

    @abstractmethod
    def learn(self, experience: Experience, metrics: Metrics) -> None:
        """Update the models with the experience of an iteration.

        Args:
            experience: The rows of all processes; each process learns from its part of every minibatch.
            metrics: Receives the metrics of the update.

        Raises:
            UserError: if there are fewer rows than minibatches, a loss or a gradient norm is not finite, or memory runs
                out.
        """

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Check the settings, print the names of the rewards, and forget the reference's responses from an earlier run.

        Raises:
            UserError: as listed in `AlignmentModule.setup`, or if FSDP1 would have to average weights.
        """
        super().setup(stage)
        if self.averaging is not None and isinstance(self.trainer.strategy, FSDP):
            raise UserError("trainer.strategy: fsdp cannot average weights (model.averaging); use fsdp2")
        self.reference_answers.clear()
        if stage != "predict":
            self.print(f"rewards: {self.scores.description}")  # the first process prints

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Return the module's callbacks: the source of the rollouts, and the one that starts and closes the engine."""
        return [self.rollouts, self.engine_run]

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokens that end a response, and the padding token.

        Raises:
            UserError: if a string in ``sampling.stop`` is not exactly one token of the tokenizer.
        """
        return find_special_tokens(self.actor, self.tokenizer, self.sampling.stop)

    def configure_model(self) -> None:
        """Load and shard the models; Lightning calls this method more than once, but only the first call loads them.

        Raises:
            UserError: if a model or a reward cannot be loaded, or if the vocabularies of two models differ in size.
        """
        if self.is_configured:
            return
        sources = RoleSources(
            actor=self.source,
            critic=self.critic_source,
            reference=self.reference_source,
            temperature=self.sampling.temperature,
            adapter=self.adapter,
            rewards=[reward for reward in self.scores.rewards if isinstance(reward, RewardModel)],
            value_grad_scale=self.value_grad_scale,
            copies=self.copies,
            needs_reference=self.reference_kl is not None,
        )
        load, prepare = load_adapted_roles if self.adapter else load_roles, partial(self.scores.prepare, self.tokenizer)
        roles = load(sources, prepare=prepare, place=self.place, shards_actor=self.shards_actor)
        self.actor, self.critic, self.reference = roles.actor, roles.critic, roles.reference
        if self.averaging is not None:
            self.averaged = AveragedWeights(self.actor, self.averaging.decay)
        self.train(self.training)

    @property
    def fully_compared(self) -> Actor | None:
        """The reference, if the KL to it is computed over the whole vocabulary."""
        return self.reference if self.reference_kl is not None and self.reference_kl.is_full else None

    # ------------------------------------------------------------- an iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Do one iteration, and return the scored rollout for callbacks.

        Raises:
            UserError: if the engine or a reward fails, if the guard refuses the responses, if a number is not finite
                (see `check_iteration`), or if `learn` raises one.
        """
        metrics, watch = self.metrics, Stopwatch()
        metrics.clear(self.device)
        scored, rows = draw_responses(self, batch, metrics, watch)
        with watch.phase("judge"):
            trajectory = self.reward(scored)
            experience = self.estimate(*counted(scored, trajectory, rows), metrics)
            check_iteration(self, scored, trajectory, experience)
        call_hook(self, "on_rewards", scored, trajectory)
        call_hook(self, "on_advantages", experience)
        compared = self.fully_compared
        gathered = None if compared is None or owners(compared) else compared
        with watch.phase("update"), self.profile("update"), unsharded(gathered):
            of_all = self.all_ranks(experience)
            self.learn(of_all if rows is None else drop_uncounted(of_all), metrics)
        self._finish(scored, trajectory, metrics, watch)
        return {"scored_rollout": scored}

    @torch.no_grad()
    def generate(self, batch: PromptBatch, actor: Actor, stream: Stream, iteration: int) -> Rollout:
        """Sample responses to a batch of prompts, with random numbers that depend on the stream and the iteration."""
        options = self.sampling, self.special_tokens
        with self.profile("generate"), sampling_explained(self):
            rollout = self.engine.generate(actor, batch, *options, stream=stream, iteration=iteration)
        return rollout if stream == Stream.ROLLOUT else check_sampled(rollout)

    @torch.no_grad()
    def judge(self, rollout: Rollout, batch: PromptBatch) -> ScoredRollout:
        """Compute the outputs of the rewards, the actor, the reference and the critic for a rollout.

        Raises:
            UserError: if a reward fails, or does not return one number for each response.
        """
        with self.profile("judge"):
            inputs = decode(rollout, batch, self.tokenizer, int(self.iteration))
            rewards, scores = self.scores.judge(inputs)
            in_reward = self.reference_kl is not None and self.reference_kl.where == "reward"
            actor = self.actor_outputs(rollout, self.fully_compared if in_reward else None)
            ref_logprobs = None
            if self.reference is not None:
                ref_logprobs = response_logprobs(self.reference, rollout, self.max_tokens)
            values, last_values = actor.values, actor.last_values
            if self.critic is not None:
                values, last_values = critic_values(self.critic, rollout, self.max_tokens)
            bootstrap = bootstrap_values(last_values, rollout.terminated) if self.bootstrap_truncated else None
        return ScoredRollout(
            rollout=rollout,
            reward_inputs=inputs,
            old_logprobs=actor.logprobs,
            entropy=actor.entropy,
            ref_logprobs=ref_logprobs,
            full_kl=actor.full_kl,
            values=values,
            bootstrap=bootstrap,
            rewards=rewards,
            scores=scores,
            shaped_scores=self.scores.shape(scores, rollout.terminated, self.sum_over_ranks),
            potentials=potentials(self, rollout, batch),
        )

    def actor_outputs(self, rollout: Rollout, other: Actor | None = None) -> ActorOutputs:
        """Return the actor's outputs, or the engine's if these are exact and no other outputs are needed."""
        exact = self.engine.is_exact and self.trainer.precision == "32-true" and not rounds_float32(self.device)
        if exact and other is None and self.actor.value_head is None:
            return ActorOutputs(rollout.rollout_logprobs, rollout.rollout_entropy)
        return actor_outputs(self.actor, rollout, self.max_tokens, other)

    @torch.no_grad()
    def reward(self, scored: ScoredRollout) -> Trajectory:
        """Turn the scores, and the KL to the reference if the reward includes it, into a reward for each token."""
        rollout, mask, kl = scored.rollout, scored.rollout.response_mask, None
        if self.reference_kl is not None and self.reference_kl.where == "reward":
            assert scored.ref_logprobs is not None
            kl = self.reference_kl.estimate(scored.old_logprobs, scored.ref_logprobs, scored.full_kl)
        return Trajectory(
            rewards=token_rewards(scored.shaped_scores, mask, kl, self.kl.coef, scored.potentials),
            values=scored.values,
            mask=mask,
            bootstrap=scored.bootstrap,
            group=rollout.group,
            ratios=probability_ratio(scored.old_logprobs, rollout.rollout_logprobs, mask),
        )

    @torch.no_grad()
    def estimate(self, scored: ScoredRollout, trajectory: Trajectory, metrics: Metrics) -> Experience:
        """Estimate advantages and returns; the options of `Update` say whether rewards and advantages are whitened."""
        options = self.advantages, self.correction, self.update
        return estimate_experience(scored, trajectory, *options, reduce=self.sum_over_ranks, metrics=metrics)

    def all_ranks(self, experience: Experience) -> Experience:
        """Gather the experience of all processes on every process."""
        if self.trainer.world_size == 1:
            return experience
        return gather_experience(experience, self.sampling.responses, self.sum_over_ranks, self.max_over_ranks)

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Yield the minibatches of all epochs, each with the rows of all processes.

        Raises:
            UserError: if there are fewer rows than ``update.minibatches``.
        """
        for epoch in range(self.update.epochs):
            shuffle = generator(Stream.MINIBATCHES, int(self.iteration), epoch) if self.update.shuffle else None
            yield from minibatches(experience, self.update.minibatches, shuffle)

    def micro_batches(self, experience: Experience) -> list[Experience]:
        """Return this process's micro-batches, given the rows of all processes."""
        rank, world_size = self.on_rank()
        pads = self.actor.pads or (self.critic is not None and self.critic.pads)
        return micro_batches(experience, self.max_tokens, pads=pads, rank=rank, world_size=world_size)

    def _finish(self, scored: ScoredRollout, trajectory: Trajectory, metrics: Metrics, watch: Stopwatch) -> None:
        """Log the metrics, and update the rest of the saved state before callbacks save checkpoints."""
        measure_experience(scored, trajectory, self.sampling.responses, self.kl.coef, metrics)
        for name, optimizer in self.optimizers_by_name().items():
            metrics.add(f"{name}/lr", optimizer.param_groups[0]["lr"])
        counts = [float(len(trajectory.mask)), float(trajectory.mask.sum())]
        responses, tokens = self.sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=self.device)).tolist()
        logged = metrics.compute()
        if self.reference is not None and not self.update.trains_only_critic(self.iteration):
            self.kl.update(logged["objective/kl_to_ref"], int(responses))
        self.step_schedulers()
        self.count_iteration()
        logged |= self.trainer.strategy.broadcast(watch.summary(tokens, responses))  # as measured by process 0
        drawn = responses_so_far(self, int(responses), logged)
        logged |= {"progress/iteration": float(self.iteration), "progress/responses": drawn}
        shown = ("objective/score", "objective/kl_to_ref", "perf/tokens_per_second")
        self.log_iteration(logged, shown=tuple(name for name in shown if name in logged))
        call_hook(self, "on_update_end", logged)

    # --------------------------------------------------- validate, test, predict

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Score responses to held-out prompts; the random numbers are the same in each validation."""
        return evaluate(self, batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Score responses to the test prompts in the same way as ``validation_step``."""
        return evaluate(self, batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one record per response, including the columns of its prompt."""
        with self.with_averaged_weights():
            rollout = self.generate(batch, self.actor, Stream.PREDICTION, batch_idx)
        return as_records(decode(rollout, batch, self.tokenizer))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the standard deviation of the scores and the win rate's 95 % confidence interval."""
        return summarize_held_out(self, means)
