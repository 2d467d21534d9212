"""Frozen models, which a checkpoint does not contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

EXTRA = "._extra_state"
"""The end of the key of the state of a part without weights."""


def _weight_of(key: str) -> str:
    """Return the name of the quantized weight that a state-dict key, such as the key of its scales, belongs to."""
    return key.rpartition(".weight.")[0] + ".weight"


def keep_out_of_checkpoints(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Keep frozen models out of ``state_dict()``, and make ``load_state_dict`` accept that they are missing.

    It also accepts a missing or an unknown state of a part without weights, such as the adapted coefficient of the KL,
    so that a resumed run can have a part of another class.

    If the module trains an adapter, all frozen parameters are left out, and so are the scales of quantized parameters.
    The hooks that do this are on the module itself, so that they run for every kind of checkpoint: a file, or a folder
    with one shard per process.

    Args:
        module: The LightningModule.
        prefixes: The names of the frozen submodules, each with a dot at its end.
    """

    def frozen() -> set[str]:
        if getattr(module, "adapter", None) is None:
            return set()
        return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
        names = {prefix + name for name in frozen()}
        starts = tuple(prefix + p for p in prefixes)
        for key in [k for k in state if k in names or k.startswith(starts) or _weight_of(k) in names]:
            del state[key]

    def ignore_missing(owner: nn.Module, incompatible: Any) -> None:
        names, unknown = frozen(), incompatible.unexpected_keys
        incompatible.missing_keys[:] = [
            k for k in incompatible.missing_keys if not (k in names or k.startswith(prefixes) or k.endswith(EXTRA))
        ]
        unknown[:] = [key for key in unknown if not key.endswith(EXTRA)]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(ignore_missing)
