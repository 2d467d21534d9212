"""A small language of restaurant reviews, defined by a grammar, so that the quality of a response can be *measured*.

::

    review  := opening clause{2,4} [verdict]
    opening := "my" companion "and i" visit "the" place "." | "i" visit "the" place "with my" companion "."
    clause  := "the" part "was" praise "."
             | "the" part "was" praise "and" praise "."
             | "the" part "was" praise "but the" part "was" praise "."
    praise  := [degree] adjective
    verdict := "we will come back soon ." | "i tell all my friends ."
             | "we will never return ." | "i want my money back ."

A prompt is an opening; a response is the rest. `grammatical` says whether a text is a sentence of the language,
and `positivity` says how far praise outweighs complaint in the text, from −1 to 1. Everything here is deterministic.
"""

import math
import random
import re
from collections.abc import Sequence
from itertools import product

from transformers import PreTrainedTokenizerFast

GOOD = ("delicious", "excellent", "fresh", "friendly", "lovely", "perfect", "tasty", "warm")
BAD = ("awful", "bland", "cold", "dirty", "horrible", "slow", "stale", "terrible")
DEGREES = ("very", "really", "quite")
PARTS = ("soup", "bread", "pasta", "fish", "salad", "dessert", "service", "coffee")
COMPANIONS = ("brother", "sister", "mother", "father", "friend", "boss", "neighbour", "cousin", "uncle", "aunt")
PLACES = tuple(
    f"{first} {second}"
    for first, second in product(("golden", "little", "old", "blue", "red"), ("spoon", "garden", "lantern", "kitchen"))
)
VISITS = ("visited", "tried", "went to")
GOOD_VERDICTS = ("we will come back soon .", "i tell all my friends .")
BAD_VERDICTS = ("we will never return .", "i want my money back .")
SPECIAL = ("<pad>", "<end>", "<unknown>")

_PRAISE = rf"(?:(?:{'|'.join(DEGREES)}) )?(?:{'|'.join(GOOD + BAD)})"
_PART = f"(?:{'|'.join(PARTS)})"
_CLAUSE = re.compile(rf"the {_PART} was {_PRAISE}(?: and {_PRAISE}| but the {_PART} was {_PRAISE})? \.")
_PLACE = f"(?:{'|'.join(PLACES)})"
_COMPANION = f"(?:{'|'.join(COMPANIONS)})"
_VISIT = f"(?:{'|'.join(VISITS)})"
_OPENING = re.compile(
    rf"(?:my {_COMPANION} and i {_VISIT} the {_PLACE} \.|i {_VISIT} the {_PLACE} with my {_COMPANION} \.)"
)


def openings() -> list[str]:
    """Return all 1,200 openings, in a fixed order that is not alphabetical.

    >>> openings()[0]
    'my sister and i tried the golden spoon .'
    """
    texts = [
        text
        for companion, visit, place in product(COMPANIONS, VISITS, PLACES)
        for text in (f"my {companion} and i {visit} the {place} .", f"i {visit} the {place} with my {companion} .")
    ]
    random.Random(0).shuffle(texts)
    return texts


