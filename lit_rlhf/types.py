"""The batches that the data modules yield, and the data of an iteration, with one type for each stage.

Dimensions: ``B`` is the number of prompts, texts or rankings in a batch, and the number of responses in an iteration;
responses are prompt-major (the n responses to prompt 0, then those to prompt 1, …). ``P`` is the number of tokens in
the longest prompt, ``T`` in the longest response, and ``S`` in the longest whole sequence, usually a prompt with its
response. Masks are bool; **True** marks the elements that count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

Conversation: TypeAlias = list[dict[str, str]]
"""A list of messages, oldest first: ``[{"role": "user", "content": "…"}, …]``."""
Prompt: TypeAlias = str | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """A batch of prompts: the rows of the global batch that this process handles.

    >>> batch = PromptBatch(
    ...     tokens=torch.tensor([[0, 5], [6, 7]]),
    ...     mask=torch.tensor([[False, True], [True, True]]),
    ...     group=torch.tensor([0, 1]),
    ...     prompts=["w5", "w6 w7"],
    ...     columns={"answer": [1, 2]},
    ... )
    >>> batch.mask.sum(1)  # the prompts' lengths
    tensor([1, 2])
    """

    tokens: Tensor  # [B, P] int64, left-padded
    mask: Tensor  # [B, P] bool, False at padding
    group: Tensor  # [B] int64, the prompt's index in the global batch
    prompts: Sequence[Prompt]  # B, before tokenization
    columns: Mapping[str, Sequence[Any]]  # the records' columns, B values each

    def to(self, device: torch.device) -> "PromptBatch":
        """Return the batch with its tensors on ``device``; Lightning calls this method."""
        return _to(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationBatch:
    """A batch of texts to imitate; with packing, a row contains several texts."""

    tokens: Tensor  # [B, S] int64, right-padded
    mask: Tensor  # [B, S] bool, the tokens whose prediction is trained
    positions: Tensor | None  # [B, S] int64, 0, 1, … within each text of a row; None if each row is one text

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row up to the last one whose prediction is trained, at least 1; [B] int64."""
        index = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        return torch.where(self.mask, index, 1).amax(1)

    def to(self, device: torch.device) -> "DemonstrationBatch":
        """Return the batch with its tensors on ``device``; Lightning calls this method."""
        return _to(self, device)

    def select(self, rows: Tensor) -> "DemonstrationBatch":
        """Return the rows at the given indices, [b] int64, cut after the last token that ``mask`` marks in them."""
        width = int(self.lengths[rows].max())
        return DemonstrationBatch(
            tokens=self.tokens[rows, :width],
            mask=self.mask[rows, :width],
            positions=None if self.positions is None else self.positions[rows, :width],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """A batch of B rankings, each of at most K responses to one prompt, with N responses in all; a pair has K = 2."""

    tokens: Tensor  # [N, S] int64, the responses of all rankings, in their order: prompt, then response, right-padded
    prompt_lengths: Tensor  # [N] int64
    lengths: Tensor  # [N] int64, tokens of prompt and response
    ranking: Tensor  # [B, K] int64, rows of ``tokens``, best first; 0 where the ranking has fewer than K responses
    mask: Tensor  # [B, K] bool, False where the ranking has fewer than K responses
    margin: Tensor | None  # [B] float32, the amount by which the better score of a pair should exceed the worse one
    number: Tensor  # [B] int64, the index of each ranking in its split
    prompts: Sequence[list[int]]  # B, the prompts' tokens, ready to be continued; [] for a record without a prompt

    @property
    def response_tokens_mask(self) -> Tensor:
        """A bool mask [N, S] that is True at the tokens of the responses."""
        return _response_tokens_mask(self.tokens, self.prompt_lengths, self.lengths)

    @property
    def shared(self) -> Tensor:
        """The number of leading tokens that each response with its prompt shares with the one before, [N] int64."""
        return shared_beginnings(self.tokens, self.lengths, self.mask.nonzero()[:, 0])

    def to(self, device: torch.device) -> "PreferenceBatch":
        """Return the batch with its tensors on ``device``; Lightning calls this method."""
        return _to(self, device)

    def by_ranking(self, x: Tensor) -> Tensor:
        """Arrange ``x`` [N] by ranking; return it as [B, K], with 0 where ``mask`` is False."""
        return torch.where(self.mask, x[self.ranking], 0.0)

    def select(self, rankings: Tensor) -> "PreferenceBatch":
        """Return the rankings at the given indices, [b] int64, cut to their longest sequence and longest ranking."""
        mask = self.mask[rankings]
        mask = mask[:, : int(mask.sum(1).max())]
        rows = self.ranking[rankings][:, : mask.shape[1]][mask]
        ranking = torch.zeros_like(mask, dtype=torch.long)
        ranking[mask] = torch.arange(len(rows), device=rows.device)
        return PreferenceBatch(
            tokens=self.tokens[rows, : int(self.lengths[rows].max())],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
            ranking=ranking,
            mask=mask,
            margin=None if self.margin is None else self.margin[rankings],
            number=self.number[rankings],
            prompts=[self.prompts[i] for i in rankings.tolist()],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts with the actor's responses; each response directly follows its prompt, and the padding is on the right.

    >>> rollout = Rollout(
    ...     tokens=torch.tensor([[5, 8, 9], [6, 7, 8]]),
    ...     prompt_lengths=torch.tensor([1, 2]),
    ...     response_lengths=torch.tensor([2, 1]),
    ...     rollout_logprobs=torch.zeros(2, 2),
    ...     rollout_entropy=torch.zeros(2, 2),
    ...     response_mask=torch.tensor([[True, True], [True, False]]),
    ...     terminated=torch.tensor([True, False]),
    ...     group=torch.tensor([0, 1]),
    ... )
    >>> rollout.at_responses(rollout.tokens)[rollout.response_mask]
    tensor([8, 9, 8])
    >>> rollout.response_tokens_mask
    tensor([[False,  True,  True],
            [False, False,  True]])
    """

    tokens: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64, including the stop token
    rollout_logprobs: Tensor  # [B, T] float32, computed by the engine
    rollout_entropy: Tensor  # [B, T] float32, in nats, of the engine's distribution of each token
    response_mask: Tensor  # [B, T] bool
    terminated: Tensor  # [B] bool, True if a stop token ended the response, False if the length limit did
    group: Tensor  # [B] int64, the index of the prompt in the global batch

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each prompt with its response, [B] int64."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_tokens_mask(self) -> Tensor:
        """A bool mask [B, S] that is True at the tokens of the responses; ``response_mask`` marks them in [B, T]."""
        return _response_tokens_mask(self.tokens, self.prompt_lengths, self.lengths)

    @property
    def shared(self) -> Tensor:
        """The number of leading tokens that each row shares with the row before it, [B] int64; see the function
        `shared_beginnings`.
        """
        return shared_beginnings(self.tokens, self.lengths, self.group)

    def at_responses(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, S] at the response tokens, as [B, T]; elements outside ``response_mask`` are undefined."""
        return self._gather(x, self.prompt_lengths)

    def before_responses(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, S] one token *before* each response token, as [B, T].

        At these positions, the critic predicts the values of the states before the response tokens. Elements outside
        ``response_mask`` are undefined.
        """
        return self._gather(x, self.prompt_lengths - 1)

    def at_end(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, S] at the last token of each response, as [B]."""
        return x.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def to(self, device: torch.device) -> "Rollout":
        """Return the rollout with its tensors on ``device``."""
        return _to(self, device)

    def select(self, rows: Tensor) -> "Rollout":
        """Return the rows at the given indices, [b] int64, cut to their longest sequence and longest response."""
        selected = replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})
        width, time = int(selected.lengths.max()), int(selected.response_lengths.max())
        return replace(
            selected,
            tokens=selected.tokens[:, :width],
            rollout_logprobs=selected.rollout_logprobs[:, :time],
            rollout_entropy=selected.rollout_entropy[:, :time],
            response_mask=selected.response_mask[:, :time],
        )

    def _gather(self, x: Tensor, start: Tensor) -> Tensor:
        index = start[:, None] + torch.arange(self.response_mask.shape[1], device=x.device)
        return x.gather(1, index.clamp(max=x.shape[1] - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """The input of a `Reward`: the responses as text, the prompts with their other columns, and the rollout.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> inputs = make_reward_inputs(["the answer is 4"], answer=[4])
    >>> inputs.responses, inputs.columns
    (['the answer is 4'], {'answer': [4]})
    """

    prompts: Sequence[Prompt]  # B
    responses: Sequence[str]  # B, without special tokens
    columns: Mapping[str, Sequence[Any]]  # B values each
    rollout: Rollout
    iteration: int = 0  # the number of iterations that were completed before

    def select(self, rows: Tensor) -> "RewardInputs":
        """Return the responses at the given indices, [b] int64."""
        indices = rows.tolist()
        return replace(
            self,
            prompts=[self.prompts[i] for i in indices],
            responses=[self.responses[i] for i in indices],
            columns={name: [values[i] for i in indices] for name, values in self.columns.items()},
            rollout=self.rollout.select(rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with what the actor, the reference model, the critic and the rewards compute for its responses."""

    rollout: Rollout
    reward_inputs: RewardInputs
    old_logprobs: Tensor  # [B, T], the actor's at the start of the update
    entropy: Tensor  # [B, T], of the actor's next-token distribution, in nats
    ref_logprobs: Tensor | None  # [B, T]; None without a reference
    full_kl: Tensor | None  # [B, T], KL(π ‖ π_ref) over the vocabulary, in nats; None if the reward does not use it
    values: Tensor | None  # [B, T]; None without a critic
    bootstrap: Tensor | None  # [B], the value after a truncated response, 0 for the others; None for all 0
    rewards: Mapping[str, Tensor]  # [B] for each reward, unweighted; NaN where it failed, if it leaves out such rows
    scores: Tensor  # [B], the weighted sum of the rewards; NaN where one of them failed
    shaped_scores: Tensor  # [B], after normalisation, clipping and the penalty for truncated responses
    potentials: Tensor | None = None  # [B, T], of the state before each token, in the units of these scores; None for 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The input of an advantage estimator.

    Raises:
        ValueError: if the shapes of the tensors do not match.

    >>> trajectory = Trajectory(rewards=torch.tensor([[0.0, 1.0]]), mask=torch.tensor([[True, True]]))
    >>> trajectory.values is None  # without a critic
    True
    """

    rewards: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    values: Tensor | None = None  # [B, T], V of the state before each token; None for a baseline of 0
    bootstrap: Tensor | None = None  # [B], the value after the last token; None for 0
    group: Tensor | None = None  # [B] int64, the prompt that each row answers
    ratios: Tensor | None = None  # [B, T], the actor's probability of each token divided by the engine's; None for 1

    def __post_init__(self) -> None:
        check_shapes(rewards=self.rewards, mask=self.mask, values=self.values, ratios=self.ratios)
        check_shapes(rows=self.mask.any(1), bootstrap=self.bootstrap, group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """The output of an advantage estimator; both tensors are 0 outside the trajectory's mask.

    >>> Estimates(advantages=torch.tensor([[0.5]]), returns=torch.tensor([[1.0]])).returns
    tensor([[1.]])
    """

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T], the critic's targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout with everything that the update of the actor and the critic needs."""

    rollout: Rollout
    old_logprobs: Tensor  # [B, T], the actor's at the start of the update or, if a correction says so, the engine's
    ref_logprobs: Tensor | None  # [B, T]; None without a reference
    values: Tensor | None  # [B, T], the critic's at the start of the update
    policy_weights: Tensor  # [B, T], the factor of the objective's loss; 1 without a correction
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]
    reward_scale: Tensor  # [B, T], the factor by which the whitening of rewards and advantages scaled the rewards

    def select(self, rows: Tensor) -> "Experience":
        """Return the rows at the given indices, [b] int64, cut to their longest sequence and longest response."""
        rollout = self.rollout.select(rows)
        time = rollout.response_mask.shape[1]
        others: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollout"}
        cut: dict[str, Any] = {k: None if v is None else v[rows][:, :time] for k, v in others.items()}
        return Experience(rollout=rollout, **cut)


def shared_beginnings(tokens: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """Return how many leading tokens each text shares with the text before it, [B] int64.

    All texts of a group share their longest common beginning; a text that follows one of another group shares nothing.

    Args:
        tokens: Token ids, [B, S] int64, right-padded.
        lengths: The number of tokens in each text, [B] int64.
        group: The group of each text, [B] int64; the texts of a group follow one another.

    >>> tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 0], [5, 6, 7, 8]])
    >>> shared_beginnings(tokens, torch.tensor([4, 3, 3, 4]), group=torch.tensor([0, 0, 0, 1]))
    tensor([0, 2, 2, 0])
    """
    follows = pad(group[1:] == group[:-1], (1, 0))  # with False
    alike = pad((tokens[1:] == tokens[:-1]).long().cumprod(1).sum(1), (1, 0))
    alike = torch.minimum(alike, torch.minimum(lengths, lengths.roll(1))).masked_fill(~follows, tokens.shape[1])
    number = (~follows).cumsum(0)  # of each text's group
    lower = number * (tokens.shape[1] + 1)  # by so much that the minimum so far begins again with each group
    last = torch.searchsorted(number, number, right=True) - 1  # of each text's group
    least = (alike - lower).cummin(0).values[last] + lower
    return torch.where(follows, least, 0)


def check_shapes(**tensors: Tensor | None) -> None:
    """Check that all tensors have exactly the same shape; shapes that could be broadcast are refused too.

    Args:
        tensors: The tensors, keyed by the names to use in the message; None values are skipped.

    Raises:
        ValueError: if the shapes differ; the message names every tensor with its shape.

    >>> check_shapes(logprobs=torch.zeros(2, 3), mask=torch.zeros(2, 4))
    Traceback (most recent call last):
    ...
    ValueError: shapes differ: logprobs [2, 3], mask [2, 4]
    """
    shapes = {name: x.shape for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}")


def _to(batch: Any, device: torch.device) -> Any:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def _response_tokens_mask(tokens: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return (index >= starts[:, None]) & (index < ends[:, None])
