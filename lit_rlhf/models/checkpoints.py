"""Frozen models stay out of checkpoints."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def keep_out_of_checkpoints(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Leave all state under these names out of ``state_dict()``, and do not miss it in ``load_state_dict``.

    Hooks on the module itself, because every path to a checkpoint (one file, a distributed folder) goes through them.

    Args:
        module: The LightningModule.
        prefixes: Names of submodules, each with a dot at its end.
    """

    def drop(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
        for key in [k for k in state if k.startswith(tuple(prefix + p for p in prefixes))]:
            del state[key]

    def forgive(owner: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(prefixes)]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(forgive)