def review(rng: random.Random) -> str:
    """Draw a review without its opening; the clauses lean towards praise, towards complaint or towards neither.

    >>> review(random.Random(0))[:58]
    'the soup was quite lovely . the dessert was cold but the b'
    """
    lean = rng.choice((0.2, 0.5, 0.8))
    clauses = [_clause(rng, lean) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        clauses.append(rng.choice(GOOD_VERDICTS if rng.random() < lean else BAD_VERDICTS))
    return " ".join(clauses)


def grammatical(text: str) -> bool:
    """Return whether a whole review, both its opening and the rest, is a sentence of the language.

    >>> grammatical("i tried the old spoon with my aunt . the soup was very tasty . the fish was cold and stale .")
    True
    >>> grammatical("i tried the old spoon with my aunt . the soup was very tasty fresh . the fish was stale .")
    False
    """
    opening = _OPENING.match(text)
    rest = text[opening.end() :].strip() if opening else ""
    clauses = 0
    while match := _CLAUSE.match(rest):
        clauses += 1
        rest = rest[match.end() :].strip()
    return 2 <= clauses <= 4 and (rest == "" or rest in GOOD_VERDICTS + BAD_VERDICTS)


def positivity(text: str) -> float:
    """Return (p − c) / (p + c) for p praising and c complaining adjectives and verdicts; 0 if there are none.

    >>> positivity("the soup was tasty . the fish was stale . the bread was fresh .")
    0.3333333333333333
    """
    words = text.split()
    good = sum(word in GOOD for word in words) + sum(verdict in text for verdict in GOOD_VERDICTS)
    bad = sum(word in BAD for word in words) + sum(verdict in text for verdict in BAD_VERDICTS)
    return (good - bad) / (good + bad) if good + bad else 0.0


def reward(responses: Sequence[str]) -> list[float]:
    """Return each response's positivity, in [−1, 1]: the true score that the quickstart logs but does not train on.

    >>> reward(["the soup was tasty .", "the fish was stale ."])
    [1.0, -1.0]
    """
    return [positivity(response) for response in responses]


def demonstrations() -> list[dict[str, str]]:
    """Return reviews to imitate: eight for each of the first 1,000 openings.

    >>> len(demonstrations())
    8000
    """
    rng = random.Random(1)
    return [{"prompt": text, "response": " " + review(rng)} for text in openings()[:1000] for _ in range(8)]


def validation_demonstrations() -> list[dict[str, str]]:
    """Return one review for each opening that is not in a training set.

    >>> len(validation_demonstrations())
    200
    """
    rng = random.Random(2)
    return [{"prompt": text, "response": " " + review(rng)} for text in openings()[1000:]]


def pairs() -> list[dict[str, str]]:
    """Return a chosen and a rejected review for each of the first 1,000 openings, except where the two are equal.

    >>> sorted(pairs()[0])
    ['chosen', 'prompt', 'rejected']
    """
    return _pairs(openings()[:1000], seed=3)


def validation_pairs() -> list[dict[str, str]]:
    """Return pairs of reviews as `pairs` does, for the 200 openings that are not in a training set.

    >>> sorted(validation_pairs()[0])
    ['chosen', 'prompt', 'rejected']
    """
    return _pairs(openings()[1000:], seed=4)


def prompts() -> list[dict[str, str]]:
    """Return the first 1,000 openings, as prompts.

    >>> len(prompts())
    1000
    """
    return [{"prompt": text} for text in openings()[:1000]]


def fresh_prompts() -> list[dict[str, str]]:
    """Return the 200 openings that are not in a training set, as prompts.

    >>> len(fresh_prompts())
    200
    """
    return [{"prompt": text} for text in openings()[1000:]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word.

    >>> tokenizer()("the soup was cold .")["input_ids"]
    [60, 54, 68, 16, 3]
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word for text in [*openings(), *GOOD_VERDICTS, *BAD_VERDICTS] for word in text.split()}
    words |= {*GOOD, *BAD, *DEGREES, *PARTS, "the", "was", "and", "but", "."}
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[1], unk_token=SPECIAL[2], padding_side="left"
    )


def _pairs(texts: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Draw two reviews for each opening; the first is chosen with probability σ(3 (p₁ − p₂)).

    This is the Bradley–Terry model, where pᵢ is the positivity of review i. If the two reviews are equal, the opening
    is left out.
    """
    rng, made = random.Random(seed), []
    for text in texts:
        one, other = review(rng), review(rng)
        if one == other:
            continue
        chance = 1 / (1 + math.exp(-3 * (positivity(one) - positivity(other))))
        chosen, rejected = (one, other) if rng.random() < chance else (other, one)
        made.append({"prompt": text, "chosen": " " + chosen, "rejected": " " + rejected})
    return made


def _clause(rng: random.Random, lean: float) -> str:
    text = f"the {rng.choice(PARTS)} was {_praise(rng, lean)}"
    form = rng.random()
    if form < 0.25:
        text += f" and {_praise(rng, lean)}"
    elif form < 0.4:
        text += f" but the {rng.choice(PARTS)} was {_praise(rng, lean)}"
    return text + " ."


def _praise(rng: random.Random, lean: float) -> str:
    degree = f"{rng.choice(DEGREES)} " if rng.random() < 0.4 else ""
    return degree + rng.choice(GOOD if rng.random() < lean else BAD)
