"""Callbacks that change the decoder layers before training: one compiles them, one recomputes their activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_rlhf.compat import allow_variants, selected_adapters
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapted_layers, selected
from lit_rlhf.models.sharding import decoder_layers
from lit_rlhf.modules.trpo import TRPO

VARIANTS = 8
"""The number of variants of a layer that may be compiled for each choice of adapters.

A layer has one variant with gradients and one without, for example.
"""


class CompileLayers(Callback):
    """A callback that compiles every decoder layer with ``torch.compile``, for sequences of any length.

    The first iteration takes about a minute longer. Decoding is not compiled. Layers are compiled in place, so the
    names in checkpoints do not change. In a configuration::

        trainer:
          callbacks: [CompileLayers]

    Raises:
        UserError: if the module is TRPO, which differentiates twice (compiled layers can be differentiated only once),
            or if the models do not name their decoder layers; both conditions are checked when the fit starts.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compile the layers, once the models are loaded.

        Raises:
            UserError: if the module is TRPO, or if the models do not name their decoder layers.
        """
        if isinstance(pl_module, TRPO):
            raise UserError(
                "CompileLayers: TRPO differentiates twice, but compiled layers can be differentiated only once"
            )
        adapters = {name for layer in adapted_layers(pl_module) for name in layer.lora_A}
        allow_variants(VARIANTS * (len(adapters) + 1))  # each role selects its own adapters; the reference, none
        for layer in _layers(pl_module, self):
            forward: Any = layer.forward
            if isinstance(forward, _Recomputed):  # torch.compile does not look into checkpoint(): compile what it calls
                forward.forward = torch.compile(forward.forward, dynamic=True)
            else:
                layer.forward = torch.compile(forward, dynamic=True)


class ActivationCheckpointing(Callback):
    """A callback that makes the backward pass recompute each trained decoder layer from the layer's stored inputs.

    Training then needs less memory, and a quarter to a third more time. The results are the same. In a configuration::

        trainer:
          callbacks: [ActivationCheckpointing]

    Raises:
        UserError: if the models do not name their decoder layers; this is checked when the fit starts.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Make the backward pass recompute the activations of the trained layers, once the models are loaded.

        Raises:
            UserError: if the models do not name their decoder layers.
        """
        for layer in _layers(pl_module, self):
            if any(parameter.requires_grad for parameter in layer.parameters()):
                layer.forward = _Recomputed(layer)


def _layers(module: lightning.LightningModule, callback: Callback) -> list[nn.Module]:
    layers = list(decoder_layers(module))
    if not layers:
        raise UserError(f"{type(callback).__name__}: these models do not name their decoder layers (_no_split_modules)")
    return layers


class _Recomputed:
    """A layer's forward pass, which stores only the layer's inputs and is repeated in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        self.forward: Callable[..., Any] = layer.forward
        self.adapted = adapted_layers(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        if self.adapted:  # the backward pass repeats the forward pass when other adapters may be selected
            adapters = selected_adapters(self.adapted[0])
            options["context_fn"] = lambda: (nullcontext(), selected(self.adapted, adapters))
        return checkpoint(self.forward, *args, **options, **kwargs)
