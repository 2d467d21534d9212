"""The language model as the trainer uses it: log-probabilities of response tokens, and the next token's logits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from lit_rlhf.algorithms.kl import full_kl
from lit_rlhf.errors import UserError
from lit_rlhf.models.attention import last_hidden_state
from lit_rlhf.models.head import chunk_rows, logprobs_and_entropy


class TokenStats(NamedTuple):
    """The output of a forward, 0 outside the response tokens; a tuple, so that FSDP finds the tensors in it."""

    logprobs: Tensor  # [B, S] float32, of each token given those before it
    entropy: Tensor  # [B, S] float32, of the distribution it was drawn from, in nats
    values: Tensor | None  # [B, S] float32, V after each token up to the last response token; None without a value head
    full_kl: Tensor | None  # [B, S] float32, of that distribution to another actor's, in nats; None without one


class Actor(nn.Module):
    """A decoder-only Hugging Face model, its temperature, and a value head if the critic shares its trunk.

    log π(aₜ | sₜ) = log softmax(logits / temperature)[aₜ], in float32. Logits exist only for the tokens asked for and
    only a chunk at a time: in the backward pass each chunk's are computed again.

    Args:
        model: A causal language model of transformers.
        temperature: Divides the logits wherever log-probabilities are taken.
        shared_critic: Whether the actor also predicts values, by a linear head (at first 0) on its last hidden state.
        value_grad_scale: Factor on the gradient that flows from the value head into the trunk; 0 stops it.

    Raises:
        UserError: if the model's logits are not a function of hidden state and head that is known here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        shared_critic: bool = False,
        value_grad_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_grad_scale = value_grad_scale
        self.value_head = new_value_head(model) if shared_critic else None
        _check_head(self)

    def forward(
        self,
        tokens: Tensor,
        response_tokens_mask: Tensor,
        other: "Actor | None" = None,
        positions: Tensor | None = None,
    ) -> TokenStats:
        """Compute log-probabilities and entropies at the response tokens.

        Args:
            tokens: [B, S] int64, right-padded (a causal model does not see the padding behind a text).
            response_tokens_mask: Bool [B, S], True at the tokens to score; never at a row's first token, which nothing
                predicts.
            other: Another actor, to compute the full KL(π ‖ π_other) as well; no gradient flows into it. The actor
                itself gives a KL of 0 whose second derivative is the Fisher matrix.
            positions: [B, S] int64, for rows that hold several texts: 0, 1, … within each; None if a row is one text.
        """
        real = response_tokens_mask.flip(1).cummax(1).values.flip(1)  # nothing after a row's last scored token matters
        real[:, 0] = True
        hidden = last_hidden_state(self.model.base_model, tokens, real, positions)
        predicted = response_tokens_mask[:, 1:]
        states, targets, kl = hidden[:, :-1][predicted], tokens[:, 1:][predicted], None
        if other is None:
            rows = chunk_rows(self.model.config.vocab_size, tokens.device)
            head = self.model.get_output_embeddings()
            weights = [x for x in (head.weight, getattr(head, "bias", None)) if x is not None]
            logprobs, entropy = logprobs_and_entropy(self._scaled_logits, weights, states, targets, rows)
        else:
            with torch.no_grad():
                others = hidden.detach() if other is self else other.hidden(tokens, real, positions)
            logprobs, entropy, kl = self._compare(states, targets, other, others[:, :-1][predicted])
        values = None
        if self.value_head is not None:
            values = self.value_head(_scale_gradient(hidden, self.value_grad_scale)).squeeze(-1).float()
        return TokenStats(
            logprobs=_spread(logprobs, response_tokens_mask),
            entropy=_spread(entropy, response_tokens_mask),
            values=values,
            full_kl=None if kl is None else _spread(kl, response_tokens_mask),
        )

    def hidden(self, tokens: Tensor, real: Tensor, positions: Tensor | None = None) -> Tensor:
        """The trunk's `last_hidden_state`; a text does not see the one before it in its row."""
        return last_hidden_state(self.model.base_model, tokens, real, positions)

    def next_logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits of the token after the last one, [B, V] float32, before the temperature.

        Args:
            tokens: [B, N], those that the cache does not hold yet.
            mask: [B, cached + N], left-padded.
            positions: [B, N].
            cache: Extended in place.
        """
        hidden = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self.logits(hidden[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """The head with the model's own scaling of its logits, in float32 (or in a double-precision model's own)."""
        config = self.model.config
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _scaled_logits(self, hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _compare(
        self, hidden: Tensor, targets: Tensor, other: "Actor", others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and the full KL to another actor: twice differentiable, and slower."""
        rows = chunk_rows(self.model.config.vocab_size, hidden.device)
        pieces = [
            checkpoint(self._chunk, *inputs, other, use_reentrant=False, preserve_rng_state=False)
            for inputs in zip(hidden.split(rows), targets.split(rows), others.split(rows), strict=True)
        ]
        logprobs, entropy, kl = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropy), torch.cat(kl)

    def _chunk(self, hidden: Tensor, targets: Tensor, others: Tensor, other: "Actor") -> tuple[Tensor, Tensor, Tensor]:
        logits = self._scaled_logits(hidden)
        logprobs = torch.log_softmax(logits, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        with torch.no_grad():
            other_logits = other._scaled_logits(others)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy, full_kl(logits, other_logits)


def new_value_head(model: PreTrainedModel, bias: bool = True) -> nn.Linear:
    """A linear map from hidden state to value that is 0 at first, so that the first advantages are the rewards."""
    head = nn.Linear(model.get_output_embeddings().in_features, 1, bias=bias, device=model.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.detach() + (x - x.detach()) * scale


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """Place the elements of ``x`` where the mask is True, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


@torch.no_grad()
def _check_head(actor: Actor) -> None:
    """Trunk and head, taken apart, must give the logits of the model as a whole."""
    model = actor.model
    if any(p.is_meta for p in model.parameters()):
        return
    was_training = model.training
    model.eval()
    with model.device:  # not the default one, which may be where the model goes later
        tokens = torch.arange(3)[None] % model.config.vocab_size
        whole = model(input_ids=tokens).logits.float()
        parts = actor.logits(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(model).__name__} changes its logits after its head in a way that lit-rlhf does not know"
        )
