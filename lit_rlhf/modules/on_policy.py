"""On-policy reinforcement learning up to the update: generate, judge, reward, estimate; and on held-out prompts."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_rlhf.algorithms.advantages import Estimator
from lit_rlhf.algorithms.kl import KLController, k1
from lit_rlhf.algorithms.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_weights
from lit_rlhf.algorithms.objectives import Objective
from lit_rlhf.algorithms.values import value_loss
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, Sampling
from lit_rlhf.generation.engine import Vocabulary, find_vocabulary
from lit_rlhf.models.actor import Actor, TokenStats
from lit_rlhf.models.checkpoints import keep_out_of_checkpoints
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.roles import Roles, load_roles
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.models.sharding import gathered
from lit_rlhf.modules.completions import as_records, complete
from lit_rlhf.modules.metrics import Means, Stopwatch, deviation, measure_experience, measure_held_out, wilson_interval
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.ranks import everyones
from lit_rlhf.modules.update import ReferenceKL, Update, check_finite
from lit_rlhf.randomness import Stream, generator
from lit_rlhf.rewards import Reward, RewardModel, Scores, ScoreShaping
from lit_rlhf.types import Completions, Experience, Judged, PromptBatch, Rollout, Trajectory, by_micro_batch


class OnPolicy(AlignmentModule):
    """Everything of an iteration but what is learnt from it: generate, judge, reward, estimate, learn.

    Each stage is a method of that name; the modules derived from it say how to `learn`. The arguments are those of
    `PolicyGradient`.

    Raises:
        UserError: for settings that do not fit together, and in ``configure_model`` for models that do not load.
    """

    batch_type = PromptBatch
    shards_actor: ClassVar[bool] = True
    """Whether a strategy that shards may do so with the actor."""

    critic: ScalarModel | None  # there from configure_model on; None: no critic, or a head on the actor
    reference: Actor  # likewise, frozen

    def __init__(
        self,
        *,
        actor: ModelSource,
        rewards: list[Reward] | None,
        critic: ModelSource | None,
        reference: ModelSource | None,
        sampling: Sampling,
        engine: Engine,
        scores: ScoreShaping,
        kl: KLController,
        reference_kl: ReferenceKL,
        advantages: Estimator,
        objective: Objective,
        bootstrap_truncated: bool,
        update: Update,
        value_grad_scale: float,
        iterations: int | None,
        optimizers: dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]],
    ) -> None:
        super().__init__(actor, iterations)
        self.automatic_optimization = False
        self.critic_source = critic
        self.reference_source = reference
        self.sampling = sampling
        self.engine = engine
        self.kl = kl
        self.reference_kl = reference_kl
        self.estimator = advantages
        self.objective = objective
        self.bootstrap_truncated = bootstrap_truncated
        self.update = update
        self.value_grad_scale = value_grad_scale
        self.makers = optimizers
        self.scores = Scores(rewards or [], scores)
        self.reference_scores: dict[int, Tensor] = {}  # of held-out prompts, by batch: the reference does not change
        keep_out_of_checkpoints(self, ("reference.", "scores.rewards."))
        self._check()

    @abstractmethod
    def learn(self, experience: Experience, means: Means) -> None:
        """Update the models.

        Args:
            experience: Of all processes; each learns from its share of every minibatch.
            means: Takes the metrics in.
        """

    def _check(self) -> None:
        if not self.scores.rewards:
            raise UserError("model.rewards is empty: name at least one reward")
        if self.sampling.temperature == 0:
            raise UserError(
                "model.sampling.temperature must be positive: the most likely response alone teaches nothing"
            )
        if self.bootstrap_truncated and self.critic_source is None:
            raise UserError("model.bootstrap_truncated needs a critic: its value stands after the last token")
        if self.estimator.needs_group:
            name = type(self.estimator).__name__
            if self.sampling.responses < 2:
                raise UserError(
                    f"model.sampling.responses is 1, but {name} compares the responses to a prompt: it needs 2 or more"
                )
            if self.critic_source is not None:
                warnings.warn(
                    f"{name} brings a baseline of its own: the critic is trained, but nothing uses it "
                    "(model.critic: null saves its memory and time)",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ set-up

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that end a response, and the padding token."""
        return find_vocabulary(self.actor, self.tokenizer, self.sampling.stop)

    def configure_model(self) -> None:
        """Load the roles; Lightning calls it, more than once."""
        if self.is_configured:
            return
        self.scores.prepare(self.tokenizer)
        roles = load_roles(
            self.source,
            self.critic_source,
            self.reference_source,
            rewards=[r for r in self.scores.rewards if isinstance(r, RewardModel)],
            temperature=self.sampling.temperature,
            value_grad_scale=self.value_grad_scale,
        )
        self.place(roles)
        self.train(self.training)

    def place(self, roles: Roles) -> None:
        """Put the models where the strategy wants them."""
        self.actor = self.shard(roles.actor) if self.shards_actor else roles.actor
        self.reference = self.shard(roles.reference)
        self.critic = None if roles.critic is None else self.shard(roles.critic)
        for reward in self.scores.rewards:
            if isinstance(reward, RewardModel) and reward.model is not None:
                reward.model = self.shard(reward.model)

    def configure_optimizers(self) -> Any:
        """The actor's optimizer and, with a critic, the critic's; each with its schedule, if any."""
        made = []
        for name, parameters in self.trained().items():
            make_optimizer, make_scheduler = self.makers[name]
            optimizer = make_optimizer(parameters)
            schedule = {} if make_scheduler is None else {"lr_scheduler": make_scheduler(optimizer)}
            made.append({"optimizer": optimizer, **schedule})
        return made

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer: the actor's, the critic's if there is one; a shared trunk is the actor's."""
        heads = [] if self.actor.value_head is None else list(self.actor.value_head.parameters())
        actor = [p for p in self.actor.parameters() if not any(p is h for h in heads)]
        critic = heads if self.critic is None else list(self.critic.parameters())
        return {"policy": actor, "value": critic} if critic else {"policy": actor}

    def optimizers_by_name(self) -> dict[str, Any]:
        """As ``trained``."""
        return dict(zip(self.trained(), _as_list(self.optimizers()), strict=True))

    # ------------------------------------------------------------- an iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One iteration; returns what was judged, for callbacks."""
        means, watch = Means(self.device), Stopwatch()
        with watch.phase("generate"):
            rollout = self.generate(batch, self.actor, Stream.ROLLOUT, int(self.iteration))
        with watch.phase("judge"):
            judged = self.judge(rollout, batch)
            trajectory = self.reward(judged)
            experience = self.estimate(judged, trajectory, means)
        compared = self.reference if self.reference_kl.is_full else None
        with watch.phase("update"), self._profile("update"), gathered(compared):
            self.learn(self.gather(experience), means)
        self._finish(judged, trajectory, means, watch)
        return {"judged": judged}

    @torch.no_grad()
    def generate(self, batch: PromptBatch, actor: Actor, stream: Stream, iteration: int) -> Rollout:
        """Responses to a batch of prompts."""
        with self._profile("generate"):
            return self.engine.generate(
                actor, batch, self.sampling, self.vocabulary, stream=stream, iteration=iteration
            )

    @torch.no_grad()
    def judge(self, rollout: Rollout, batch: PromptBatch) -> Judged:
        """What rewards, actor, reference and critic say of a rollout."""
        with self._profile("judge"):
            completions = complete(rollout, batch, self.tokenizer)
            rewards, scores = self.scores.judge(completions)
            full = self.reference if self.reference_kl.is_full and self.reference_kl.where == "reward" else None
            old_logprobs, entropy, full_kl, *values = self._of_actor(rollout, full)
            (ref_logprobs,) = self.measure(rollout, self._reference_logprobs, self.reference)
            if self.critic is not None:
                values = list(self.measure(rollout, self._critic_values, self.critic))
        return Judged(
            rollout=rollout,
            completions=completions,
            old_logprobs=old_logprobs,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            full_kl=full_kl,
            values=values[0],
            bootstrap=torch.where(rollout.terminated, 0.0, values[1]) if self.bootstrap_truncated else None,
            rewards=rewards,
            scores=scores,
            shaped_scores=self.scores.shape(scores, rollout.terminated, self.sum_over_ranks),
        )

    @torch.no_grad()
    def reward(self, judged: Judged) -> Trajectory:
        """The score on the last token that counts, minus coef × KL to the reference on every token."""
        mask = judged.rollout.response_mask
        rewards = torch.zeros_like(judged.old_logprobs)
        if self.reference_kl.where == "reward":
            kl = self.reference_kl.estimate(judged.old_logprobs, judged.ref_logprobs, judged.full_kl)
            rewards = torch.where(mask, -self.kl.coef * kl, 0.0)
        last = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)
        rewards[torch.arange(len(mask), device=mask.device), last] += judged.shaped_scores
        return Trajectory(
            rewards=rewards,
            values=judged.values,
            mask=mask,
            bootstrap=judged.bootstrap,
            group=judged.rollout.group,
        )

    @torch.no_grad()
    def estimate(self, judged: Judged, trajectory: Trajectory, means: Means) -> Experience:
        """Advantages and returns, whitened where the configuration says so."""
        mask, scale = trajectory.mask, torch.ones_like(trajectory.rewards)
        if self.update.whiten_rewards:
            scale = scale * (masked_var(trajectory.rewards, mask, self.sum_over_ranks) + 1e-8).rsqrt()
            whitened = masked_whiten(trajectory.rewards, mask, shift_mean=False, reduce=self.sum_over_ranks)
            trajectory = replace(trajectory, rewards=whitened)
        estimates = self.estimator(trajectory)
        means.add("objective/advantage_std", masked_var(estimates.advantages, mask, self.sum_over_ranks).sqrt())
        if judged.values is not None:
            unexplained = masked_var(estimates.returns - judged.values, mask, self.sum_over_ranks)
            total = masked_var(estimates.returns, mask, self.sum_over_ranks)
            means.add("value/explained_variance", 1 - unexplained / total.clamp(min=1e-8))
        advantages = estimates.advantages
        if self.update.whiten_advantages:
            scale = scale * (masked_var(advantages, mask, self.sum_over_ranks) + 1e-8).rsqrt()
            advantages = masked_whiten(advantages, mask, reduce=self.sum_over_ranks)
        return Experience(
            rollout=judged.rollout,
            old_logprobs=judged.old_logprobs,
            ref_logprobs=judged.ref_logprobs,
            values=judged.values,
            advantages=advantages,
            returns=estimates.returns,
            reward_scale=scale,
        )

    def gather(self, experience: Experience) -> Experience:
        """The experience of all processes."""
        if self.trainer.world_size == 1:
            return experience
        return everyones(experience, self.sampling.responses, self.sum_over_ranks, self.max_over_ranks)

    def _profile(self, phase: str) -> AbstractContextManager[Any]:
        """The phase by its name in ``--trainer.profiler``."""
        return cast(Any, self.trainer).profiler.profile(phase)

    def _finish(self, judged: Judged, trajectory: Trajectory, means: Means, watch: Stopwatch) -> None:
        """Everything that must be in the checkpoint of this iteration happens here, inside ``training_step``."""
        mask = trajectory.mask
        measure_experience(judged, trajectory, self.kl.coef, means)
        for name, optimizer in self.optimizers_by_name().items():
            means.add(f"{name}/lr", optimizer.param_groups[0]["lr"])
        responses, tokens = self.sum_over_ranks(
            torch.tensor([float(len(mask)), float(mask.sum())], dtype=torch.float64, device=self.device)
        ).tolist()
        measured = means.compute()
        self.kl.update(measured["objective/kl_to_ref"], int(responses))
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()
        self.count_iteration()
        measured |= self.trainer.strategy.broadcast(watch.measured(tokens, responses))  # those of process 0
        measured["progress/iteration"] = float(self.iteration)
        measured["progress/responses"] = float(self.iteration) * responses
        shown = ("objective/score", "objective/kl_to_ref", "perf/tokens_per_second")
        self.log_dict({k: v for k, v in measured.items() if k not in shown}, batch_size=1)
        self.log_dict({k: measured[k] for k in shown}, prog_bar=True, batch_size=1)

    # ---------------------------------------------------------------- forwards

    def measure(
        self, rollout: Rollout, measure: Callable[[Rollout], tuple[Tensor | None, ...]], *models: nn.Module | None
    ) -> tuple[Any, ...]:
        """`by_micro_batch` with the update's budget of tokens, and with these models whole on each process."""
        with gathered(*models):
            return by_micro_batch(rollout, self.update.max_tokens, measure)

    def _of_actor(self, rollout: Rollout, other: Actor | None = None) -> tuple[Any, ...]:
        """`_actor_stats` of a whole rollout: the engine's own numbers where these are all, and exact."""
        rounded = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        exact = self.engine.is_exact and self.trainer.precision == "32-true" and not rounded
        if exact and other is None and self.actor.value_head is None:
            return rollout.rollout_logprobs, rollout.rollout_entropy, None, None, None
        return self.measure(rollout, partial(self._actor_stats, other=other), self.actor, other)

    def _actor_stats(self, piece: Rollout, other: Actor | None = None) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropies, the full KL to another actor, and what a head on the trunk values."""
        stats = self.actor(piece.tokens, piece.scored, other)
        found = (stats.logprobs, stats.entropy, stats.full_kl)
        return *(None if x is None else piece.at_responses(x) for x in found), *_split_values(piece, stats.values)

    def _reference_logprobs(self, piece: Rollout) -> tuple[Tensor, ...]:
        return (piece.at_responses(self.reference(piece.tokens, piece.scored).logprobs),)

    def _critic_values(self, piece: Rollout) -> tuple[Tensor | None, ...]:
        assert self.critic is not None
        return _split_values(piece, self.critic(piece.tokens, piece.lengths))

    # ------------------------------------------------------------------ losses

    def minibatches(self, experience: Experience) -> Iterator[list[Experience]]:
        """The minibatches of all epochs, each this process's share in micro-batches."""
        if self.update.minibatches > len(experience.advantages):
            raise UserError(
                f"model.update.minibatches is {self.update.minibatches}, but an iteration has only "
                f"{len(experience.advantages)} responses"
            )
        for epoch in range(self.update.epochs):
            shuffle = generator(Stream.MINIBATCHES, int(self.iteration), epoch)
            yield from experience.minibatches(self.update.minibatches, self.update.max_tokens, shuffle, *self.on_rank())

    def share(self, experience: Experience) -> list[Experience]:
        """This process's share in micro-batches."""
        return experience.micro_batches(self.update.max_tokens, *self.on_rank())

    def count(self, minibatch: Sequence[Experience]) -> Tensor:
        """Tokens and sequences of an optimizer step, over all ranks, [2]."""
        masks = [piece.rollout.response_mask for piece in minibatch]
        return self.sum_over_ranks(torch.stack([torch.stack([m.sum(), m.any(1).sum()]) for m in masks]).sum(0).float())

    def weights(self, piece: Experience, counts: Tensor) -> Tensor:
        """The weights [B, T] by which a micro-batch's token losses add to its step's loss; counts are the step's."""
        return token_weights(
            piece.rollout.response_mask,
            self.update.aggregation,
            total_tokens=counts[0],
            total_sequences=counts[1],
            max_tokens=self.sampling.max_tokens,
        )

    def policy_loss(self, piece: Experience, means: Means) -> tuple[Tensor, TokenStats]:
        """The objective, less the entropy bonus, plus the KL to the reference where it is in the loss: [B, T]."""
        rollout, mask = piece.rollout, piece.rollout.response_mask
        stats = self.actor(rollout.tokens, rollout.scored, self.reference if self.reference_kl.is_full else None)
        logprobs, entropy = rollout.at_responses(stats.logprobs), rollout.at_responses(stats.entropy)
        loss = self.objective(
            logprobs=logprobs, old_logprobs=piece.old_logprobs, advantages=piece.advantages, mask=mask
        )
        means.add_masked("policy/loss", loss, mask)
        means.add_masked("policy/entropy", entropy, mask)
        if self.update.entropy_coef:
            loss = loss - self.update.entropy_coef * entropy
        if self.reference_kl.in_loss:
            full_kl = None if stats.full_kl is None else rollout.at_responses(stats.full_kl)
            coef = self.kl.coef * (piece.reward_scale if self.reference_kl.where == "reward" else 1.0)
            loss = loss + coef * self.reference_kl.estimate(logprobs, piece.ref_logprobs, full_kl)
        return loss, stats

    def value_loss(self, piece: Experience, stats: TokenStats | None, means: Means) -> Tensor:
        """The critic's loss, [B, T]; a shared critic's values are in the actor's stats."""
        rollout, mask, clip = piece.rollout, piece.rollout.response_mask, self.update.value_clip
        assert piece.values is not None
        after = (
            self.critic(rollout.tokens, rollout.lengths) if self.critic is not None else cast(TokenStats, stats).values
        )
        values = rollout.before_responses(cast(Tensor, after))
        loss = value_loss(values, piece.values, piece.returns, clip)
        check_finite(value_loss=masked_mean(loss, mask))
        means.add_masked("value/loss", loss, mask)
        if clip is not None:
            means.add_masked("value/clip_fraction", ((values - piece.values).abs() > clip).float(), mask)
        return loss

    # --------------------------------------------------- validate, test, predict

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Score held-out prompts; the random numbers are the same in each validation."""
        return self._evaluate(batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """As ``validation_step``."""
        return self._evaluate(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses, one record each, with the prompt's columns."""
        rollout = self.generate(batch, self.actor, Stream.PREDICTION, batch_idx)
        return as_records(complete(rollout, batch, self.tokenizer))

    @torch.no_grad()
    def _evaluate(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        completions = self._answers(batch, self.actor, batch_idx)
        rewards, scores = self.scores.judge(completions)
        if batch_idx not in self.reference_scores:
            self.reference_scores[batch_idx] = self.scores.judge(self._answers(batch, self.reference, batch_idx))[1]
        logprobs, *_ = self._of_actor(completions.rollout)
        (ref_logprobs,) = self.measure(completions.rollout, self._reference_logprobs, self.reference)
        kl_to_ref = masked_sum(k1(logprobs, ref_logprobs), completions.rollout.response_mask, 1)
        measure_held_out(
            self.held_out, completions.rollout, scores, self.reference_scores[batch_idx], rewards, kl_to_ref
        )
        return {"completions": completions, "scores": scores, "rewards": rewards, "kl_to_ref": kl_to_ref}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """With the scores' deviation, and the win rate's 95 % confidence interval."""
        prompts = self.sum_over_ranks(torch.tensor(self.held_out.count("score"), device=self.device))
        low, high = wilson_interval(means["win_rate"], float(prompts) / self.sampling.responses)
        return means | {"score_std": deviation(means), "win_rate_low": low, "win_rate_high": high}

    def _answers(self, batch: PromptBatch, actor: Actor, batch_idx: int) -> Completions:
        return complete(self.generate(batch, actor, Stream.VALIDATION, batch_idx), batch, self.tokenizer)


def _split_values(piece: Rollout, values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The states' values before each response token, [b, t], and after the last, [b]."""
    return (None, None) if values is None else (piece.before_responses(values), piece.at_end(values))


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
