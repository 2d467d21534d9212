"""Policy-gradient methods: PPO, A2C, REINFORCE, GRPO, RLOO are configurations of this one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_rlhf.algorithms import kl as kl_estimators
from lit_rlhf.algorithms.advantages import GAE, Estimator
from lit_rlhf.algorithms.kl import FixedKL, KLController
from lit_rlhf.algorithms.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_weights
from lit_rlhf.algorithms.objectives import Clip, Objective, probability_ratio
from lit_rlhf.algorithms.values import value_loss
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, NativeEngine, Sampling
from lit_rlhf.generation.engine import Vocabulary, find_vocabulary
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.checkpoints import keep_out_of_checkpoints
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.roles import load_roles
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.modules.completions import as_records, complete
from lit_rlhf.modules.evaluation import Evaluation
from lit_rlhf.modules.metrics import Means, Stopwatch, peak_memory_gib
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.update import ReferenceKL, Update, check_finite, clip_gradients
from lit_rlhf.randomness import Stream, generator
from lit_rlhf.rewards import Reward, RewardModel, Scores, ScoreShaping
from lit_rlhf.types import Completions, Experience, Judged, PromptBatch, Rollout, Trajectory, by_micro_batch


class PolicyGradient(AlignmentModule):
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

    critic: ScalarModel | None  # there from configure_model on; None: no critic, or a head on the actor
    reference: Actor  # likewise, frozen

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
        actor_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        actor_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
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
        self.make_optimizers = (actor_optimizer, critic_optimizer)
        self.make_schedulers = (actor_scheduler, critic_scheduler)
        self.scores = Scores(rewards or [], scores)
        keep_out_of_checkpoints(self, ("reference.", "scores.rewards."))
        self.evaluation = Evaluation()
        self._check()

    def _check(self) -> None:
        if not self.scores.rewards:
            raise UserError("model.rewards is empty: name at least one reward")
        if self.sampling.temperature == 0:
            raise UserError(
                "model.sampling.temperature must be positive: the most likely response alone teaches nothing"
            )
        if self.bootstrap_truncated and self.critic_source is None:
            raise UserError("model.bootstrap_truncated needs a critic: its value stands after the last token")

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
            self.actor_source,
            self.critic_source,
            self.reference_source,
            rewards=[r for r in self.scores.rewards if isinstance(r, RewardModel)],
            temperature=self.sampling.temperature,
            value_grad_scale=self.value_grad_scale,
        )
        self.actor, self.critic, self.reference = roles.actor, roles.critic, roles.reference
        self.train(self.training)

    def configure_optimizers(self) -> Any:
        """The actor's optimizer and, with a critic, the critic's; each with its schedule, if any."""
        made = []
        for parameters, make_optimizer, make_scheduler in zip(
            self._trained(), self.make_optimizers, self.make_schedulers, strict=False
        ):
            optimizer = make_optimizer(parameters)
            schedule = {} if make_scheduler is None else {"lr_scheduler": make_scheduler(optimizer)}
            made.append({"optimizer": optimizer, **schedule})
        return made

    def _trained(self) -> list[list[nn.Parameter]]:
        """Parameters of the actor and, if there is one, of the critic; a shared trunk is the actor's."""
        heads = [] if self.actor.value_head is None else list(self.actor.value_head.parameters())
        actor = [p for p in self.actor.parameters() if not any(p is h for h in heads)]
        critic = heads if self.critic is None else list(self.critic.parameters())
        return [actor, critic] if critic else [actor]

    # ------------------------------------------------------------- an iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One iteration; returns what was judged, for callbacks."""
        means, watch = Means(), Stopwatch()
        with watch.phase("generate"):
            rollout = self.generate(batch, self.actor, Stream.ROLLOUT, int(self.iteration))
        with watch.phase("judge"):
            judged = self.judge(rollout, batch)
            trajectory = self.reward(judged)
            experience = self.estimate(judged, trajectory, means)
        with watch.phase("update"):
            self.learn(experience, means)
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
            old_logprobs, entropy = self._measure(rollout, self._actor_stats)
            (ref_logprobs,) = self._measure(rollout, self._reference_logprobs)
            values, bootstrap = self._values(rollout)
        return Judged(
            rollout=rollout,
            completions=completions,
            old_logprobs=old_logprobs,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            values=values,
            bootstrap=bootstrap,
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
            estimate = getattr(kl_estimators, self.reference_kl.estimator)
            rewards = torch.where(mask, -self.kl.coef * estimate(judged.old_logprobs, judged.ref_logprobs), 0.0)
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
        mask = trajectory.mask
        if self.update.whiten_rewards:
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
            advantages = masked_whiten(advantages, mask, reduce=self.sum_over_ranks)
        return Experience(
            rollout=judged.rollout,
            old_logprobs=judged.old_logprobs,
            ref_logprobs=judged.ref_logprobs,
            values=judged.values,
            advantages=advantages,
            returns=estimates.returns,
        )

    def learn(self, experience: Experience, means: Means) -> None:
        """Several epochs of minibatches, one optimizer step each."""
        if self.update.minibatches > len(experience.advantages):
            raise UserError(
                f"model.update.minibatches is {self.update.minibatches}, but an iteration has only "
                f"{len(experience.advantages)} responses"
            )
        with self._profile("update"):
            for epoch in range(self.update.epochs):
                shuffle = generator(Stream.MINIBATCHES, int(self.iteration), epoch)
                for minibatch in experience.minibatches(self.update.minibatches, self.update.max_tokens, shuffle):
                    if not self._step(minibatch, means):
                        return

    def _step(self, minibatch: Sequence[Experience], means: Means) -> bool:
        """Gradients of all micro-batches, then a step of each optimizer; False if the KL to the old policy is over."""
        masks = [piece.rollout.response_mask for piece in minibatch]
        counts = torch.stack([torch.stack([m.sum(), m.any(1).sum()]) for m in masks]).sum(0).float()
        tokens, sequences = self.sum_over_ranks(counts)
        optimizers = _as_list(self.optimizers())
        for optimizer in optimizers:
            optimizer.zero_grad()
        kl_to_old = torch.zeros((), device=self.device)
        for piece, mask in zip(minibatch, masks, strict=True):
            weights = token_weights(
                mask,
                self.update.aggregation,
                total_tokens=tokens,
                total_sequences=sequences,
                max_tokens=self.sampling.max_tokens,
            )
            loss, piece_kl = self._loss(piece, weights, means)
            kl_to_old += piece_kl
            self.manual_backward(loss * self.trainer.world_size)
        kl_to_old = self.sum_over_ranks(kl_to_old) / tokens
        if self.update.target_kl is not None and kl_to_old > self.update.target_kl:
            return False
        for name, parameters, optimizer in zip(("policy", "value"), self._trained(), optimizers, strict=False):
            means.add(f"{name}/grad_norm", clip_gradients(parameters, self.update.clip_grad_norm))
            optimizer.step()
        return True

    def _loss(self, piece: Experience, weights: Tensor, means: Means) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the step's loss, and its summed KL to the old policy."""
        rollout, mask = piece.rollout, piece.rollout.response_mask
        stats = self.actor(rollout.tokens, rollout.scored)
        logprobs, entropy = rollout.at_responses(stats.logprobs), rollout.at_responses(stats.entropy)
        compared = {"logprobs": logprobs, "old_logprobs": piece.old_logprobs, "mask": mask}
        terms = {"policy/loss": self.objective(advantages=piece.advantages, **compared)}
        total = terms["policy/loss"] - self.update.entropy_coef * entropy
        if self.reference_kl.where == "loss":
            estimate = getattr(kl_estimators, self.reference_kl.estimator)
            total = total + self.kl.coef * estimate(logprobs, piece.ref_logprobs)
        if piece.values is not None:
            values = rollout.before_responses(stats.values if self.critic is None else self.critic(rollout.tokens))
            terms["value/loss"] = value_loss(values, piece.values, piece.returns, self.update.value_clip)
            total = total + self.update.value_coef * terms["value/loss"]
            if self.update.value_clip is not None:
                far = (values - piece.values).abs() > self.update.value_clip
                means.add_masked("value/clip_fraction", far.float(), mask)
        loss = masked_sum(weights * total, mask)
        for name, term in terms.items():
            check_finite(**{name.replace("/", "_"): masked_mean(term, mask)})
            means.add_masked(name, term, mask)
        check_finite(loss=loss)
        with torch.no_grad():
            ratio = probability_ratio(logprobs, piece.old_logprobs, mask)
            kl_to_old = torch.where(mask, kl_estimators.k3(piece.old_logprobs, logprobs), 0.0)
            means.add_masked("policy/kl_to_old", kl_to_old, mask)
            means.add_masked("policy/entropy", entropy, mask)
            clipped = self.objective.clipped(advantages=piece.advantages, **compared)
            means.add_masked("policy/clip_fraction", clipped.float(), mask)
            means.maximum("policy/ratio_max", ratio.max())
        return loss, kl_to_old.sum()

    def _profile(self, phase: str) -> AbstractContextManager[Any]:
        """The phase by its name in ``--trainer.profiler``."""
        return cast(Any, self.trainer).profiler.profile(phase)

    def _finish(self, judged: Judged, trajectory: Trajectory, means: Means, watch: Stopwatch) -> None:
        """Everything that must be in the checkpoint of this iteration happens here, inside ``training_step``."""
        rollout, mask = judged.rollout, trajectory.mask
        kl_to_ref = masked_sum(kl_estimators.k1(judged.old_logprobs, judged.ref_logprobs), mask, 1)
        means.add("objective/score", judged.scores)
        means.add("objective/reward", trajectory.rewards.sum(1))
        means.add("objective/kl_to_ref", kl_to_ref)
        means.add("objective/kl_coef", self.kl.coef)
        means.add_masked("objective/entropy", judged.entropy, mask)
        means.add("response/length", rollout.response_lengths)
        means.add("response/truncated_fraction", (~rollout.terminated).float())
        for name, value in judged.rewards.items():
            means.add(f"rewards/{name}", value)
        for name, optimizer in zip(("policy", "value"), _as_list(self.optimizers()), strict=False):
            means.add(f"{name}/lr", optimizer.param_groups[0]["lr"])
        responses, tokens = self.sum_over_ranks(
            torch.tensor([float(len(mask)), float(mask.sum())], dtype=torch.float64, device=self.device)
        ).tolist()
        measured = means.compute()
        self.kl.update(measured["objective/kl_to_ref"], int(responses))
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()
        self.count_iteration()
        seconds = sum(watch.seconds.values())
        measured |= {f"time/{phase}": value for phase, value in watch.seconds.items()}
        measured |= {
            "perf/tokens_per_second": tokens / seconds,
            "perf/responses_per_second": responses / seconds,
            "perf/peak_memory_gib": peak_memory_gib(),
            "progress/iteration": float(self.iteration),
            "progress/responses": float(self.iteration) * responses,
        }
        shown = ("objective/score", "objective/kl_to_ref", "perf/tokens_per_second")
        self.log_dict({k: v for k, v in measured.items() if k not in shown}, batch_size=1)
        self.log_dict({k: measured[k] for k in shown}, prog_bar=True, batch_size=1)

    # ---------------------------------------------------------------- forwards

    def _measure(self, rollout: Rollout, measure: Callable[[Rollout], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return by_micro_batch(rollout, self.update.max_tokens, measure)

    def _actor_stats(self, piece: Rollout) -> tuple[Tensor, ...]:
        stats = self.actor(piece.tokens, piece.scored)
        return piece.at_responses(stats.logprobs), piece.at_responses(stats.entropy)

    def _reference_logprobs(self, piece: Rollout) -> tuple[Tensor, ...]:
        return (piece.at_responses(self.reference(piece.tokens, piece.scored).logprobs),)

    def _values(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """Values [B, T], and what stands after the last token of truncated responses [B]."""
        if self.critic_source is None:
            return None, None

        def measure(piece: Rollout) -> tuple[Tensor, ...]:
            if self.critic is None:
                values = self.actor(piece.tokens, torch.zeros_like(piece.scored)).values
            else:
                values = self.critic(piece.tokens)
            return piece.before_responses(values), piece.at_end(values)

        values, after = self._measure(rollout, measure)
        return values, torch.where(rollout.terminated, 0.0, after) if self.bootstrap_truncated else None

    # --------------------------------------------------- validate, test, predict

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self.evaluation.start()

    def on_test_epoch_start(self) -> None:
        """Start the sums."""
        self.evaluation.start()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Score held-out prompts; the random numbers are the same in each validation."""
        return self._evaluate(batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """As ``validation_step``."""
        return self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self.log_dict({f"val/{name}": value for name, value in self.evaluation.compute().items()})

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses, one record each, with the prompt's columns."""
        rollout = self.generate(batch, self.actor, Stream.PREDICTION, batch_idx)
        return as_records(complete(rollout, batch, self.tokenizer))

    @torch.no_grad()
    def _evaluate(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        completions = self._answers(batch, self.actor, batch_idx)
        rewards, scores = self.scores.judge(completions)
        if batch_idx not in self.evaluation.reference_scores:
            _, against = self.scores.judge(self._answers(batch, self.reference, batch_idx))
            self.evaluation.reference_scores[batch_idx] = against
        logprobs, _ = self._measure(completions.rollout, self._actor_stats)
        (ref_logprobs,) = self._measure(completions.rollout, self._reference_logprobs)
        kl_to_ref = masked_sum(kl_estimators.k1(logprobs, ref_logprobs), completions.rollout.response_mask, 1)
        self.evaluation.add(batch_idx, completions.rollout, scores, rewards, kl_to_ref)
        return {"completions": completions, "scores": scores, "rewards": rewards, "kl_to_ref": kl_to_ref}

    def _answers(self, batch: PromptBatch, actor: Actor, batch_idx: int) -> Completions:
        return complete(self.generate(batch, actor, Stream.VALIDATION, batch_idx), batch, self.tokenizer)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
