"""Hooks for callbacks inside an iteration of on-policy methods, with the typed data of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning

from lit_rlhf.types import Experience, Rollout, ScoredRollout, Trajectory


class OnPolicyCallback(lightning.Callback):
    """A callback with four hooks in addition to Lightning's; `PolicyGradient` and `TRPO` call them in each iteration.

    The hooks run in the order below, on every process, each with the rows of its own process. A hook that contains a
    collective operation must therefore run it on every process. The iteration continues with the same tensors, so a
    hook must not change them. Methods with these names are also called on any other Lightning callback; this class only
    adds the types.

    >>> class Longest(OnPolicyCallback):
    ...     tokens = 0
    ...
    ...     def on_rollout_end(self, trainer, pl_module, rollout):
    ...         self.tokens = max(self.tokens, int(rollout.response_lengths.max()))
    >>> Longest().tokens
    0
    """

    def on_rollout_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, rollout: Rollout
    ) -> None:
        """Called when the responses have been generated, with the rollout; with `DynamicSampling`, after each draw."""

    def on_rewards(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        scored: ScoredRollout,
        trajectory: Trajectory,
    ) -> None:
        """Called when the responses have been judged, with the models' outputs, the scores, and each token's reward."""

    def on_advantages(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, experience: Experience
    ) -> None:
        """Called before the update, with the advantages, the returns, and everything else that the update uses."""

    def on_update_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, metrics: Mapping[str, float]
    ) -> None:
        """Called after the update, with the metrics of the iteration, which are the same on every process."""


def call_hook(module: lightning.LightningModule, name: str, *data: Any) -> None:
    """Call a hook of all callbacks that have it, in the order of the Trainer's callbacks.

    Args:
        module: The module that trains.
        name: The name of the hook: a method of `OnPolicyCallback`, or ``on_samples``.
        data: The arguments of the hook after the Trainer and the module.
    """
    for callback in cast(Any, module.trainer).callbacks:
        hook = getattr(callback, name, None)
        if hook is not None:
            hook(module.trainer, module, *data)
