"""What every generation engine is given and gives back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_tokens: Tokens of a response at most; one that reaches it without a stop token is *truncated*.
        min_tokens: No stop token before so many tokens.
        temperature: Divides the logits; 0 takes the most likely token each time (not for training).
        top_k: Only the k most likely tokens; 0: all.
        top_p: Only the most likely tokens that together have this probability; 1: all.
        stop: Tokens that end a response besides the model's end-of-sequence token(s).
        responses: Responses a prompt.

    Raises:
        ValueError: if a number is out of range.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    responses: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"sampling.min_tokens must be between 0 and max_tokens={self.max_tokens}, not {self.min_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1], not {self.top_p}")
        if self.responses < 1:
            raise ValueError(f"sampling.responses must be 1 or more, not {self.responses}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The token ids that generation must know."""

    stop: tuple[int, ...]
    pad: int


class Engine(ABC):
    """Generates responses with the actor as it is now."""

    is_exact: ClassVar[bool] = False
    """Whether its log-probabilities and entropies differ from those of the actor's own forward by rounding alone. In
    float32 the update then starts from them; else from another forward."""

    @abstractmethod
    def generate(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        stream: Stream,
        iteration: int,
    ) -> Rollout:
        """Draw ``sampling.responses`` responses for each prompt, prompt-major.

        The random numbers of a row are a function of (seed, stream, iteration, its place in the global batch).
        ``rollout_logprobs`` and ``rollout_entropy`` are those of the whole distribution at the sampling temperature (at
        1 if it is 0), before top-k, top-p and the minimum length cut it: the same that the actor's own forward gives.
        """


def find_special_tokens(actor: Actor, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> SpecialTokens:
    """Stop tokens of the tokenizer, the model's generation config and the user, and the padding token.

    Raises:
        UserError: if a stop string is not exactly one token.
    """
    ids = [tokenizer.eos_token_id]
    config = getattr(actor.model, "generation_config", None)
    from_config = getattr(config, "eos_token_id", None)
    ids += from_config if isinstance(from_config, list) else [from_config] if from_config is not None else []
    for text in stop:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        if len(pieces) != 1:
            raise UserError(f"sampling.stop: {text!r} is {len(pieces)} tokens of this tokenizer, not one")
        if pieces[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
            raise UserError(f"sampling.stop: {text!r} is no token of this tokenizer")
        ids.append(pieces[0])
    return SpecialTokens(stop=tuple(dict.fromkeys(ids)), pad=tokenizer.pad_token_id)


def join_responses(
    prompts: PromptBatch,
    sampling: Sampling,
    pad: int,
    *,
    tokens: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    lengths: Tensor,
    terminated: Tensor,
) -> Rollout:
    """A rollout from left-padded prompts and right-padded responses: contiguous, padding on the right.

    Args:
        prompts: B prompts.
        sampling: n responses a prompt.
        pad: The padding token's id.
        tokens: [B n, T], the responses.
        logprobs: [B n, T], of their tokens.
        entropy: [B n, T], of the distributions they were drawn from.
        lengths: [B n], tokens of each response.
        terminated: Bool [B n].
    """
    prompt_tokens = prompts.tokens.repeat_interleave(sampling.responses, 0)
    prompt_mask = prompts.mask.repeat_interleave(sampling.responses, 0)
    time = torch.arange(tokens.shape[1], device=tokens.device)
    response_mask = time < lengths[:, None]
    both = torch.cat([prompt_tokens, tokens], 1)
    real = torch.cat([prompt_mask, response_mask], 1)
    order = torch.argsort((~real).byte(), dim=1, stable=True)  # real tokens first, in their order
    width = int(real.sum(1).max())
    joined = torch.where(real, both, pad).gather(1, order)[:, :width]
    return Rollout(
        tokens=joined,
        prompt_lengths=prompt_mask.sum(1),
        response_lengths=lengths,
        rollout_logprobs=torch.where(response_mask, logprobs, 0.0),
        rollout_entropy=torch.where(response_mask, entropy, 0.0),
        response_mask=response_mask,
        terminated=terminated,
        group=prompts.group.repeat_interleave(sampling.responses, 0),
    )
