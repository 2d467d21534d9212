"""Models with a scalar head: the critic (a value after every token) and the reward model (a score after the last)."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import new_value_head
from lit_rlhf.models.attention import last_hidden_state
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_model, read_config


class ScalarModel(nn.Module):
    """A decoder's trunk and a linear head that gives one number at each token.

    Args:
        trunk: The decoder without its language-model head.
        head: Linear map from hidden state to one number.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One float32 number after each token.

        Args:
            tokens: [B, S] int64, right-padded.
            lengths: [B] int64, tokens that are no padding; None: all.

        Returns:
            [B, S]; what stands at padding is without meaning.
        """
        real = torch.ones_like(tokens, dtype=torch.bool)
        if lengths is not None:
            real &= torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        hidden = last_hidden_state(self.trunk, tokens, real)
        return self.head(hidden).squeeze(-1).float().clone()  # no view: FSDP puts a hook on it


def from_classifier(model: PreTrainedModel, field: str) -> ScalarModel:
    """The trunk and scalar head of a sequence classifier with one label; a critic's bias is in its configuration.

    Raises:
        UserError: if the classifier's head is not one linear layer, as in every decoder of transformers.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{field}: {type(model).__name__} has no linear head named score; is it a decoder?")
    bias = getattr(model.config, "value_bias", None)
    if bias is not None:
        head.bias = nn.Parameter(torch.tensor([bias], device=head.weight.device))
    return ScalarModel(model.base_model, head)


def load_reward_model(source: ModelSource, field: str = "reward") -> ScalarModel:
    """A reward model: a sequence classifier with one label.

    Raises:
        UserError: if there is none, or it has more labels than one.
    """
    return from_classifier(load_model(source, "score", field), field)


def load_critic(source: ModelSource, field: str = "critic", bias: bool = True) -> ScalarModel:
    """A critic, or the start of a reward model: from a sequence classifier, or from a language model with a new head.

    Args:
        source: A classifier's head is kept; a language model's new one is 0.
        field: The configuration field, for messages.
        bias: Whether a new head has one: a critic's should, a reward model's cannot learn it.

    Raises:
        UserError: if there is no such model.
    """
    architectures = [] if isinstance(source, RandomWeights) else read_config(source, field).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return load_reward_model(source, field)
    model = load_model(source, "causal", field)
    return ScalarModel(model.base_model, new_value_head(model, bias))


def to_classifier(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The same as a sequence classifier of transformers with one label, which scores the last token.

    Where padding and end of text are one token, the classifier takes one unpadded row at a time. It has no bias: a
    critic's is stored in ``config.value_bias``, to be added to what the classifier says.

    Args:
        scalar: The model.
        tokenizer: Its tokenizer.
        weights: Its whole ``state_dict``; None: what it holds.

    Raises:
        UserError: if transformers has no sequence classifier of this architecture.
    """
    config: Any = deepcopy(scalar.trunk.config)
    config.num_labels = 1
    # transformers scores the last token that is no padding, which must not be the end of the text
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    for name in ("score_mean", "score_std"):  # of the model that it was trained from
        if hasattr(config, name):
            delattr(config, name)
    weights = scalar.state_dict() if weights is None else weights
    if "head.bias" in weights:
        config.value_bias = float(weights["head.bias"])
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"transformers has no sequence classifier for {config.model_type}") from error
    model.base_model.load_state_dict(under("trunk.", weights))
    model.score.load_state_dict({"weight": weights["head.weight"]})
    return model.eval()


def under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def freeze(module: nn.Module) -> nn.Module:
    """The module without gradients, in eval mode."""
    return module.requires_grad_(False).eval()
