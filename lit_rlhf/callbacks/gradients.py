"""A callback that measures in which parts of the models the gradients are large."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.steps import gradient_norm
from lit_rlhf.strategies import FSDP

GROUPS = {"head": r"head\.", "embeddings": r"embed|\.wte\.|\.wpe\.", "layers": r"\.\d+\."}
"""The default groups: the value, score and language-model heads; the embeddings; the decoder layers."""


class GradientShares(lightning.Callback):
    """A callback that logs the share of each group of parameters in the squared norm of the gradient.

    The share of a group is ‖g_group‖² / ‖g‖², where g is the gradient of all parameters of an optimizer. The shares of
    an optimizer add up to 1, and clipping does not change them. They are logged as means over the optimizer steps of an
    iteration, for example as ``policy/grad_share_layers``. The norms ‖g‖ themselves, the share of clipped steps and the
    learning rates are metrics of every run: ``policy/grad_norm``, ``policy/grad_clipped_fraction``, ``policy/lr``.

    Args:
        groups: A regular expression for each group, by the group's name. A parameter belongs to the first group whose
            expression is found in the parameter's name, such as ``actor.model.model.layers.3.mlp.up_proj.weight``, or
            to the group ``other`` if no expression is found in it.

    >>> GradientShares({"A": "lora_A", "B": "lora_B"}).group_of("actor.layers.3.lora_B.weight")
    'B'
    >>> GradientShares().group_of("actor.model.model.norm.weight")
    'other'
    """

    def __init__(self, groups: Mapping[str, str] = GROUPS) -> None:
        self.groups = dict(groups)
        self._parameters: dict[str, dict[str, list[nn.Parameter]]] = {}  # of each optimizer, by group
        self._shares: dict[str, list[Tensor]] = {}  # in the steps of the current iteration, by the metric's name

    def group_of(self, name: str) -> str:
        """Return the group of the parameter with this name."""
        return next((group for group, pattern in self.groups.items() if re.search(pattern, name)), "other")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Assign the trained parameters to the groups."""
        assert isinstance(pl_module, AlignmentModule)
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._parameters = {}
        for own, parameters in pl_module.trained_parameters().items():
            groups = self._parameters.setdefault(own, {})
            for parameter in parameters:
                groups.setdefault(self.group_of(names[id(parameter)]), []).append(parameter)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Discard the shares of the previous iteration."""
        self._shares = {}

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log each group's share in the squared norm of the gradient, as the mean over the iteration's steps so far.

        The last step thus logs the mean of the whole iteration. The host does not wait for the device.
        """
        assert isinstance(pl_module, AlignmentModule)
        own = next(name for name, each in pl_module.optimizers_by_name().items() if each.optimizer is optimizer)
        # FSDP1's shards are plain tensors, so their squared norms must be summed over the processes
        reduce = pl_module.sum_over_ranks if isinstance(trainer.strategy, FSDP) else None
        groups = self._parameters[own]
        squares = torch.stack([gradient_norm(parameters, reduce).square() for parameters in groups.values()])
        for group, share in zip(groups, squares / squares.sum().clamp(min=1e-30), strict=True):
            shares = self._shares.setdefault(f"{own}/grad_share_{group}", [])
            shares.append(share)
            pl_module.log(f"{own}/grad_share_{group}", torch.stack(shares).mean(), batch_size=1)
