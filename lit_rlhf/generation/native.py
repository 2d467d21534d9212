"""Generation with the actor's own weights and continuous batching: new prompts take the rows of ended sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from lit_rlhf.errors import UserError
from lit_rlhf.generation.cache import RowCache
from lit_rlhf.generation.engine import Engine, Sampling, SpecialTokens, join_responses
from lit_rlhf.generation.packing import packed_weights
from lit_rlhf.generation.sampling import draw
from lit_rlhf.generation.static import StaticStep, cast_weights
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import whole_model
from lit_rlhf.models.positions import learned_positions
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.progress import tell
from lit_rlhf.randomness import Stream, uniforms
from lit_rlhf.types import PromptBatch, Rollout

CHECK_ENDED_EVERY_CPU, CHECK_ENDED_EVERY_GPU = 1, 8
"""The number of decoding steps between two checks for ended rows; in each check, the host waits for the GPU."""
INITIAL_COLUMNS = 64
"""The number of response tokens per row that the cache initially has memory for; columns are added later if needed."""
MIN_FREE_FRACTION = 0.125
"""The fraction of rows that must be free before new prompts join, so that one forward pass prefills several prompts."""
MIN_USED_FRACTION = 0.25
"""The fraction of rows in use at or below which the cache drops its free rows, if decoding steps compute all rows.

No rows are dropped as long as a prompt is waiting.
"""
PREFILL_TOKENS = 8192
"""The maximum number of tokens in a forward pass over prompts, including padding; a longer prompt is computed alone."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention kernels to choose from, without cuDNN's, which would need a new plan for each number of keys."""


@dataclass(frozen=True)
class NativeEngine(Engine):
    """An engine that generates responses in the training process, with a key-value cache of limited size.

    Each prompt is prefilled once for all its responses.

    Args:
        cache_tokens: The maximum number of tokens in the key-value cache, including padding; None for as many as it
            takes to generate all responses at the same time. The responses to one prompt always start together, even if
            the cache then exceeds this maximum. The maximum does not change the samples.
        compile: Whether to compile the decoding step with ``torch.compile``, and to replay it as a CUDA graph on a GPU,
            where kernel launches dominate a small model's step. The first generation then takes about a minute longer.

    Raises:
        ValueError: if ``cache_tokens`` is less than 1.

    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.generation.engine import find_special_tokens
    >>> from lit_rlhf.models.loading import load_model, load_tokenizer
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_tiny_model(folder)
    ...     actor, tokenizer = Actor(load_model(folder)), load_tokenizer(folder)
    >>> tokens = torch.tensor([[2, 6, 7], [2, 8, 9]])
    >>> prompts = PromptBatch(
    ...     tokens=tokens, mask=tokens > 0, group=torch.arange(2), prompts=["w0 w1", "w2 w3"], columns={}
    ... )
    >>> sampling, special_tokens = Sampling(max_tokens=4, responses=3), find_special_tokens(actor, tokenizer, stop=())
    >>> rollout = NativeEngine().generate(actor, prompts, sampling, special_tokens, stream=Stream.ROLLOUT, iteration=0)
    >>> rollout.group
    tensor([0, 0, 0, 1, 1, 1])
    """

    cache_tokens: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ValueError(f"cache_tokens must be 1 or more, or null for all rows, not {self.cache_tokens}")

    @property
    def is_exact(self) -> bool:
        """Always True, because the engine computes with the actor itself."""
        return True

    @torch.no_grad()
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
        """Generate ``sampling.responses`` responses for each prompt, as `Engine.generate` specifies.

        Raises:
            UserError: if the model caches anything besides keys and values, or if the longest prompt and a response of
                ``sampling.max_tokens`` tokens together need more positions than the model has learned.
        """
        n = sampling.responses
        rows = prompts.group.repeat_interleave(n) * n + torch.arange(n, device=prompts.group.device).repeat(
            len(prompts.group)
        )
        numbers = uniforms(stream, iteration, rows, sampling.max_tokens)
        weights = cast_weights(whole_model(actor.model)) if self.compile else packed_weights(actor.model, len(rows))
        with unsharded(actor), _autocast_cache(), sdpa_kernel(KERNELS), weights:
            decoding = _Decoding(actor, prompts, sampling, special_tokens, numbers, self.cache_tokens, self.compile)
            with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for each length
                decoding.run()
            decoding.cache.layers.clear()  # layers and cache refer to each other; their memory is freed now
        longest = int(decoding.lengths.max())
        last = decoding.tokens.gather(1, decoding.lengths[:, None] - 1)
        return join_responses(
            prompts,
            sampling,
            special_tokens.pad,
            tokens=decoding.tokens[:, :longest],
            logprobs=decoding.logprobs[:, :longest],
            entropy=decoding.entropy[:, :longest],
            lengths=decoding.lengths,
            terminated=(last == decoding.stop).any(1),
        )


