"""The models of a run with adapters, built without weights: the base model, and the adapters of each role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_rlhf.compat import select_adapters
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapted import starts_from
from lit_rlhf.models.adapter_folders import base_of, find_adapter, same_model
from lit_rlhf.models.adapters import LoRA, adapted_layers, adapter_parameters, target_names
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.planning.dry_run import Outputs, add_without_weights
from lit_rlhf.planning.roles import Role, Stepping, without_weights

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

LANGUAGE, TRUNK = Outputs(logprobs=True, values=False), Outputs(logprobs=False, values=False)


class AdaptedModels:
    """A builder of the roles that share a base model.

    Args:
        source: The source of the trained model: a whole model, or an adapter.
        field: The name of the configuration field of the source, for error messages.
        lora: The options of the trained adapters.

    Raises:
        UserError: if the configuration of the base model, or the tokenizer of random weights, cannot be loaded; if an
            adapter does not name its base model; or if a target module is not a linear layer of the base model, or is
            its language-model head.
    """

    def __init__(self, source: ModelSource, field: str, lora: LoRA) -> None:
        self.source, self.field, self.lora = source, field, lora
        self.config = lora.config(self._base())
        self.starts = {name: str(source) for name in starts_from(source, lora)}

    def base(self, with_head: bool) -> Role:
        """Return the base model, with or without its language-model head, as a role that never runs."""
        return Role(name="base", model=self._base(), outputs=LANGUAGE if with_head else TRUNK, max_tokens=0)

    def role(
        self,
        name: str,
        adapters: Mapping[str, str],
        outputs: Outputs,
        max_tokens: int,
        stepping: Stepping | None = None,
        own: tuple[str, ...] = (),
    ) -> Role:
        """Return a role that computes with the base model and adapters.

        Args:
            name: The name of the role and, if it is trained, of its new adapter.
            adapters: The folder or the hub id of each saved adapter that the role's passes use, by adapter name.
            outputs: The outputs that the passes compute.
            max_tokens: The maximum number of tokens in a pass, including padding.
            stepping: The bytes that the optimizer needs for each parameter of the new adapter; None for a frozen role.
            own: The names of the saved adapters that no other role holds in memory.

        Raises:
            UserError: if the configuration of an adapter or of the base model cannot be read.
        """
        model, new = self._base(), () if stepping is None else (name,)
        for saved, source in adapters.items():
            add_without_weights(model, saved, _saved_config(model, source))
        for trained in new:
            add_without_weights(model, trained, self.config)
            for parameter in adapter_parameters(model, trained).values():
                parameter.requires_grad_(True)
        select_adapters(adapted_layers(model), [*adapters, *new])
        return Role(name=name, model=model, outputs=outputs, max_tokens=max_tokens, stepping=stepping, own=(*own, *new))

    def actor(self, outputs: Outputs, max_tokens: int, stepping: Stepping) -> Role:
        """Return the actor, which owns the adapter that it starts from; the arguments are those of `role`.

        Raises:
            UserError: if the configuration of this adapter or of the base model cannot be read.
        """
        return self.role("actor", self.starts, outputs, max_tokens, stepping, own=tuple(self.starts))

    def shares(self, source: ModelSource) -> bool:
        """Return whether a frozen model is the base model or an adapter of it, and not a separate whole model.

        Raises:
            UserError: if an adapter does not name its base model.
        """
        if not isinstance(self.source, str) or not isinstance(source, str):
            return source is self.source
        is_merged = find_adapter(self.source) is not None and not self.starts
        return not is_merged and same_model(base_of(source), base_of(self.source))

    def _base(self) -> PreTrainedModel:
        return without_weights(self.source, self.field, LANGUAGE).requires_grad_(False)


def saved_adapter(name: str, source: ModelSource) -> dict[str, str]:
    """Return ``{name: source}`` if the source is a saved adapter; an empty dictionary if it is a whole model."""
    return {name: str(source)} if find_adapter(source) else {}


def _saved_config(model: PreTrainedModel, source: str) -> LoraConfig:
    """Return peft's configuration of a saved adapter, with the target modules by name; no weights are read.

    Raises:
        UserError: if the configuration cannot be read.
    """
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(source)
    except Exception as error:  # peft raises exceptions of many types here
        raise UserError(f"plan: the adapter {source} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if config.target_modules == "all-linear":
        config.target_modules = target_names(model, "all-linear")
    return config
