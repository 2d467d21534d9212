"""An exponential moving average of the actor's trained weights, which can stand in for the actor's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_rlhf.models.actor import Actor


@dataclass(frozen=True)
class Averaging:
    """The option to average the actor's trained weights over the iterations, and to evaluate and export the average.

    After each iteration (not after each optimizer step), average ← decay · average + (1 − decay) · weights, in float32.
    The average begins with the actor's initial weights. It spans about 1 / (1 − decay) iterations: with 0.9, it spans
    about the last 10, and after 30 iterations, the initial weights have a share of 0.9³⁰ ≈ 4 %. Training does not use
    the average: the responses for training are drawn with the actor's own weights. Validation, ``test``, ``predict``
    and exports use the average.

    Each process holds one more float32 copy of its part of the trained weights: the whole actor, its shard, or the
    adapter alone.

    Source: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; for the exponential moving
    average of a policy, Ramé et al. 2024 (WARP, arXiv 2406.16768), equation EMA in section 3.1, with decay = 1 − μ. In
    WARP, the KL is measured to the average; lit-rlhf always measures it to the reference.

    Args:
        decay: The share of the average that each iteration keeps, in [0, 1); with 0, the average equals the weights.

    Raises:
        ValueError: if ``decay`` is out of range.

    >>> Averaging(decay=0.95).decay
    0.95
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"averaging.decay must be in [0, 1), not {self.decay}")


class AveragedWeights(nn.Module):
    """The average of an actor's own weights, as buffers with the names that the weights have in the actor.

    If the actor is sharded, each process holds and updates the average of its own shard.

    Args:
        actor: The actor, with its initial weights.
        decay: The share of the average that each update keeps.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> actor = Actor(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).eval())
    >>> averaged, bias = AveragedWeights(actor, decay=0.75), actor.model.base_model.ln_f.bias.data
    >>> _ = bias.add_(1)
    >>> averaged.update()
    >>> with averaged.in_use():
    ...     float(bias[0])
    0.25
    >>> float(bias[0])
    1.0
    """

    def __init__(self, actor: Actor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._actor = (actor,)  # in a tuple, so that the actor does not become a submodule
        for name, weight in actor.own_parameters().items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, weight.detach().clone().float())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the actor's weights."""
        weights, averages = zip(*self._pairs(), strict=True)
        get_ema_multi_avg_fn(self.decay)(averages, weights, None)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the actor the averaged weights inside this context, and restore exactly its own weights at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the weights and their average in place, one tensor after the other."""
        for weight, average in self._pairs():
            own = weight.clone()
            weight.copy_(average)
            average.copy_(own)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return this process's parts of each weight and of the weight's average, as views of their memory."""
        weights = self._actor[0].own_parameters()
        return [(_local(weight.detach()), _local(self.get_buffer(name))) for name, weight in weights.items()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