class _Decoding:
    """The state of one call to `NativeEngine.generate`: the responses so far, and the cache rows in use."""

    def __init__(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        uniforms: Tensor,
        cache_tokens: int | None,
        static: bool,
    ) -> None:
        device = uniforms.device
        self.actor, self.prompts, self.sampling, self.static = actor, prompts, sampling, static
        self.stop = torch.tensor(special_tokens.stop, device=device)
        self.uniforms = F.pad(uniforms, (0, 1))  # [B n, T + 1], like the next three; ended rows write to column T
        self.tokens = torch.full_like(self.uniforms, special_tokens.pad, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.entropy = torch.zeros_like(self.logprobs)
        self.lengths = torch.zeros_like(self.tokens[:, 0])  # [B n]
        self.prompt_lengths: list[int] = prompts.mask.sum(1).tolist()
        self.next_prompt = 0  # the index of the first prompt that has not started
        self.sampled = 0  # the number of tokens sampled so far, including those that rows drew after their end
        self.check_every = CHECK_ENDED_EVERY_CPU if device.type == "cpu" else CHECK_ENDED_EVERY_GPU
        self.longest_prompt = max(self.prompt_lengths)
        _check_positions(actor, self.longest_prompt, sampling.max_tokens)
        # the maximum number of columns; a row that has ended still writes some until the next check
        self.max_columns = self.longest_prompt + sampling.max_tokens + self.check_every
        rows = len(uniforms)
        if cache_tokens is not None and rows * self.max_columns > cache_tokens:
            self.max_columns += self.max_columns // 4  # so that the contents have to move left less often
            rows = min(rows, max(1, cache_tokens // (self.max_columns * sampling.responses)) * sampling.responses)
        columns = self._columns(self.longest_prompt + INITIAL_COLUMNS)
        self.cache = RowCache(rows, columns, end=self.longest_prompt)
        self.mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.static_step: StaticStep | None = None
        # one entry for each row in use:
        self.first_column: list[int] = []  # the column of the prompt's first token
        self.response = torch.empty(0, dtype=torch.long, device=device)  # the index of the response, 0 … B n - 1
        self.time = self.response.clone()  # the number of tokens sampled
        self.position = self.response.clone()  # the position of the newest token in its sequence
        self.ended = torch.empty(0, dtype=torch.bool, device=device)

    def run(self) -> None:
        """Decode until every response has ended."""
        logits, steps = self._admit(None), 0
        while True:
            new = self._sample(logits)
            steps += 1
            self.sampled += len(self.first_column)
            if steps % self.check_every == 0:
                new = self._remove_ended(new)
                waiting = (len(self.prompt_lengths) - self.next_prompt) * self.sampling.responses
                done = len(self.lengths) - waiting - len(self.first_column)
                tell("generate", done, len(self.lengths), "responses", self.sampled)
                if not self.first_column and self.next_prompt == len(self.prompt_lengths):
                    return
            logits = self._admit(self._forward(new) if self.first_column else None)

    def _admit(self, logits: Tensor | None) -> Tensor:
        """Prefill waiting prompts if enough rows are free, and return the logits of all rows, old and new, [rows, V].

        Args:
            logits: The logits of the rows that are already in use, [rows, V]; None if no row is in use.
        """
        n, used = self.sampling.responses, len(self.first_column)
        free = self.cache.rows - used
        count = min(len(self.prompt_lengths) - self.next_prompt, free // n)
        if count == 0 or (logits is not None and free < MIN_FREE_FRACTION * self.cache.rows):
            assert logits is not None
            return logits
        new = [self._prefill(prompts) for prompts in self._chunks(count)]
        self.cache.start = min(self.first_column)
        return torch.cat(new if logits is None else [logits, *new])

    def _chunks(self, count: int) -> Iterator[slice]:
        """Yield slices of the next ``count`` prompts, each of at most ``PREFILL_TOKENS`` tokens, including padding.

        A prompt that is longer has a slice of its own.
        """
        first, last = self.next_prompt, self.next_prompt + count
        for prompt in range(first + 1, last):
            if max(self.prompt_lengths[first : prompt + 1]) * (prompt + 1 - first) > PREFILL_TOKENS:
                yield slice(first, prompt)
                first = prompt
        yield slice(first, last)

    def _prefill(self, admitted: slice) -> Tensor:
        """Prefill the prompts of a slice, and write each prompt into one cache row per response.

        Returns:
            The logits of the first token of each response, [rows, V].

        Raises:
            UserError: if the model caches anything besides keys and values.
        """
        n, used = self.sampling.responses, len(self.first_column)
        self.next_prompt = admitted.stop
        lengths = self.prompt_lengths[admitted]
        width = max(lengths)
        mask = self.prompts.mask[admitted, -width:]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        prefilled = DynamicCache()
        logits = self.actor.next_logits(self.prompts.tokens[admitted, -width:], mask, positions, prefilled)
        self.cache.insert(prefilled, n)
        self.mask[used : self.cache.used] = False
        self.mask[used : self.cache.used, self.cache.end - width : self.cache.end] = mask.repeat_interleave(n, 0)
        self.first_column += [self.cache.end - length for length in lengths for _ in range(n)]
        responses = torch.arange(admitted.start * n, admitted.stop * n, device=self.time.device)
        self.response = torch.cat([self.response, responses])
        self.time = torch.cat([self.time, torch.zeros_like(responses)])
        self.position = torch.cat([self.position, positions[:, -1].repeat_interleave(n)])
        self.ended = torch.cat([self.ended, torch.zeros_like(responses, dtype=torch.bool)])
        return logits.repeat_interleave(n, 0)

    def _sample(self, logits: Tensor) -> Tensor:
        """Sample and record the next token of every row in use, and return the tokens, [rows]."""
        max_tokens = self.sampling.max_tokens
        index = self.response, torch.where(self.ended, max_tokens, self.time)  # what ended rows write is never read
        forbidden = None
        if self.sampling.min_tokens:
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, self.stop] = (self.time < self.sampling.min_tokens)[:, None]
        new, logprobs, entropy = draw(logits, self.uniforms[index], self.sampling, forbidden)
        self.tokens[index], self.logprobs[index], self.entropy[index] = new, logprobs, entropy
        active = ~self.ended
        self.time += active
        self.position += active
        self.lengths[self.response] = self.time
        self.ended = self.ended | (new[:, None] == self.stop).any(1) | (self.time == max_tokens)
        return new

    def _remove_ended(self, new: Tensor) -> Tensor:
        """Remove the rows that have ended, and move the last active rows into the gaps.

        Args:
            new: The newest tokens of all rows in use, [rows].

        Returns:
            The newest tokens of the remaining rows, in their new order.
        """
        ended = self.ended.tolist()
        remaining = len(ended) - sum(ended)
        if remaining == len(ended):
            return new
        targets = [row for row in range(remaining) if ended[row]]
        sources = [row for row in range(remaining, len(ended)) if not ended[row]]
        order = list(range(remaining))
        for target, source in zip(targets, sources, strict=True):
            order[target] = source
        if sources:
            source_rows, target_rows = (torch.tensor(rows, device=new.device) for rows in (sources, targets))
            self.cache.move(source_rows, target_rows)
            self.mask[target_rows] = self.mask[source_rows]
        self.cache.used = remaining
        self.first_column = [self.first_column[row] for row in order]
        self.cache.start = min(self.first_column, default=self.cache.end)
        kept = torch.tensor(order, dtype=torch.long, device=new.device)
        self.response, self.time, self.position = self.response[kept], self.time[kept], self.position[kept]
        self.ended = self.ended[kept]
        return new[kept]

    def _forward(self, new: Tensor) -> Tensor:
        """Compute the logits of the next token for each row in use, [rows, V], from the newest tokens ``new``."""
        cache = self.cache
        few_rows = self.next_prompt == len(self.prompt_lengths) and cache.used <= MIN_USED_FRACTION * cache.rows
        if cache.end == cache.columns or (self.static and few_rows):
            self._resize_cache()
        self.mask[:, cache.end] = True  # also in rows without a sequence, since attention to nothing gives NaN
        if self.static:
            self.static_step = self.static_step or StaticStep(self.actor, cache, self.mask)
            logits = self.static_step(new, self.position)
        else:
            mask = self.mask[: cache.used, cache.start : cache.end + 1]
            logits = self.actor.next_logits(new[:, None], mask, self.position[:, None], cache)
        cache.end += 1
        return logits

    def _resize_cache(self) -> None:
        """Choose a new number of columns, move the contents left, and drop free rows if no prompt is waiting.

        The new number of columns is twice the number in use, or the number that a new prompt needs if that is larger,
        but at most the maximum, ``max_columns``.
        """
        cache = self.cache
        old_end, width = cache.end, cache.end - cache.start
        mask = self.mask[: cache.used, cache.start : cache.end]
        rows = cache.rows
        if self.next_prompt == len(self.prompt_lengths):
            rows = min(rows, max(2, cache.used))  # for 1 row, torch.compile would compile the step again
        columns = self._columns(max(2 * width, self.longest_prompt + INITIAL_COLUMNS))
        cache.resize(rows, columns, end=max(width, self.longest_prompt))
        self.mask = torch.zeros(rows, cache.columns, dtype=torch.bool, device=mask.device)
        self.mask[: cache.used, cache.start : cache.end] = mask
        self.first_column = [column + cache.end - old_end for column in self.first_column]
        self.static_step = None

    def _columns(self, columns: int) -> int:
        """Return ``columns``, limited to ``max_columns`` and then rounded up to a multiple of 8.

        Attention on GPUs requires masks whose width is a multiple of 8.
        """
        return -(-min(self.max_columns, columns) // 8) * 8


def _check_positions(actor: Actor, longest_prompt: int, max_tokens: int) -> None:
    """Check that the longest prompt and the longest response fit into a model's learned positions, such as GPT-2's.

    Raises:
        UserError: if they need more positions than the model has learned.
    """
    positions = learned_positions(actor.model.config)
    if positions is not None and longest_prompt + max_tokens > positions:
        raise UserError(
            f"model.sampling.max_tokens: a prompt of {longest_prompt} tokens and a response of up to {max_tokens} need "
            f"more than the model's {positions} positions (max_position_embeddings in its config)"
        )


@contextmanager
def _autocast_cache() -> Iterator[None]:
    """Make autocast cast each weight only once inside this context, where the weights must not change."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)
