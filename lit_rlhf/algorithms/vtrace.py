"""V-trace: estimates of the actor's advantages and values from responses that were drawn from another policy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_rlhf.algorithms.advantages import AdvantageEstimator, td_errors
from lit_rlhf.types import Estimates, Trajectory, check_shapes


@dataclass(frozen=True)
class VTrace(AdvantageEstimator):
    """GAE for off-policy responses, with every TD error and every trace weighted by a truncated importance ratio.

    vₜ − Vₜ = min(ρ̄, ρₜ) δₜ + γλ min(c̄, ρₜ) (vₜ₊₁ − Vₜ₊₁) and Aₜ = min(ρ̄, ρₜ) (δₜ + γλ (vₜ₊₁ − Vₜ₊₁)),

    where δₜ = rₜ + γ Vₜ₊₁ − Vₜ, and ρₜ = π_old(aₜ|sₜ) / μ(aₜ|sₜ), given in ``trajectory.ratios``, is the probability of
    the token under the actor at the start of the update, divided by its probability under the engine's policy; without
    ``trajectory.ratios``, every ρₜ is 1. The critic's target is vₜ. With λ = 1, Aₜ is min(ρ̄, ρₜ) (rₜ + γ vₜ₊₁ − Vₜ).
    ρ̄ determines the policy whose values the targets estimate: π_old for ρ̄ = ∞, and one between μ and π_old for a
    smaller ρ̄. c̄ determines how far the TD errors of later tokens reach back, and with it the variance. If all ratios
    are 1, and ρ̄ and c̄ are at least 1, the estimates equal those of `GAE`, which are those of `MonteCarlo` if λ = 1.

    The advantages already contain the importance weight min(ρ̄, ρₜ), so a `Correction` may only add a mask.

    Source: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), equation 1 and section 4.2. λ is from its remark 2 and, in
    the advantages, from ``vtrace_td_error_and_advantage`` of rlax.

    Args:
        rho_bar: ρ̄, the largest weight of a TD error; positive, or ``.inf`` for no bound.
        c_bar: c̄, the largest weight of a trace; positive, and at most ρ̄.
        gamma: The discount γ, in [0, 1].
        lam: The λ of the traces, in [0, 1].

    Raises:
        ValueError: if a number is out of range.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> trajectory = Trajectory(rewards=rewards, values=values, mask=rewards >= 0, ratios=torch.tensor([[3.0, 0.5]]))
    >>> VTrace()(trajectory)
    Estimates(advantages=tensor([[0.2500, 0.2500]]), returns=tensor([[0.7500, 0.7500]]))
    """

    rho_bar: float = 1.0
    c_bar: float = 1.0
    gamma: float = 1.0
    lam: float = 1.0
    weights_by_ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rho_bar > 0.0:
            raise ValueError(f"advantages.rho_bar must be positive, not {self.rho_bar}")
        if not 0.0 < self.c_bar <= self.rho_bar:
            raise ValueError(f"advantages.c_bar must be positive and at most rho_bar={self.rho_bar}, not {self.c_bar}")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"advantages.{name} must be in [0, 1], not {getattr(self, name)}")

    def __call__(self, trajectory: Trajectory) -> Estimates:
        """Return advantages and V-trace targets, each [B, T]."""
        mask, ratios, values = trajectory.mask, trajectory.ratios, trajectory.values
        deltas = td_errors(trajectory.rewards, values, mask, trajectory.bootstrap, self.gamma)
        ratios = torch.ones_like(deltas) if ratios is None else torch.where(mask, ratios, 1.0)
        weights, decay = ratios.clamp(max=self.rho_bar), self.gamma * self.lam
        errors, later = trace_sums(weights * deltas, decay * ratios.clamp(max=self.c_bar), mask)
        targets = errors if values is None else errors + torch.where(mask, values, 0.0)
        return Estimates(advantages=weights * (deltas + decay * later), returns=targets)


def trace_sums(x: Tensor, traces: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sums Gₜ = xₜ + cₜ Gₜ₊₁ and Gₜ₊₁ for each token t, where t + 1 is the next token inside the mask.

    With the weighted TD errors as x and γλ min(c̄, ρₜ) as c, Gₜ is the difference vₜ − Vₜ of V-trace.

    Source: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), remark 1.

    Args:
        x: [B, T], the terms of the sums.
        traces: [B, T], the factors cₜ.
        mask: Bool [B, T], True at the tokens that count; it may have holes.

    Returns:
        Gₜ and Gₜ₊₁, each [B, T]; both are 0 outside the mask, and Gₜ₊₁ is 0 at the last token inside the mask.

    Raises:
        ValueError: if the shapes do not match.

    >>> x, traces = torch.tensor([[1.0, 9.0, 4.0]]), torch.tensor([[0.5, 9.0, 1.0]])
    >>> trace_sums(x, traces, torch.tensor([[True, False, True]]))
    (tensor([[3., 0., 4.]]), tensor([[4., 0., 0.]]))
    """
    check_shapes(x=x, traces=traces, mask=mask)
    x, traces = torch.where(mask, x, 0.0), torch.where(mask, traces, 0.0)
    total, sums, later = x.new_zeros(len(x)), torch.zeros_like(x), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        later[:, t] = total
        total = torch.where(mask[:, t], x[:, t] + traces[:, t] * total, total)
        sums[:, t] = total
    return torch.where(mask, sums, 0.0), torch.where(mask, later, 0.0)
