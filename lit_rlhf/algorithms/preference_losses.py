"""Losses for pairs of responses, which `DPO` can use in place of the Bradley–Terry loss.

Each loss is a function of d = s_chosen − s_rejected, where s is the score of a response:

===========  =============================  ====================================  ==============
class        loss of a pair                 score of a response y to x            reference used
===========  =============================  ====================================  ==============
(default)    −log σ(d)                      β log (π(y|x) / π_ref(y|x))           yes
`IPO`        (d / β − 1 / (2β))²            β log (π(y|x) / π_ref(y|x))           yes
`Hinge`      max(0, 1 − d)                  β log (π(y|x) / π_ref(y|x))           yes
`SimPO`      −log σ(d − γ)                  (β / |y|) log π(y|x)                  no
===========  =============================  ====================================  ==============

The gradient of the Bradley–Terry loss is not 0 at any finite d, so this loss never stops pushing two responses apart.
IPO and the hinge loss stop at a margin.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid, relu


class PreferenceLoss(ABC):
    """The interface of losses for pairs of responses.

    >>> class Squared(PreferenceLoss):
    ...     def __call__(self, difference, beta):
    ...         return (difference - 1.0) ** 2
    >>> import torch
    >>> Squared()(torch.tensor([0.5]), beta=0.1)
    tensor([0.2500])
    """

    uses_reference: ClassVar[bool] = True
    """Whether the score is β log (π(y|x) / π_ref(y|x)), the implicit reward; if not, it is (β / |y|) log π(y|x)."""

    @abstractmethod
    def __call__(self, difference: Tensor, beta: float) -> Tensor:
        """Return the loss of each pair.

        Args:
            difference: The score of the better response minus that of the worse one; of any shape.
            beta: β, the factor that the scores contain.

        Returns:
            The losses, in the shape of ``difference``.
        """


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimization: (d / β − 1 / (2β))² for the score difference d = s_chosen − s_rejected.

    The loss is smallest where d / β, the difference in log(π / π_ref) between the two responses, is 1 / (2β), so that
    the policy stays at a finite distance from the reference even where one response is always preferred.

    Source: Azar et al. 2024 (arXiv 2310.12036), equation 17, with τ = β.

    >>> import torch
    >>> IPO()(torch.tensor([0.0, 0.5]), beta=0.1)
    tensor([25.,  0.])
    """

    def __call__(self, difference: Tensor, beta: float) -> Tensor:
        """Return the loss of each pair."""
        return ((difference - 0.5) / beta) ** 2


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """The hinge loss max(0, 1 − d) for the score difference d = s_chosen − s_rejected.

    A pair with d ≥ 1 has no gradient.

    Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), equation 1, with the implicit rewards of Liu et al. 2024 (RSO,
    arXiv 2309.06657), equation 7.

    >>> import torch
    >>> Hinge()(torch.tensor([0.25, 2.0]), beta=0.1)
    tensor([0.7500, 0.0000])
    """

    def __call__(self, difference: Tensor, beta: float) -> Tensor:
        """Return the loss of each pair."""
        return relu(1.0 - difference)


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Simple preference optimization: −log σ(d − γ) for the score difference d = s_chosen − s_rejected.

    The score of a response is β times the mean log-probability of its tokens. The loss uses no reference model. Longer
    responses are not preferred for their length, because the score is divided by the number of tokens. Useful values of
    β are larger than those for DPO: 2 to 2.5.

    Source: Meng et al. 2024 (arXiv 2405.14734), equation 6.

    Args:
        gamma: γ, the margin by which the score of the chosen response should exceed that of the rejected one; 0
            or more. About β / 2 is usual.

    Raises:
        ValueError: if gamma is negative or not finite.

    >>> import torch
    >>> SimPO(gamma=1.0)(torch.tensor([1.0]), beta=2.0)
    tensor([0.6931])
    """

    uses_reference: ClassVar[bool] = False

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < float("inf"):
            raise ValueError(f"loss.gamma must be 0 or more and finite, not {self.gamma}")

    def __call__(self, difference: Tensor, beta: float) -> Tensor:
        """Return the loss of each pair."""
        return -logsigmoid(difference - self.gamma)
