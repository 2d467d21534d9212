"""Folders of trained adapters, as peft reads them, and whole models with the adapters merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.files import replacing
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapter_folders import SavedAdapter, base_of, merge_all, write_adapter
from lit_rlhf.models.adapters import SOURCE, LoRA, adapter_parameters
from lit_rlhf.models.scoring import ScalarModel, classifier_config, to_classifier
from lit_rlhf.models.weights import unread_weights


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """An adapter that a run has trained, with the base and the adapter below it.

    Args:
        source: The source of the trained model: a whole model, or an adapter on top of which this one was trained.
        lora: The options of the adapter.
        name: The name of the adapter in the run: ``actor``, ``critic`` or ``reward``.
        weights: The adapter's weights, by their names in the causal language model or in its trunk.
        below: The adapter on top of which this one was trained if that adapter is not the source, as for a critic that
            starts from a reward model; otherwise None.
        head: The head of a critic or a reward model; None for an actor.
        scale: The mean and the standard deviation of a reward model's scores, if they were measured.
    """

    source: str
    lora: LoRA
    name: str
    weights: Mapping[str, Tensor]
    below: SavedAdapter | None = None
    head: nn.Linear | None = None
    scale: tuple[float, float] | None = None

    def save(self, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
        """Write an adapter that peft can load: the sum of the trained adapter and the one below it, if there is one.

        Args:
            tokenizer: The model's tokenizer.
            folder: The folder to write; it gets its name when it is complete, and replaces any older folder.
            card: The model card, in Markdown.

        Raises:
            UserError: if the base or an adapter cannot be loaded, or the adapter does not fit the base.
        """
        with unread_weights():  # only the adapters' weights are needed
            model, names = self._load()
        head = None if self.head is None else self.head.weight
        with replacing(folder) as new:
            write_adapter(model, names, base_of(self.source), new, head)
            if self.head is not None:
                self._set_scale(classifier_config(model.config, tokenizer, self.head.bias)).save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / "README.md").write_text(card, encoding="utf-8")

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Return a whole model: the base, with this adapter and any adapter below it added to the base's weights.

        The weights are those of the base's files, even if the run has quantized them.

        Args:
            tokenizer: The model's tokenizer.

        Raises:
            UserError: if the base or an adapter cannot be loaded, the adapter does not fit the base, the base's files
                hold quantized weights, or the model has a head and transformers has no sequence classifier of its
                architecture.
        """
        model = merge_all(*self._load())
        if self.head is None:
            return model
        classifier = to_classifier(ScalarModel(model.base_model, self.head), tokenizer)
        self._set_scale(classifier.config)
        return classifier

    def scaled(self, share: float) -> TrainedAdapter:
        """Return the adapter with its output, scaling · B A x, multiplied by ``share``; DoRA is not supported."""
        weights = {name: weight * share if ".lora_B." in name else weight for name, weight in self.weights.items()}
        return replace(self, weights=weights)

    def _load(self) -> tuple[PreTrainedModel, list[str]]:
        """Load the base with the trained adapter and the one below it; return the model and these adapters' names.

        Raises:
            UserError: if the base or an adapter cannot be loaded, or the trained adapter does not fit the base.
        """
        source = self.source if self.below is None else base_of(self.source)
        saved = {} if self.below is None else {"below": self.below}
        lora = replace(self.lora, chained="stacked", quantization=None)
        model = load_adapted(source, lora, "model", trained=[self.name], saved=saved)
        prefix = f"{model.base_model_prefix}."
        parameters = {name.removeprefix(prefix): p for name, p in adapter_parameters(model, self.name).items()}
        weights = {name.removeprefix(prefix): weight for name, weight in self.weights.items()}
        if parameters.keys() != weights.keys():
            raise UserError(f"the checkpoint's adapter {self.name} does not fit the base {base_of(self.source)}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        names = [name for name in (SOURCE, "below", self.name) if adapter_parameters(model, name)]
        return model, names

    def _set_scale(self, config: Any) -> Any:
        if self.scale is not None:
            config.score_mean, config.score_std = self.scale
        return config


def weights_of(state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Return the weights of one adapter, by name.

    Args:
        state: A state dictionary of a model with adapters.
        adapter: The name of the adapter.

    >>> state = {"q.lora_A.actor.weight": torch.ones(1), "q.lora_A.critic.weight": torch.zeros(1)}
    >>> weights_of(state, "critic")
    {'q.lora_A.critic.weight': tensor([0.])}
    """
    return {name: weight for name, weight in state.items() if ".lora_" in name and adapter in name.split(".")}
