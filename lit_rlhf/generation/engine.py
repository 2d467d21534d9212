"""The interface of generation engines, and the options for sampling responses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch, Rollout, check_shapes


@dataclass(frozen=True)
class Sampling:
    """The options for sampling responses.

    Args:
        max_tokens: The maximum number of tokens in a response; a response that reaches this number without a stop
            token is *truncated*.
        min_tokens: The minimum number of tokens before a stop token may be sampled.
        temperature: The divisor of the logits; 0 selects the most likely token at each step (not for training).
        top_k: The number of most likely tokens to sample from; 0 for all tokens.
        top_p: The minimum total probability, in (0, 1], of the tokens to sample from, which are as few of the most
            likely tokens as possible; 1 for all tokens.
        stop: The text of each token that ends a response, in addition to the end-of-sequence tokens of the tokenizer
            and the model.
        responses: The number of responses for each prompt.

    Raises:
        ValueError: if an option is out of range.

    >>> Sampling(max_tokens=64, temperature=0.7, responses=8).top_p
    1.0
    >>> Sampling(top_p=0)
    Traceback (most recent call last):
    ...
    ValueError: sampling.top_p must be in (0, 1], not 0
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
    """The token ids that an engine needs: the stop tokens and the padding token.

    >>> SpecialTokens(stop=(1, 9), pad=0).stop
    (1, 9)
    """

    stop: tuple[int, ...]
    pad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """The properties of a run and of one of its processes that an engine may need."""

    load_actor: Callable[[], Actor]  # can be pickled; loads a copy of the run's actor, with the initial weights
    tokenizer: PreTrainedTokenizerBase
    device: torch.device  # of this process
    device_ids: tuple[int, ...]  # the GPUs of the training processes on this machine; on CPUs, one number per process
    process: int  # the index of this process among those on this machine
    precision: str  # the Trainer's: ``32-true`` or ``bf16-mixed``
    adapter: LoRA | None = None  # the options of the actor's adapter; None without one
    source: str = ""  # the folder or hub id of the actor (the base, or another adapter); used only with an adapter
    rounds_all_weights: bool = False  # whether the strategy rounds all weights to bfloat16, under ``bf16-mixed``


class Engine(ABC):
    """The interface of an engine, which generates responses with the actor's current weights.

    A subclass implements `generate`, which usually returns the result of `join_responses`.

    >>> class StopAtOnce(Engine):
    ...     def generate(self, actor, prompts, sampling, special_tokens, *, stream, iteration):
    ...         rows = len(prompts.tokens) * sampling.responses
    ...         return join_responses(
    ...             prompts, sampling, special_tokens.pad,
    ...             tokens=torch.full((rows, 1), special_tokens.stop[0]),
    ...             logprobs=torch.zeros(rows, 1),
    ...             entropy=torch.zeros(rows, 1),
    ...             lengths=torch.ones(rows, dtype=torch.long),
    ...             terminated=torch.ones(rows, dtype=torch.bool),
    ...         )
    >>> StopAtOnce().is_exact
    False
    """

    @property
    def is_exact(self) -> bool:
        """Whether the engine's log-probabilities and entropies equal the actor's own, up to rounding.

        If they do, training in full float32 uses the engine's numbers as they are, unless it also needs the full KL or
        the values of a value head on the actor. In all other cases, the actor recomputes the log-probabilities and the
        entropies. The default is False.
        """
        return False

    def start(self, context: EngineContext) -> None:  # noqa: B027
        """Prepare the engine for a run; the default does nothing.

        All processes call this method before the first responses are generated.

        Args:
            context: The properties of the run that the engine may need.
        """

    def close(self) -> None:  # noqa: B027
        """Release the resources that `start` and the run acquired, such as processes; the default does nothing.

        The method may be called more than once, and without `start`. A closed engine can be started again.
        """

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
        """Generate ``sampling.responses`` responses for each prompt, in prompt-major order.

        The random numbers of a row are a function of the seed, ``stream``, ``iteration`` and the row's index in the
        global batch. If the engine is exact (see `is_exact`), the rollout's fields ``rollout_logprobs`` and
        ``rollout_entropy``, in nats, refer to the full distribution at the sampling temperature (at temperature 1 if
        the sampling temperature is 0), before top-k, top-p and the minimum length are applied; the actor's forward pass
        computes the same quantities. The docstrings of other engines say how they deviate; entropies that are not known
        are 0.

        Args:
            actor: The policy.
            prompts: The B prompts.
            sampling: The options for sampling, among them the number n of responses for each prompt.
            special_tokens: The stop tokens and the padding token.
            stream: The purpose of the random numbers.
            iteration: The training iteration or, in validation, test and prediction, the index of the batch.

        Returns:
            The rollout of B n responses.
        """


class PendingRollout(ABC):
    """A rollout that was requested and is generated later, usually outside the training process."""

    @abstractmethod
    def run(self) -> None:
        """Generate the responses.

        Every process calls this method once, in any thread, and the method does not communicate with other training
        processes. It raises no errors; `result` raises them instead.
        """

    @abstractmethod
    def result(self) -> Rollout:
        """Return this process's rollout; all processes call this method together, after `run` has returned.

        Raises:
            UserError: on all processes, if the responses could not be generated on one of them.
        """


