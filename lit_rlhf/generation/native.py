"""Generation with the actor's own weights: texts that have ended leave the batch, and waiting ones take their place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from lit_rlhf.generation.cache import RowCache
from lit_rlhf.generation.engine import Engine, Sampling, SpecialTokens, join_responses
from lit_rlhf.generation.packing import packed_weights
from lit_rlhf.generation.sampling import draw
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.randomness import Stream, uniforms
from lit_rlhf.types import PromptBatch, Rollout

LOOK_EVERY_ON_CPU, LOOK_EVERY_ON_GPU = 1, 8
"""Steps between two looks at which rows have ended: on a GPU, each look waits for it."""
FIRST_COLUMNS = 64
"""Tokens of a response that the cache has room for at first; it grows as texts do, when many have left already."""
ADMIT_SHARE = 0.125
"""Waiting prompts come in once this share of the rows is free, so that several come in at once."""


@dataclass(frozen=True)
class NativeEngine(Engine):
    """Decodes in this process, in a cache of bounded size; a prompt is computed once for all its responses.

    Args:
        cache_tokens: Tokens whose keys and values are held at a time, padding included, to bound the cache's memory;
            None: enough for all responses at once. The responses to one prompt are begun together, however many. The
            samples do not depend on it.
        compile: Compile the step, for rows and columns of any number, with ``torch.compile``: meant for GPUs, where a
            small model's step is bound by the launches of its operations. The first generation takes a minute longer.

    Raises:
        ValueError: if cache_tokens is not positive.
    """

    is_exact: ClassVar[bool] = True
    cache_tokens: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ValueError(f"cache_tokens must be 1 or more, or null for all rows, not {self.cache_tokens}")

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
        """See `Engine.generate`."""
        n = sampling.responses
        rows = prompts.group.repeat_interleave(n) * n + torch.arange(n, device=prompts.group.device).repeat(
            len(prompts.group)
        )
        draws = uniforms(stream, iteration, rows, sampling.max_tokens)
        with unsharded(actor), _casts_kept(), self._fast_step(actor, len(rows)) as step:
            decoding = _Decoding(actor, prompts, sampling, special_tokens, draws, self.cache_tokens, step)
            decoding.run()
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

    @contextmanager
    def _fast_step(self, actor: Actor, rows: int) -> Iterator[Callable[..., Tensor]]:
        """`Actor.next_logits` of one token a row, compiled or with weights that are packed for it."""
        if self.compile:
            yield partial(_compiled_step(), actor)
        else:  # layers that are compiled for training would adapt to every length
            with torch.compiler.set_stance("force_eager"), packed_weights(actor.model, rows):
                yield actor.next_logits


@lru_cache
def _compiled_step() -> Callable[..., Tensor]:
    """One for all engines: what is compiled stays."""
    return torch.compile(Actor.next_logits, dynamic=True)


class _Decoding:
    """One call of `NativeEngine.generate`: the responses so far, and the rows of the cache that are at work on them."""

    def __init__(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        draws: Tensor,
        cache_tokens: int | None,
        step: Callable[..., Tensor],
    ) -> None:
        device = draws.device
        self.actor, self.prompts, self.sampling, self.step = actor, prompts, sampling, step
        self.stop = torch.tensor(special_tokens.stop, device=device)
        self.draws = F.pad(draws, (0, 1))  # [B n, T + 1], and so the next three
        self.tokens = torch.full_like(self.draws, special_tokens.pad, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.draws, dtype=torch.float32)
        self.entropy = torch.zeros_like(self.logprobs)
        self.lengths = torch.zeros_like(self.tokens[:, 0])  # [B n]
        self.prompt_lengths: list[int] = prompts.mask.sum(1).tolist()
        self.waiting = 0  # the first prompt that has not begun
        self.look_every = LOOK_EVERY_ON_CPU if device.type == "cpu" else LOOK_EVERY_ON_GPU
        self.longest = max(self.prompt_lengths)
        self.columns = self.longest + sampling.max_tokens + self.look_every  # at most; rows go on until somebody looks
        rows = len(draws)
        if cache_tokens is not None and rows * self.columns > cache_tokens:
            self.columns += self.columns // 4  # texts come and go: the column that is written moves on
            rows = min(rows, max(1, cache_tokens // (self.columns * sampling.responses)) * sampling.responses)
        columns = min(self.columns, self.longest + FIRST_COLUMNS)
        self.cache = RowCache(rows, columns, end=self.longest)
        self.mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        # of the rows in use:
        self.first: list[int] = []  # column of the prompt's first token
        self.response = torch.empty(0, dtype=torch.long, device=device)  # which of the B n
        self.time = self.response.clone()  # tokens drawn
        self.position = self.response.clone()  # of the token drawn last
        self.ended = torch.empty(0, dtype=torch.bool, device=device)

    def run(self) -> None:
        """Decode until every response has ended."""
        logits, steps = self._admit(None), 0
        while True:
            new = self._draw(logits)
            steps += 1
            if steps % self.look_every == 0:
                new = self._retire(new)
                if not self.first and self.waiting == len(self.prompt_lengths):
                    return
            logits = self._admit(self._forward(new) if self.first else None)

    def _admit(self, logits: Tensor | None) -> Tensor:
        """Let waiting prompts in if there is room; their logits stand behind the others'."""
        n, used = self.sampling.responses, len(self.first)
        free = self.cache.rows - used
        count = min(len(self.prompt_lengths) - self.waiting, free // n)
        if count == 0 or (logits is not None and free < ADMIT_SHARE * self.cache.rows):
            assert logits is not None
            return logits
        which = slice(self.waiting, self.waiting + count)
        self.waiting += count
        lengths = self.prompt_lengths[which]
        width = max(lengths)
        mask = self.prompts.mask[which, -width:]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        prefilled = DynamicCache()
        new = self.actor.next_logits(self.prompts.tokens[which, -width:], mask, positions, prefilled)
        self.cache.insert(prefilled, n)
        self.mask[used : self.cache.used] = False
        self.mask[used : self.cache.used, self.cache.end - width : self.cache.end] = mask.repeat_interleave(n, 0)
        self.first += [self.cache.end - length for length in lengths for _ in range(n)]
        self.cache.start = min(self.first)
        began = torch.arange(which.start * n, which.stop * n, device=self.time.device)
        self.response = torch.cat([self.response, began])
        self.time = torch.cat([self.time, torch.zeros_like(began)])
        self.position = torch.cat([self.position, positions[:, -1].repeat_interleave(n)])
        self.ended = torch.cat([self.ended, torch.zeros_like(began, dtype=torch.bool)])
        new = new.repeat_interleave(n, 0)
        return new if logits is None else torch.cat([logits, new])

    def _draw(self, logits: Tensor) -> Tensor:
        """The next token of every row in use."""
        longest = self.sampling.max_tokens
        place = self.response, torch.where(self.ended, longest, self.time)  # what an ended row draws goes behind
        forbidden = None
        if self.sampling.min_tokens:
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, self.stop] = (self.time < self.sampling.min_tokens)[:, None]
        new, logprobs, entropy = draw(logits, self.draws[place], self.sampling, forbidden)
        self.tokens[place], self.logprobs[place], self.entropy[place] = new, logprobs, entropy
        going = ~self.ended
        self.time += going
        self.position += going
        self.lengths[self.response] = self.time
        self.ended = self.ended | (new[:, None] == self.stop).any(1) | (self.time == longest)
        return new

    def _retire(self, new: Tensor) -> Tensor:
        """Rows that have ended give way to the last ones; returns the tokens of those that are left."""
        ended = self.ended.tolist()
        left = len(ended) - sum(ended)
        if left == len(ended):
            return new
        holes = [row for row in range(left) if ended[row]]
        movers = [row for row in range(left, len(ended)) if not ended[row]]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if movers:
            source, target = (torch.tensor(rows, device=new.device) for rows in (movers, holes))
            self.cache.move(source, target)
            self.mask[target] = self.mask[source]
        self.cache.used = left
        self.first = [self.first[row] for row in order]
        self.cache.start = min(self.first, default=self.cache.end)
        kept = torch.tensor(order, dtype=torch.long, device=new.device)
        self.response, self.time, self.position = self.response[kept], self.time[kept], self.position[kept]
        self.ended = self.ended[kept]
        return new[kept]

    def _forward(self, new: Tensor) -> Tensor:
        """One step of the rows in use."""
        cache = self.cache
        if cache.end == cache.columns:
            self._make_room()
        self.mask[: cache.used, cache.end] = True
        seen = self.mask[: cache.used, cache.start : cache.end + 1]
        logits = self.step(new[:, None], seen, self.position[:, None], cache)
        cache.end += 1
        return logits

    def _make_room(self) -> None:
        """More columns, and fewer rows if nobody waits for them; at full size, everything moves to the left."""
        cache = self.cache
        before, width = cache.end, cache.end - cache.start
        seen = self.mask[: cache.used, cache.start : cache.end]
        rows = cache.used if self.waiting == len(self.prompt_lengths) else cache.rows
        cache.make_room(rows, min(self.columns, max(2 * width, self.longest + FIRST_COLUMNS)), max(width, self.longest))
        self.mask = torch.zeros(rows, cache.columns, dtype=torch.bool, device=seen.device)
        self.mask[: cache.used, cache.start : cache.end] = seen
        self.first = [column + cache.end - before for column in self.first]


@contextmanager
def _casts_kept() -> Iterator[None]:
    """Under autocast, cast the weights once and not at every token: nothing trains here."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)
