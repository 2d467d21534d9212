"""The actor: a language model that gives log-probabilities of response tokens and logits of the next token."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from lit_rlhf.algorithms.kl import full_kl
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import AdapterView, adapter_parameters, whole_model
from lit_rlhf.models.head import chunk_rows, logprobs_and_entropy
from lit_rlhf.models.unpadded import HiddenStates, last_hidden_state, shares_beginnings
from lit_rlhf.models.weights import with_weights


class TokenStats(NamedTuple):
    """The output of `Actor.forward`; all tensors except ``values`` are 0 outside the response tokens.

    The class is a tuple because FSDP searches tuples for tensors.

    >>> stats = TokenStats(torch.tensor([[0.0, -0.5]]), torch.tensor([[0.0, 0.7]]), values=None, full_kl=None)
    >>> stats.logprobs
    tensor([[ 0.0000, -0.5000]])
    """

    logprobs: Tensor  # [B, S] float32, of each token given the tokens before it
    entropy: Tensor  # [B, S] float32, in nats, of the distribution of each token given the tokens before it
    values: Tensor | None  # [B, S] float32, V after each token up to the last response token; None without a value head
    full_kl: Tensor | None  # [B, S] float32, KL(π ‖ π_other) of each token in nats; None if there is no other actor


class Actor(nn.Module):
    """A decoder-only Hugging Face model with a temperature, and optionally with a value head for a shared critic.

    log π(aₜ | sₜ) = log softmax(logits / temperature)[aₜ], in float32. The forward pass computes logits for response
    tokens only, one chunk at a time, and the backward pass recomputes them.

    Args:
        model: A causal language model from transformers, or a view of one that another actor owns.
        temperature: The divisor of the logits in all log-probabilities and entropies.
        shared_critic: Whether the actor also predicts values, with a linear head (initially 0) on the model's last
            hidden state.
        value_grad_scale: The factor on the gradient that flows from the value head into the model; 0 stops this
            gradient.
        adapter: The name of the adapter that is the actor's own part of the model; None if the whole model is its own.

    Raises:
        UserError: if the model changes the logits after its head in a way that is not supported.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.models.loading import load_model
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     actor = Actor(load_model(str(make_tiny_model(Path(folder)))), temperature=0.7)
    >>> tokens, mask = torch.tensor([[2, 6, 7]]), torch.tensor([[False, False, True]])
    >>> logits = actor.logits(actor.hidden(tokens, torch.ones_like(mask)).states)[1] / 0.7
    >>> bool(torch.isclose(actor(tokens, mask).logprobs[0, 2], logits.log_softmax(-1)[7], atol=1e-5))
    True
    """

    def __init__(
        self,
        model: PreTrainedModel | AdapterView,
        temperature: float = 1.0,
        shared_critic: bool = False,
        value_grad_scale: float = 1.0,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.model = cast(PreTrainedModel, model)
        self.temperature = temperature
        self.value_grad_scale = value_grad_scale
        self.adapter = adapter
        self.value_head = new_value_head(model) if shared_critic else None
        if isinstance(model, PreTrainedModel):
            _check_head(model)

    @property
    def pads(self) -> bool:
        """Whether the model processes padding, and each beginning that several texts share for every one of them."""
        return not shares_beginnings(self.model.base_model)

    def forward(
        self,
        tokens: Tensor,
        response_tokens_mask: Tensor,
        other: "Actor | None" = None,
        positions: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> TokenStats:
        """Compute the log-probabilities and entropies of the response tokens.

        Args:
            tokens: Token ids, [B, S] int64, right-padded (a causal model does not attend to padding after a text).
            response_tokens_mask: Bool [B, S], True at the tokens to score; never at the first token of a text, which
                nothing predicts.
            other: The actor with the policy π_other, for the full KL(π ‖ π_other) without a gradient for ``other``;
                None for no KL. If ``other`` is this actor itself, the KL is 0, and its second derivative is the Fisher
                matrix.
            positions: The positions of the tokens, [B, S] int64, for packed rows: 0, 1, … within each text; None if
                each row is one text.
            shared: As in `last_hidden_state`.

        Returns:
            Log-probabilities and entropies, values if there is a value head, and the full KL if ``other`` is given.
        """
        context = response_tokens_mask.flip(1).cummax(1).values.flip(1)  # True up to the last scored token of a row
        context[:, 0] = True
        hidden = self.hidden(tokens, context, positions, shared)
        target_mask = response_tokens_mask[:, 1:]
        states, targets, kl = hidden.before(target_mask), tokens[:, 1:][target_mask], None
        if other is None:
            rows = chunk_rows(self.model.config.vocab_size, tokens.device)
            head = self.model.get_output_embeddings()
            weights = [x for x in (head.weight, getattr(head, "bias", None)) if x is not None]
            logprobs, entropy = logprobs_and_entropy(self._scaled_logits, weights, states, targets, rows)
        else:
            with torch.no_grad():
                other_hidden = hidden if other is self else other.hidden(tokens, context, positions, shared)
                other_states = other_hidden.before(target_mask)
            logprobs, entropy, kl = self._compare(states, targets, other, other_states)
        values = None
        if self.value_head is not None:
            values = self.value_head(_scale_gradient(hidden.states, self.value_grad_scale)).squeeze(-1).float()
            values = hidden.spread(values)
        return TokenStats(
            logprobs=_scatter(logprobs, response_tokens_mask),
            entropy=_scatter(entropy, response_tokens_mask),
            values=values,
            full_kl=None if kl is None else _scatter(kl, response_tokens_mask),
        )

    def hidden(
        self, tokens: Tensor, real: Tensor, positions: Tensor | None = None, shared: Tensor | None = None
    ) -> HiddenStates:
        """Return the trunk's last hidden states; the arguments are those of `last_hidden_state`."""
        return last_hidden_state(self.model.base_model, tokens, real, positions, shared)

    def run_trunk(self, **inputs: Any) -> Any:
        """Return the trunk's output, with the selected adapters, for the other roles; the arguments are the trunk's."""
        return self.model.base_model(**inputs)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the actor's own parameters by name: its adapter's and value head's, or all if it has no adapter."""
        if self.adapter is None:
            return dict(self.named_parameters())
        found = adapter_parameters(whole_model(self.model), self.adapter)
        head = {} if self.value_head is None else dict(self.value_head.named_parameters())
        return {f"model.{name}": p for name, p in found.items()} | {f"value_head.{name}": p for name, p in head.items()}

    def next_logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Compute the logits of the next token.

        Args:
            tokens: The ids of the tokens that are not in the cache yet, [B, N] int64.
            mask: Bool [B, cached + N], False at padding, which is on the left. For a static cache, the shape is
                [B, columns], and the mask is also False at the columns that are still empty.
            positions: The positions of ``tokens`` in their sequences, [B, N] int64.
            cache: The keys and values of the earlier tokens; extended in place.

        Returns:
            The logits, [B, V] float32, not divided by the temperature.
        """
        hidden = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self.logits(hidden[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H], with the model's own scaling, in float32 or float64."""
        return _logits(self.model, hidden)

    def _scaled_logits(self, hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _compare(
        self, hidden: Tensor, targets: Tensor, other: "Actor", other_hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, entropies and the full KL to another actor, each [N] and twice differentiable."""
        rows = chunk_rows(self.model.config.vocab_size, hidden.device, 4)  # 37 bytes for each logit under bf16-mixed
        chunks = [
            checkpoint(self._compare_chunk, *inputs, other, use_reentrant=False, preserve_rng_state=False)
            for inputs in zip(hidden.split(rows), targets.split(rows), other_hidden.split(rows), strict=True)
        ]
        logprobs, entropy, kl = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropy), torch.cat(kl)

    def _compare_chunk(
        self, hidden: Tensor, targets: Tensor, other_hidden: Tensor, other: "Actor"
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._scaled_logits(hidden)
        logprobs = torch.log_softmax(logits, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        with torch.no_grad():
            other_logits = other._scaled_logits(other_hidden)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy, full_kl(logits, other_logits)


def new_value_head(model: PreTrainedModel | AdapterView, bias: bool = True) -> nn.Linear:
    """Create a linear map from a hidden state to a value, initialised to 0, so that advantages equal returns at first.

    Args:
        model: The causal language model whose hidden size is the input size of the head.
        bias: Whether the head has a bias.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> head = new_value_head(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)))
    >>> head, bool((head.weight == 0).all())
    (Linear(in_features=8, out_features=1, bias=True), True)
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # no file holds a new head's weights
    head = nn.Linear(model.get_output_embeddings().in_features, 1, bias=bias, device=device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _logits(model: PreTrainedModel | AdapterView, hidden: Tensor) -> Tensor:
    config, logits = model.config, model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.detach() + (x - x.detach()) * scale


def _scatter(x: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor of the mask's shape with the elements of ``x`` where the mask is True, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


@torch.no_grad()
def _check_head(checked: PreTrainedModel) -> None:
    """Check that the trunk and the head, applied one after the other, give the logits of the whole model.

    Raises:
        UserError: if the logits differ.
    """
    model = with_weights(checked)
    was_training = model.training
    model.eval()
    with model.device:  # not the default device, to which the model may be moved later
        tokens = torch.arange(3)[None] % model.config.vocab_size
        whole = model(input_ids=tokens).logits.float()
        parts = _logits(model, model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(model).__name__} changes its logits after its head in a way that lit-rlhf does not support"
        )