class DetachedEngine(Engine):
    """The interface of an engine whose work is done outside the training process, so that training can continue.

    A subclass implements `begin`; the actor's weights may change as soon as `begin` has returned.
    """

    @abstractmethod
    def begin(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        stream: Stream,
        iteration: int,
    ) -> PendingRollout:
        """Pass the actor's current weights on, and return a pending rollout that is generated with these weights.

        All processes call this method together; the arguments are those of `Engine.generate`.
        """

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
        """Generate responses, wait for them, and return the rollout; the arguments are those of `Engine.generate`.

        Raises:
            UserError: on all processes, if the responses could not be generated on one of them.
        """
        pending = self.begin(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)
        pending.run()
        return pending.result()


def find_special_tokens(actor: Actor, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> SpecialTokens:
    """Return the padding token, and the stop tokens of the tokenizer, the model's generation config and the user.

    Args:
        actor: The policy, whose generation config may name end-of-sequence tokens.
        tokenizer: The actor's tokenizer.
        stop: The text of each of the user's stop tokens.

    Returns:
        The token ids.

    Raises:
        UserError: if the text of a stop token is not exactly one token of the tokenizer.

    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.models.loading import load_model, load_tokenizer
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_tiny_model(folder)
    ...     actor, tokenizer = Actor(load_model(folder)), load_tokenizer(folder)
    >>> find_special_tokens(actor, tokenizer, stop=["w3"])  # besides <eos>, whose id is 1
    SpecialTokens(stop=(1, 9), pad=0)
    """
    ids = [tokenizer.eos_token_id]
    config = getattr(actor.model, "generation_config", None)
    config_ids = getattr(config, "eos_token_id", None)
    ids += config_ids if isinstance(config_ids, list) else [config_ids] if config_ids is not None else []
    for text in stop:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise UserError(f"sampling.stop: {text!r} is {len(encoded)} tokens of this tokenizer, not one")
        if encoded[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
            raise UserError(f"sampling.stop: {text!r} is not a token of this tokenizer")
        ids.append(encoded[0])
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
    """Join left-padded prompts and right-padded responses into sequences without gaps, padded on the right.

    Args:
        prompts: The B prompts.
        sampling: The options for sampling, of which only the number n of responses for each prompt is used.
        pad: The id of the padding token.
        tokens: [B n, T] int64, the responses in prompt-major order; entries after a response's length are ignored.
        logprobs: [B n, T] float32, the log-probabilities of the tokens, in nats.
        entropy: [B n, T] float32, the entropies of the next-token distributions before the tokens, in nats.
        lengths: [B n] int64, the number of tokens in each response, including the stop token.
        terminated: Bool [B n], True if a stop token ended the response.

    Returns:
        The rollout of B n responses.

    Raises:
        ValueError: if the shapes of the tensors do not match.

    >>> prompts = PromptBatch(
    ...     tokens=torch.tensor([[0, 5], [6, 7]]),
    ...     mask=torch.tensor([[False, True], [True, True]]),
    ...     group=torch.tensor([0, 1]),
    ...     prompts=["w5", "w6 w7"],
    ...     columns={},
    ... )
    >>> lengths, terminated = torch.tensor([2, 1]), torch.tensor([False, True])
    >>> responses = {"tokens": torch.tensor([[8, 9], [1, 0]]), "lengths": lengths, "terminated": terminated}
    >>> zeros = torch.zeros(2, 2)
    >>> join_responses(prompts, Sampling(), pad=0, logprobs=zeros, entropy=zeros, **responses).tokens
    tensor([[5, 8, 9],
            [6, 7, 1]])
    """
    group = prompts.group.repeat_interleave(sampling.responses, 0)
    check_shapes(tokens=tokens, logprobs=logprobs, entropy=entropy)
    check_shapes(prompts=group, responses=tokens[:, 0], lengths=lengths, terminated=terminated)
    prompt_tokens = prompts.tokens.repeat_interleave(sampling.responses, 0)
    prompt_mask = prompts.mask.repeat_interleave(sampling.responses, 0)
    time = torch.arange(tokens.shape[1], device=tokens.device)
    response_mask = time < lengths[:, None]
    padded = torch.cat([prompt_tokens, tokens], 1)
    mask = torch.cat([prompt_mask, response_mask], 1)
    order = torch.argsort((~mask).byte(), dim=1, stable=True)  # moves the padding behind the tokens
    width = int(mask.sum(1).max())
    joined = torch.where(mask, padded, pad).gather(1, order)[:, :width]
    return Rollout(
        tokens=joined,
        prompt_lengths=prompt_mask.sum(1),
        response_lengths=lengths,
        rollout_logprobs=torch.where(response_mask, logprobs, 0.0),
        rollout_entropy=torch.where(response_mask, entropy, 0.0),
        response_mask=response_mask,
        terminated=terminated,
        group=group,
    )
