"""Models with a scalar head: the critic (a value after each token) and the reward model (a score for each text)."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import new_value_head
from lit_rlhf.models.adapter_folders import SavedAdapter, find_adapter, read_adapter
from lit_rlhf.models.adapters import AdaptedTrunk, adapter_parameters
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_model, read_config
from lit_rlhf.models.quantization import check_whole
from lit_rlhf.models.unpadded import last_hidden_state, shares_beginnings


class ScalarModel(nn.Module):
    """A decoder's trunk with a linear head that gives one number after each token.

    Args:
        trunk: The decoder without its language-model head, or a view of one that another model owns.
        head: The linear map from a hidden state to one number.
        adapter: The name of the adapter that is this model's own part of the trunk; None if the whole trunk is its own.
        scale: The mean and the standard deviation of a reward model's scores on its training set, if known.

    >>> from transformers import GPT2Config, GPT2Model
    >>> trunk = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    >>> model = ScalarModel(trunk, nn.Linear(8, 1))
    >>> model(torch.tensor([[1, 2, 3], [4, 5, 0]]), lengths=torch.tensor([3, 2])).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        adapter: str | None = None,
        scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.trunk = trunk
        self.head = head
        self.adapter = adapter

    @property
    def pads(self) -> bool:
        """Whether the trunk processes padding, and each beginning that several texts share for every one of them."""
        return not shares_beginnings(self.trunk)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """Compute the value or score after each token.

        Args:
            tokens: Token ids, [B, S] int64, right-padded.
            lengths: The number of tokens in each row, not counting padding, [B] int64; None if there is no padding.
            shared: As in `last_hidden_state`.

        Returns:
            The values or scores, [B, S] float32; undefined at padding.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if lengths is not None:
            mask &= torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        hidden = last_hidden_state(self.trunk, tokens, mask, shared=shared)
        return hidden.spread(self.head(hidden.states).squeeze(-1).float())

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's own parameters by name: its adapter's and head's, or all if it has no adapter."""
        if self.adapter is None:
            return dict(self.named_parameters())
        trunk: Any = self.trunk.owner.model if isinstance(self.trunk, AdaptedTrunk) else self.trunk
        found = adapter_parameters(trunk, self.adapter)
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return {f"trunk.{name}": parameter for name, parameter in found.items()} | head


def from_classifier(model: PreTrainedModel, field: str) -> ScalarModel:
    """Build a scalar model from a sequence classifier with one label, and from any bias in its configuration.

    Args:
        model: A sequence classifier from transformers; an exported critic has its bias in ``config.value_bias``.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the classifier's head is not a single linear layer named ``score``.

    >>> from transformers import GPT2Config, GPT2ForSequenceClassification
    >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, num_labels=1)
    >>> from_classifier(GPT2ForSequenceClassification(config), "critic").head
    Linear(in_features=8, out_features=1, bias=False)
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{field}: {type(model).__name__} has no linear head named score; use a decoder's classifier")
    bias = getattr(model.config, "value_bias", None)
    if bias is not None:
        head.bias = nn.Parameter(torch.tensor([bias], device=head.weight.device))
    return ScalarModel(model.base_model, head, scale=scale_of(vars(model.config)))


def scale_of(settings: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the mean and standard deviation of the scores, read from a reward model's configuration; None if missing.

    >>> scale_of({"score_mean": 0.5, "score_std": 2.0})
    (0.5, 2.0)
    """
    mean, deviation = settings.get("score_mean"), settings.get("score_std")
    return None if mean is None or deviation is None else (mean, deviation)


def load_reward_model(source: ModelSource, field: str = "reward") -> ScalarModel:
    """Load a reward model: a sequence classifier with one label, or an adapter with a head, merged into its base.

    Args:
        source: A folder, a hub id, or a configuration for random weights.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the model cannot be loaded, does not have exactly one label, has a head that is not a single
            linear layer named ``score``, or is an adapter without a head.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     model = load_reward_model(str(make_tiny_model(Path(folder), task="score")))
    >>> model(torch.tensor([[2, 6, 7]])).shape  # a score after each token
    torch.Size([1, 3])
    """
    if find_adapter(source):
        return _from_adapter(str(source), field)
    return from_classifier(load_model(source, "score", field), field)


def _from_adapter(source: str, field: str) -> ScalarModel:
    """Load a reward model that is saved as an adapter with a head, and merge the adapter into its base."""
    saved = read_adapter(source, field)
    model = load_model(source, "causal", field)
    return ScalarModel(model.base_model, saved_head(saved, field), scale=scale_of(saved.settings))


