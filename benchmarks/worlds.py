"""Two toy languages whose responses can all be enumerated, so that a policy's expected score and the optimum are exact.

*Bandit*: the policy samples one of three tokens, each with its own score. *Chain*: a Markov chain of four tokens and up
to four steps, whose scores add up; the best first step scores 0.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import lightning
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lit_rlhf.models.actor import Actor

END = "<end>"
BANDIT = {END: 0.0, "a": 0.3, "b": 1.0}
CHAIN = {  # the score of a step from one token to the next; the end and all other steps score 0
    ("a", "b"): 0.1,
    ("b", "b"): 0.1,
    ("b", "c"): 0.2,
    ("c", "c"): 0.2,
    ("c", "a"): 1.0,
}
CHAIN_STEPS = 4


@dataclass(frozen=True)
class World:
    """A language: its words besides the end token, the words that start a text, and the largest number of steps."""

    words: tuple[str, ...]
    starts: tuple[str, ...]
    steps: int

    def responses(self, start: str) -> Iterator[tuple[str, ...]]:
        """Yield every response to a prompt: those that end with the end token, and those of the largest length."""

        def grow(so_far: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
            if len(so_far) == self.steps or (so_far and so_far[-1] == END):
                yield so_far
                return
            for word in (END, *self.words):
                yield from grow((*so_far, word))

        return grow(())


def bandit_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the bandit's three tokens."""
    return _tokenizer(WORLDS["bandit"].words)


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the chain's four tokens."""
    return _tokenizer(WORLDS["chain"].words)


def bandit_prompts() -> list[dict[str, str]]:
    """Return the bandit's prompts, which are all the same."""
    return [{"prompt": "a"}] * 256


def chain_prompts() -> list[dict[str, str]]:
    """Return the chain's prompts; each start is equally frequent."""
    return [{"prompt": "abc"[i % 3]} for i in range(256 * 3)]


def bandit_score(responses: list[str]) -> list[float]:
    """Return the score of each response's token."""
    return [BANDIT[response.strip() or END] for response in responses]


def chain_score(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the sum of the scores of each response's steps."""
    return [_chain_score((prompt, *response.split())) for prompt, response in zip(prompts, responses, strict=True)]


def optimum(world: str) -> float:
    """Return the highest expected score of any policy, averaged over the starts."""
    if world == "bandit":
        return max(BANDIT.values())

    @cache
    def value(state: str, steps: int) -> float:
        if steps == 0:
            return 0.0
        return max(0.0, *(CHAIN.get((state, word), 0.0) + value(word, steps - 1) for word in "abc"))

    starts = WORLDS[world].starts
    return sum(value(start, CHAIN_STEPS) for start in starts) / len(starts)


@torch.no_grad()
def expected_score(actor: Actor, world: str) -> float:
    """Return the actor's expected score: Σ probability × score over all responses, averaged over the starts."""
    language, total = WORLDS[world], 0.0
    ids = {word: i for i, word in enumerate((END, *language.words))}
    for start in language.starts:
        responses = list(language.responses(start))
        tokens = torch.zeros(len(responses), 1 + language.steps, dtype=torch.long)
        response_tokens_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, response in enumerate(responses):
            tokens[row, : 1 + len(response)] = torch.tensor([ids[word] for word in (start, *response)])
            response_tokens_mask[row, 1 : 1 + len(response)] = True
        probability = actor(tokens, response_tokens_mask).logprobs.double().sum(1).exp()
        assert abs(float(probability.sum()) - 1) < 1e-4
        total += float((probability * _scores(world, start, responses)).sum())
    return total / len(language.starts)


class Watch(lightning.Callback):
    """Stops the run when the actor's expected score has been near the optimum for some consecutive iterations.

    Writes the score after each iteration, as a fraction of the optimum, to ``shares.json``.

    Args:
        world: The name of the language.
        goal: The fraction of the optimum to reach.
        held: The number of consecutive iterations at or above the goal.
    """

    def __init__(self, world: str = "bandit", goal: float = 0.95, held: int = 5) -> None:
        self.world, self.goal, self.held = world, goal, held
        self.best = optimum(world)
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Record the expected score, and stop the run if the goal has been held."""
        self.shares.append(expected_score(module.actor, self.world) / self.best)
        last = self.shares[-self.held :]
        trainer.should_stop |= len(last) == self.held and min(last) >= self.goal

    def on_train_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        """Write the scores to ``shares.json``."""
        Path(trainer.default_root_dir, "shares.json").write_text(json.dumps(self.shares))


WORLDS = {
    "bandit": World(words=("a", "b"), starts=("a",), steps=1),
    "chain": World(words=("a", "b", "c"), starts=("a", "b", "c"), steps=CHAIN_STEPS),
}


def _scores(world: str, start: str, responses: list[tuple[str, ...]]) -> Tensor:
    texts = [" ".join(word for word in response if word != END) for response in responses]
    scores = bandit_score(texts) if world == "bandit" else chain_score([start] * len(texts), texts)
    return torch.tensor(scores, dtype=torch.float64)


def _chain_score(words: tuple[str, ...]) -> float:
    return sum(CHAIN.get(step, 0.0) for step in pairwise(words))


def _tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate((END, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="left")
