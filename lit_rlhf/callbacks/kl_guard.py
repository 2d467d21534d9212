"""A callback that ends a run, or warns, if the policy moves too far from the reference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import lightning

from lit_rlhf.errors import UserError
from lit_rlhf.modules.hooks import OnPolicyCallback
from lit_rlhf.modules.on_policy import OnPolicy

LOWERS_KL = "a higher model.kl.coef, a lower learning rate or fewer epochs keep the KL lower"


class KLGuard(OnPolicyCallback):
    """A callback that ends the run with an error, or warns once, if the KL to the reference stays above a bound.

    The KL is the metric ``objective/kl_to_ref``, in nats per response, or this KL divided by the mean length of the
    responses, in nats per token. When the KL has been above the bound in ``iterations`` consecutive iterations, the run
    ends as if the last of these iterations were the last of the run: metrics and ``last.ckpt`` are written. The error
    is raised afterwards, so that the command has an exit status other than 0 and the policy is not exported. A run that
    is resumed from ``last.ckpt`` with a higher bound or other options continues from there.

    Args:
        bound: The largest KL that is allowed, in nats.
        per: Whether the bound is for a ``response`` (the mean over the responses of an iteration) or for a ``token``
            (the mean over the tokens of these responses).
        iterations: The number of consecutive iterations with a KL above the bound after which the guard acts.
        action: ``stop`` to end the run, ``warn`` to warn once and continue.

    Raises:
        ValueError: if ``bound`` is not positive, ``iterations`` is less than 1, or ``per`` or ``action`` is unknown.
        UserError: at the start, if there is no reference; at the end of training, if the guard has stopped the run.

    >>> KLGuard(bound=0.2, per="token").iterations
    3
    """

    def __init__(
        self,
        bound: float = 50.0,
        per: Literal["response", "token"] = "response",
        iterations: int = 3,
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        if not bound > 0:
            raise ValueError(f"KLGuard.bound must be positive, not {bound}")
        if iterations < 1:
            raise ValueError(f"KLGuard.iterations must be 1 or more, not {iterations}")
        if per not in ("response", "token"):
            raise ValueError(f"KLGuard.per must be response or token, not {per}")
        if action not in ("stop", "warn"):
            raise ValueError(f"KLGuard.action must be stop or warn, not {action}")
        self.bound = bound
        self.per = per
        self.iterations = iterations
        self.action = action
        self.above: list[float] = []  # the KL in the last iterations, all of which were above the bound
        self.warned = False
        self._error: str | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that the run measures the KL to a reference.

        Raises:
            UserError: if it does not.
        """
        if stage == "fit" and isinstance(pl_module, OnPolicy) and pl_module.reference_kl is None:
            raise UserError(
                "KLGuard needs the KL to the reference, but model.reference_kl is null: set it, or remove KLGuard"
            )

    def on_update_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, metrics: Mapping[str, float]
    ) -> None:
        """Compare the iteration's KL with the bound, and stop the run or warn if the guard must act.

        Every process has the same metrics, and therefore comes to the same decision.
        """
        kl = metrics["objective/kl_to_ref"] / (1.0 if self.per == "response" else metrics["response/length"])
        self.above = [*self.above, kl][-self.iterations :] if kl > self.bound else []
        if len(self.above) < self.iterations:
            return
        last = int(metrics["progress/iteration"])
        found = ", ".join(f"{value:.3g}" for value in self.above)
        when = f"iteration {last}" if len(self.above) == 1 else f"iterations {last - len(self.above) + 1} to {last}"
        message = f"the KL to the reference was {found} nats per {self.per} in {when}, above the bound {self.bound:g}"
        if self.action == "stop":
            self._error = message
            trainer.should_stop = True
        elif not self.warned:
            self.warned = True
            if trainer.is_global_zero:
                warnings.warn(f"KLGuard: {message}", stacklevel=2)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End with an error if the guard has stopped the run.

        Raises:
            UserError: if the guard has stopped the run.
        """
        if self._error is not None:
            raise UserError(
                f"KLGuard: {self._error}; {LOWERS_KL}, and iteration-*.ckpt (--checkpoint.keep_every_n) are earlier "
                "checkpoints to go back to"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the KL of the latest consecutive iterations above the bound, and whether the guard has warned.

        After the guard has stopped a run, the count starts again, so that the run can be resumed with other options.
        """
        return {"above": [] if self._error else self.above, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those values of the KL that exceed the present bound, and whether the guard has warned."""
        self.above = [kl for kl in state_dict["above"] if kl > self.bound]
        self.warned = state_dict["warned"]
