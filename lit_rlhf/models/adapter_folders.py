"""Folders in peft's format, which hold an adapter instead of a whole model."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapted_layers, adapter_parameters, add_adapter, import_peft, target_names
from lit_rlhf.models.quantization import has_quantized_layers

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
HEAD = "base_model.model.score.weight"
"""The name of the head's weight in the file of a reward model's or critic's adapter."""


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter as it is saved: its options, its weights, and the additional parts of a critic or a reward model."""

    source: str  # the folder or the hub id
    base: str  # the folder or the hub id of the base
    config: LoraConfig
    weights: dict[str, Tensor]  # by peft's names, without the head
    head: Tensor | None  # [1, H], of a reward model or a critic; None for a language model
    settings: dict[str, Any]  # the contents of config.json, such as score_mean; empty if there is no such file


def find_adapter(source: Any) -> str | None:
    """Return the path of an adapter's configuration file; None if the source is not an adapter.

    Args:
        source: The source of a model, see `ModelSource`.
    """
    if not isinstance(source, str):
        return None
    if os.path.isdir(source):
        return str(Path(source) / CONFIG) if (Path(source) / CONFIG).is_file() else None
    try:
        return find_adapter_config_file(source)
    except Exception:  # neither a folder nor a model that the hub provides: reading its configuration will say so
        return None


def base_of(source: str) -> str:
    """Return the folder or the hub id of the base of an adapter, or the source itself if it is a whole model.

    Raises:
        UserError: if the adapter's configuration names no base.
    """
    path = find_adapter(source)
    if path is None:
        return source
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError):  # not JSON, not an object, or without this entry
        base = None
    if not base:
        raise UserError(f"{source}: {CONFIG} names no base model (base_model_name_or_path)")
    return str(base)


def same_model(first: str, second: str) -> bool:
    """Return whether two sources are the same folder or the same hub id.

    >>> same_model("runs/sft/export", "./runs/sft/export/"), same_model("Qwen/Qwen3-8B", "Qwen/Qwen3-4B")
    (True, False)
    """
    if os.path.isdir(first) and os.path.isdir(second):
        return os.path.samefile(first, second)
    return os.path.normpath(first) == os.path.normpath(second)


def read_adapter(source: str, field: str) -> SavedAdapter:
    """Read an adapter from a folder or from the hub.

    Args:
        source: The folder or the hub id.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the adapter cannot be read, is not a LoRA adapter, or does not name its base.
    """
    import_peft()
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    try:
        config = PeftConfig.from_pretrained(source)
        weights = load_peft_weights(source, device="cpu")
    except Exception as error:  # peft and safetensors raise exceptions of many types here
        raise UserError(
            f"{field}: the adapter {source} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{field}: the adapter {source} is {config.peft_type}, but only LoRA is supported")
    head = weights.pop(HEAD, None)
    return SavedAdapter(source, base_of(source), config, weights, head, _settings(source))


def add_saved_adapter(model: PreTrainedModel, name: str, saved: SavedAdapter, field: str) -> None:
    """Add a saved adapter to a model in place; all parameters of the adapter and of the model are frozen.

    Args:
        model: The adapter's base, whose weights need not have been read yet.
        name: The adapter's name in the model.
        saved: The adapter.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the adapter does not fit the model.
    """
    from peft import set_peft_model_state_dict

    config: Any = deepcopy(saved.config)
    config.modules_to_save, config.task_type, config.inference_mode = None, None, False
    if config.target_modules == "all-linear":
        config.target_modules = target_names(model, "all-linear")
    does_not_fit = f"{field}: the adapter {saved.source} does not fit {type(model).__name__} of {saved.base}"
    try:
        add_adapter(model, name, config)
        result: Any = set_peft_model_state_dict(model, dict(saved.weights), adapter_name=name)
    except (UserError, RuntimeError, ValueError) as error:
        raise UserError(f"{does_not_fit}: {' '.join(str(error).split())[:300]}") from error
    missing = [key for key in adapter_parameters(model, name) if key in result.missing_keys]
    if unfitting := [*result.unexpected_keys, *missing]:
        raise UserError(f"{does_not_fit}: see {min(unfitting)}")


def merge_adapter(model: PreTrainedModel, saved: SavedAdapter, field: str) -> PreTrainedModel:
    """Add a saved adapter to a model's weights, and return the model, which then has no adapted layers.

    Args:
        model: The adapter's base, with its weights; changed in place.
        saved: The adapter.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the adapter does not fit the model, or the model is quantized.
    """
    add_saved_adapter(model, "merged", saved, field)
    return merge_all(model, ["merged"])


def merge_all(model: PreTrainedModel, adapters: list[str]) -> PreTrainedModel:
    """Add the named adapters to a model's weights, and return the model, which then has no adapted layers.

    Args:
        model: The base with its adapters; changed in place.
        adapters: The names of the adapters; all others are discarded.

    Raises:
        UserError: if the base is quantized.
    """
    if has_quantized_layers(model):
        raise UserError(f"no adapter can be merged into {model.name_or_path}, because its weights are quantized")
    for name, layer in [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]:
        layer.merge(adapter_names=adapters)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def write_adapter(model: PreTrainedModel, adapters: list[str], base: str, folder: Path, head: Tensor | None) -> None:
    """Write the sum of a model's adapters as one adapter that peft and vLLM can load.

    Args:
        model: The base with its adapters; the base's weights need not have been read.
        adapters: The names of the adapters to add up; at least one.
        base: The folder or the hub id of the base.
        folder: The folder to write.
        head: The weight of the head of a reward model or a critic, [1, H]; None for a language model.
    """
    from peft import get_peft_model_state_dict

    if len(adapters) == 1:
        config: Any = deepcopy(model.peft_config[adapters[0]])
        state = get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name=adapters[0])
        weights = {f"base_model.model.{name}": weight for name, weight in state.items()}
    else:
        config, weights = joined_adapter(model, adapters)
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM" if head is None else "SEQ_CLS"
    config.inference_mode = True
    if head is not None:
        config.modules_to_save = ["score"]
        weights[HEAD] = head
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    cpu = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(cpu, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def joined_adapter(model: PreTrainedModel, adapters: list[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the options and the weights of one adapter whose output is the sum of several adapters' outputs.

    The matrices A are concatenated along the rank, and so are the matrices B, each multiplied by its scaling. If an
    adapter does not adapt a layer, its part of this layer's matrices is 0.

    Args:
        model: A base with its adapters; the base's weights need not have been read.
        adapters: The names of the adapters.

    Returns:
        The options, and the weights by peft's names.
    """
    layers: list[Any] = [layer for layer in adapted_layers(model) if any(name in layer.lora_A for name in adapters)]
    names = {id(module): name for name, module in model.named_modules()}
    ranks = {name: max(layer.r.get(name, 0) for layer in layers) for name in adapters}
    weights = {}
    for layer in layers:
        parts: list[tuple[Tensor, Tensor]] = []
        for name in adapters:
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                up = up * layer.scaling[name]
            else:
                down, up = torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)
            missing = ranks[name] - len(down)
            parts.append((_pad_rows(down, missing), _pad_rows(up.T, missing).T))
        prefix = f"base_model.model.{names[id(layer)]}"
        weights[f"{prefix}.lora_A.weight"] = torch.cat([down for down, _ in parts], 0)
        weights[f"{prefix}.lora_B.weight"] = torch.cat([up for _, up in parts], 1).contiguous()
    from peft import LoraConfig

    rank = sum(ranks.values())
    targets = sorted({names[id(layer)].rpartition(".")[2] for layer in layers})
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets), weights


def _pad_rows(x: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, count))


def _settings(source: str) -> dict[str, Any]:
    """Return the contents of an adapter's ``config.json``, which peft does not need, or {} if there is none."""
    path = Path(source) / "config.json"
    if not os.path.isdir(source):
        try:
            path = Path(hf_hub_download(source, "config.json"))
        except Exception:  # the adapter has no such file
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
