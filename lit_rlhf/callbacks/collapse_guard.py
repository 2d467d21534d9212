"""A callback that warns, or ends a run, if the policy collapses or has nothing left to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning

from lit_rlhf.callbacks.kl_guard import LOWERS_KL
from lit_rlhf.errors import UserError
from lit_rlhf.modules.hooks import OnPolicyCallback

SAME = 1e-6
"""A standard deviation of the scores below this fraction of their mean is a rounding error of equal scores."""
FEW_TRUNCATED = 0.5
"""Truncated responses are judged only if they were at most this fraction in the first iteration."""
HELP = {
    "entropy": "a lower model.actor_optimizer.lr, a larger model.kl.coef, or model.update.entropy_coef (0.001 to 0.01) "
    "keeps it up",
    "length": "look at samples.jsonl: usually short responses score best, or model.kl.coef is so large that tokens "
    "cost more than they gain",
    "truncated": "look at samples.jsonl: usually length or repetition pays; model.scores.truncation_penalty, a larger "
    "model.kl.coef or another reward helps",
    "equal_scores": "try the reward on some responses with make_reward_inputs, choose easier or harder prompts, or use "
    "model.dynamic_sampling",
    "kl": LOWERS_KL,
}
"""What usually helps, by the name of the condition."""


class CollapseGuard(OnPolicyCallback):
    """A callback that warns once of each kind of collapse, in one line that says what usually helps, or ends the run.

    A condition holds if it is met in each of ``iterations`` consecutive iterations. With ``action: stop``, the run then
    ends as if the last of these iterations were the last of the run: metrics and ``last.ckpt`` are written. The error
    is raised afterwards, so that the command has an exit status other than 0 and the policy is not exported. A run that
    is resumed from ``last.ckpt`` with other options continues from there.

    Without a reference, the KL is not measured, and ``kl`` has no effect. Every run of the command line has this
    callback, with the options ``--collapse.*``; modules that are not on-policy have none of these metrics.

    Args:
        entropy: The fraction of the first iteration's entropy below which the policy has collapsed; None for no check.
        length: The fraction of the first iteration's mean length below which responses have collapsed; None for no
            check.
        truncated: The fraction of truncated responses above which they have become too long; it counts only if at most
            half of the responses were truncated in the first iteration. None for no check.
        equal_scores: Whether to check that scores differ: those of the iteration and, with several responses to each
            prompt, those of the responses to at least one prompt.
        kl: The largest KL to the reference, in nats per token; None for no check. `KLGuard` has more options.
        iterations: The number of consecutive iterations in which a condition must hold.
        action: ``warn`` to warn once of each condition and continue, ``stop`` to end the run.

    Raises:
        ValueError: if a number is out of range, or ``action`` is unknown.
        UserError: at the end of training, if the guard has stopped the run.

    >>> CollapseGuard(entropy=None, action="stop").iterations
    3
    """

    def __init__(
        self,
        entropy: float | None = 0.25,
        length: float | None = 0.25,
        truncated: float | None = 0.95,
        equal_scores: bool = True,
        kl: float | None = 2.0,
        iterations: int = 3,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        for name, fraction in {"entropy": entropy, "length": length, "truncated": truncated}.items():
            if fraction is not None and not 0 < fraction < 1:
                raise ValueError(f"collapse.{name} must be between 0 and 1, or null, not {fraction}")
        if kl is not None and not kl > 0:
            raise ValueError(f"collapse.kl must be positive or null, not {kl}")
        if iterations < 1:
            raise ValueError(f"collapse.iterations must be 1 or more, not {iterations}")
        if action not in ("warn", "stop"):
            raise ValueError(f"collapse.action must be warn or stop, not {action}")
        self.entropy = entropy
        self.length = length
        self.truncated = truncated
        self.equal_scores = equal_scores
        self.kl = kl
        self.iterations = iterations
        self.action = action
        self.first: dict[str, float] = {}  # the metrics of the first iteration
        self.held: dict[str, int] = {}  # the number of consecutive iterations in which each condition has held
        self.warned: list[str] = []  # the conditions of which the guard has warned
        self._error: str | None = None

    def on_update_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, metrics: Mapping[str, float]
    ) -> None:
        """Judge the iteration's metrics, and warn or stop the run if a condition has held for long enough.

        Every process has the same metrics, and therefore comes to the same decision.
        """
        names = ("objective/entropy", "response/length", "response/truncated_fraction")
        self.first = self.first or {name: metrics[name] for name in names}
        found = self.collapses(metrics)
        self.held = {name: self.held.get(name, 0) + 1 for name in found}
        last = int(metrics["progress/iteration"])
        when = f"iteration {last}" if self.iterations == 1 else f"iterations {last - self.iterations + 1} to {last}"
        for name, text in found.items():
            if self.held[name] < self.iterations or (self.action == "warn" and name in self.warned):
                continue
            line = f"{text} in {when}; {HELP[name]} (collapse.{name})"
            if self.action == "stop":
                self._error = self._error or line
                trainer.should_stop = True
            else:
                self.warned.append(name)
                if trainer.is_global_zero:
                    print(f"warning: {line}", flush=True)

    def collapses(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the conditions that hold in an iteration, each with a text that says what was found."""
        found, entropy, length = {}, metrics["objective/entropy"], metrics["response/length"]
        truncated, before = metrics["response/truncated_fraction"], self.first["response/truncated_fraction"]
        if self.entropy is not None and entropy < self.entropy * self.first["objective/entropy"]:
            began = self.first["objective/entropy"]
            found["entropy"] = f"the entropy fell from {began:.3g} to {entropy:.3g} nats per token"
        if self.length is not None and length < self.length * self.first["response/length"]:
            began = self.first["response/length"]
            found["length"] = f"the mean length of the responses fell from {began:.3g} to {length:.3g} tokens"
        if self.truncated is not None and before <= FEW_TRUNCATED and truncated > self.truncated:
            found["truncated"] = f"the truncated responses rose from {before:.0%} to {truncated:.0%}"
        if self.equal_scores and metrics["objective/score_std"] <= SAME * abs(metrics["objective/score"]):
            found["equal_scores"] = f"all scores are {metrics['objective/score']:.3g}"
        elif self.equal_scores and metrics.get("objective/uninformative_fraction") == 1:
            found["equal_scores"] = "all responses to a prompt have the same score, for every prompt"
        kl = metrics.get("objective/kl_to_ref", 0.0) / length
        if self.kl is not None and kl > self.kl:
            found["kl"] = f"the KL to the reference is {kl:.3g} nats per token, above the bound {self.kl:g}"
        return found

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End with an error if the guard has stopped the run.

        Raises:
            UserError: if the guard has stopped the run.
        """
        if self._error is not None:
            raise UserError(
                f"CollapseGuard: {self._error}; iteration-*.ckpt (--checkpoint.keep_every_n) are earlier checkpoints "
                "to go back to"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the first iteration's metrics, how long each condition has held, and what the guard has warned of.

        After the guard has stopped a run, the count starts again, so that the run can be resumed with other options.
        """
        return {"first": self.first, "held": {} if self._error else self.held, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first iteration's metrics, how long each condition has held, and what the guard has warned of."""
        self.first, self.held = dict(state_dict["first"]), dict(state_dict["held"])
        self.warned = list(state_dict["warned"])
