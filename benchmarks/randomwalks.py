"""Short paths in a random graph, as a language: a letter for each node, a text for each walk.

A prompt is a node, and a response should be the nodes of a walk from it to the goal, "a", in few steps. The model
before training has learned from random walks, most of which never reach the goal. The score of a response is the length
of the shortest path divided by the length of the walk, and 0 if the response is not a walk to the goal in at most 10
steps: the best policy has a mean score of exactly 1.

The task is that of trlx's example of the same name, which goes back to Decision Transformer (Chen et al. 2021, arXiv
2106.01345, section 3): a directed graph of 21 nodes and walks of at most 10 steps. The graph here is another one, and
trlx's own score falls linearly with the length of the walk. This file needs nothing of lit-rlhf.
"""

import random
import string
from collections import deque
from functools import cache
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NODES = string.ascii_lowercase[:21]
GOAL = NODES[0]
STEPS, EDGE_PROBABILITY, WALKS = 10, 0.1, 1000
END = "<end>"


@cache
def graph() -> dict[str, tuple[str, ...]]:
    """Return the successors of each node but the goal, which can be reached from every node in at most 10 steps."""
    rng = random.Random(0)
    while True:
        edges = {
            node: tuple(other for other in NODES if other != node and rng.random() < EDGE_PROBABILITY)
            for node in NODES[1:]
        }
        found = _distances(edges)
        if len(found) == len(NODES) and max(found.values()) <= STEPS:
            return edges


@cache
def distances() -> dict[str, int]:
    """Return the number of steps of the shortest path from each node to the goal."""
    return _distances(graph())


def _distances(edges: dict[str, tuple[str, ...]]) -> dict[str, int]:
    found, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        reached = queue.popleft()
        for node in edges:
            if node not in found and reached in edges[node]:
                found[node] = found[reached] + 1
                queue.append(node)
    return found


def demonstrations() -> list[dict[str, str]]:
    """Return random walks, which end at the goal or after 10 steps."""
    rng = random.Random(1)
    walks = []
    for _ in range(WALKS):
        walk = rng.choice(NODES[1:])
        while walk[-1] != GOAL and len(walk) <= STEPS:
            walk += rng.choice(graph()[walk[-1]])
        walks.append({"prompt": walk[0], "response": walk[1:]})
    return walks


def prompts() -> list[dict[str, str]]:
    """Return every node but the goal, each 64 times; the same prompts are for training and for measuring."""
    return [{"prompt": node} for node in NODES[1:]] * 64


def optimality(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the length of the shortest path divided by that of each walk; 0 for what is not a walk to the goal.

    A walk has at most 10 steps.

    >>> start = next(node for node, steps in distances().items() if steps == 1)
    >>> optimality([start, start], ["a", "?"])
    [1.0, 0.0]
    """
    return [_optimality(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def _optimality(walk: str) -> float:
    follows = all(after in graph().get(before, ()) for before, after in pairwise(walk))
    arrives = walk.endswith(GOAL) and 1 < len(walk) <= 1 + STEPS
    return distances()[walk[0]] / (len(walk) - 1) if follows and arrives else 0.0


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer, which has a token for each node, one for the end of a text, and one for padding."""
    vocabulary = {token: number for number, token in enumerate((END, "<pad>", *NODES))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token="<pad>", padding_side="left")