def saved_head(saved: SavedAdapter, field: str) -> nn.Linear:
    """Return the head of a reward model or a critic that is saved as an adapter.

    Args:
        saved: The adapter.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the adapter has no head, or one with several outputs.
    """
    if saved.head is None or len(saved.head) != 1:
        what = "has no head" if saved.head is None else f"has {len(saved.head)} labels, not one"
        raise UserError(f"{field}: the adapter {saved.source} {what}: it is not a reward model")
    bias = saved.settings.get("value_bias")
    head = nn.Linear(saved.head.shape[1], 1, bias=bias is not None, device="cpu")
    head.weight = nn.Parameter(saved.head.to(torch.float32, copy=True))  # shares no memory with another model's head
    if bias is not None:
        head.bias = nn.Parameter(torch.tensor([bias], device="cpu"))
    return head


def load_critic(source: ModelSource, field: str = "critic", bias: bool = True) -> ScalarModel:
    """Load a critic or an initial reward model, from a sequence classifier or from a language model.

    Args:
        source: A folder, a hub id, or a configuration for random weights. A classifier or an adapter with a head keeps
            its head; a language model gets a new head, which is initialised to 0.
        field: The name of the configuration field, for error messages.
        bias: Whether a new head has a bias: True for a critic, False for a reward model, whose loss cannot train one.

    Raises:
        UserError: if the model cannot be loaded or is quantized, or if a classifier does not have exactly one label or
            has a head that is not a single linear layer named ``score``.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     critic = load_critic(str(make_tiny_model(Path(folder))))
    >>> critic(torch.tensor([[2, 6, 7]])).tolist()
    [[0.0, 0.0, 0.0]]
    """
    if find_adapter(source) and read_adapter(str(source), field).head is not None:
        return check_whole(load_reward_model(source, field), field)
    architectures = [] if isinstance(source, RandomWeights) else read_config(source, field).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return check_whole(load_reward_model(source, field), field)
    model = check_whole(load_model(source, "causal", field), field)
    return ScalarModel(model.base_model, new_value_head(model, bias))


def to_classifier(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Convert a scalar model to a transformers sequence classifier whose one label is the score at the last token.

    If the padding token is the end-of-sequence token, the classifier accepts only one unpadded row at a time. The
    classifier has no bias: the bias of a critic is stored in ``config.value_bias``, to be added to the output.

    Args:
        scalar: The critic or reward model.
        tokenizer: The model's tokenizer.
        weights: The full ``state_dict`` of a sharded model; None to use the model's own weights.

    Raises:
        UserError: if transformers has no sequence classifier of this architecture.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.testing import make_tiny_model
    >>> from lit_rlhf.models.loading import load_tokenizer
    >>> with TemporaryDirectory() as folder:
    ...     path = str(make_tiny_model(Path(folder), task="score"))
    ...     scalar, tokenizer = load_reward_model(path), load_tokenizer(path)
    >>> classifier, tokens = to_classifier(scalar, tokenizer), torch.tensor([[2, 6, 7]])
    >>> bool(torch.isclose(classifier(tokens).logits[0, 0], scalar(tokens)[0, -1], atol=1e-5))
    True
    """
    weights = scalar.state_dict() if weights is None else weights
    config = classifier_config(scalar.trunk.config, tokenizer, weights.get("head.bias"))
    try:
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"transformers has no sequence classifier for {config.model_type}") from error
    model.base_model.load_state_dict(strip_prefix("trunk.", weights))
    model.score.load_state_dict({"weight": weights["head.weight"]})
    return model.eval()


def classifier_config(trunk: Any, tokenizer: PreTrainedTokenizerBase, bias: Tensor | None) -> Any:
    """Return the configuration of a sequence classifier with one label.

    Args:
        trunk: The configuration of the trunk.
        tokenizer: The model's tokenizer.
        bias: The bias of the head, [1], which is stored in ``value_bias``; None if the head has none.
    """
    config = deepcopy(trunk)
    config.num_labels = 1
    # transformers scores the last token that is not padding, so the end-of-sequence token must not count as padding
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    for name in ("score_mean", "score_std"):  # they describe the model that training started from
        if hasattr(config, name):
            delattr(config, name)
    if bias is not None:
        config.value_bias = float(bias.detach())
    return config


def strip_prefix(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with a prefix, by their names without the prefix.

    >>> strip_prefix("head.", {"head.weight": torch.ones(1), "trunk.weight": torch.zeros(1)})
    {'weight': tensor([1.])}
    """
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def freeze(module: nn.Module) -> nn.Module:
    """Freeze all parameters of a module in place, set the module to eval mode, and return it.

    >>> freeze(nn.Linear(2, 1)).weight.requires_grad
    False
    """
    return module.requires_grad_(False).eval()
