"""Tiny data for tests: prompts, preferences and demonstrations in the words of the tiny models' tokenizer."""

from __future__ import annotations

import random
from typing import Any

from lit_rlhf.testing.models import WORDS


def prompts() -> list[dict[str, Any]]:
    """Return 48 prompts of one to six words, with their numbers in the column ``number``.

    >>> prompts()[0]
    {'prompt': 'w26 w2 w16 w31', 'number': 0}
    """
    rng = random.Random(0)
    return [{"prompt": _text(rng, rng.randint(1, 6)), "number": number} for number in range(48)]


def preferences() -> list[dict[str, Any]]:
    """Return 32 pairs of responses; the better response has more of the words w0 … w7.

    >>> preferences()[0]
    {'prompt': 'w6 w31', 'chosen': ' w1 w4 w1', 'rejected': ' w22 w23 w28 w20 w14'}
    """
    rng = random.Random(1)
    records = []
    for _ in range(32):
        better, worse = _text(rng, rng.randint(2, 6), 0, 8), _text(rng, rng.randint(2, 6), 8, WORDS)
        records.append({"prompt": _text(rng, 2), "chosen": f" {better}", "rejected": f" {worse}"})
    return records


def demonstrations() -> list[dict[str, Any]]:
    """Return 32 texts of two to nine words; on average, more than half of the words are among w0 … w7.

    >>> demonstrations()[0]
    {'text': 'w5 w19'}
    """
    rng = random.Random(2)
    return [
        {"text": " ".join(_text(rng, 1, 0, 8 if rng.random() < 0.5 else WORDS) for _ in range(rng.randint(2, 9)))}
        for _ in range(32)
    ]


def _text(rng: random.Random, length: int, first: int = 0, end: int = WORDS) -> str:
    return " ".join(f"w{rng.randrange(first, end)}" for _ in range(length))
