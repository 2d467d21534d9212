"""An actor's adapters on a vLLM server, which loads the base model once and then gets only the adapters."""

import os
from pathlib import Path

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.generation.engine import EngineContext
from lit_rlhf.http import JSONClient
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import starts_from
from lit_rlhf.models.adapter_folders import base_of, find_adapter, write_adapter
from lit_rlhf.models.adapters import LoRA, active_adapters, adapted_layers, whole_model
from lit_rlhf.models.sharding import full_state_dict, owners
from lit_rlhf.models.weights import unread_weights

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""


def check_adapter(lora: LoRA, source: str) -> None:
    """Check that a vLLM server supports an actor's adapter.

    Args:
        lora: The options of the adapter.
        source: The folder or the hub id of the actor.

    Raises:
        UserError: if the base is quantized, if the adapter uses DoRA, or if the actor's source is itself an adapter and
            is merged into the base.
    """
    if lora.quantization is not None:
        raise UserError("model.engine: VLLMEngine does not take quantized weights; use NativeEngine or Ahead")
    if lora.dora:
        raise UserError("model.adapter.dora: vLLM does not support DoRA; use another engine, or LoRA")
    if find_adapter(source) and not starts_from(source, lora):
        raise UserError(
            f"model.adapter.chained is merged, but vLLM needs a folder of the base: merge {source} (lit-rlhf export "
            "--merge) and use the result as model.actor, or choose stacked"
        )


def trained_weights(actor: Actor) -> dict[str, Tensor]:
    """Return the full trained weights of an actor with an adapter, by name; the server needs no other weights.

    All processes call this function together. If the actor is sharded, the result is empty on all processes except
    process 0.

    Args:
        actor: The actor that owns the base, or an actor with a view of the base, for which the result is empty.
    """
    return {} if owners(actor) else full_state_dict(actor, trained_only=True)


class ServedAdapters:
    """A copy of a run's adapters, on process 0, and the folder or hub id of the base model that the server loads.

    Args:
        context: The properties of the run that the engine needs.

    Raises:
        UserError: if the actor cannot be loaded, or if its source is an adapter that names no base.
    """

    def __init__(self, context: EngineContext) -> None:
        with unread_weights():  # the base's weights are not needed here
            self.actor = context.load_actor()
        base = base_of(context.source)
        self.base = os.path.abspath(base) if os.path.isdir(base) else base

    @property
    def arguments(self) -> list[str]:
        """vLLM's command-line arguments for adapters.

        Raises:
            UserError: if the adapters need a higher rank than vLLM supports.
        """
        return ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", str(self.max_rank)]

    @property
    def max_rank(self) -> int:
        """The smallest value of vLLM's ``--max-lora-rank`` that is enough for the run's adapters.

        Raises:
            UserError: if the adapters need a higher rank than vLLM supports.
        """
        layers = adapted_layers(self.actor.model)
        needed = max(sum(layer.r[name] for name in layer.lora_A) for layer in layers)
        for rank in RANKS:
            if rank >= needed:
                return rank
        raise UserError(f"model.adapter.rank: vLLM supports ranks of at most {RANKS[-1]}, not {needed}")

    def write(self, actor: Actor, weights: dict[str, Tensor], folder: Path) -> bool:
        """Join the adapters that an actor uses into one, and write it to a folder; return whether the actor uses any.

        Args:
            actor: The actor that owns the base, or an actor with a view of the base.
            weights: The result of `trained_weights`.
            folder: The folder to write; it is not made if the actor computes without adapters.

        Raises:
            UserError: if the actor is a whole model of its own.
        """
        if not adapted_layers(whole_model(actor.model)):
            raise UserError(
                "model.reference is a whole model, but the server of model.engine has only the base of model.adapter, "
                "so it cannot generate the reference's held-out responses: name the base, or an adapter of it"
            )
        adapters = list(active_adapters(actor.model))
        if not adapters:
            return False
        if weights:
            with torch.no_grad():
                for name, parameter in self.actor.own_parameters().items():
                    parameter.copy_(weights[name])
        write_adapter(self.actor.model, adapters, self.base, folder, head=None)
        return True


def push_adapter(client: JSONClient, name: str, folder: Path) -> None:
    """Make the server load an adapter.

    Args:
        client: The client of the server.
        name: The name of the adapter, which requests use as their model.
        folder: The folder of the adapter.

    Raises:
        UserError: if the server does not load the adapter.
    """
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}  # a repeated request is not refused
    try:
        client.post_for_text("/v1/load_lora_adapter", body)
    except UserError as error:
        if "answered 404" not in str(error):
            raise
        raise UserError(f"{error}; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1") from error


def remove_adapter(client: JSONClient, name: str) -> None:
    """Make the server unload an adapter.

    Args:
        client: The client of the server.
        name: The name of the adapter.

    Raises:
        UserError: if the server does not unload the adapter.
    """
    client.post_for_text("/v1/unload_lora_adapter", {"lora_name": name})
