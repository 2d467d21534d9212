"""The responses that the report shows, from ``samples.jsonl``, for as many iterations as there is room for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_rlhf.report.run import Run, thinned

MOST_BYTES = 2_500_000
"""The largest total size of the responses in the report, in bytes; a page of many megabytes would open slowly."""


def responses_of(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """Return the responses that the report shows, and the number of responses that are left out.

    The training responses and the validation responses of each run all get equal shares of ``MOST_BYTES``. If responses
    exceed their share, only those of evenly spaced iterations are shown, including the first and the last iteration.
    """
    parts = [
        (run, stage, [s for s in run.samples if s["stage"] == stage]) for run in runs for stage in ("train", "val")
    ]
    parts = [part for part in parts if part[2]]
    kept = [
        {"run": run.name, **sample, "prompt": _text(sample["prompt"])}
        for run, stage, samples in parts
        for sample in _within(samples, MOST_BYTES // len(parts))
    ]
    return kept, sum(len(samples) for _, _, samples in parts) - len(kept)


def _within(samples: list[dict[str, Any]], most_bytes: int) -> list[dict[str, Any]]:
    sizes: dict[int, int] = {}
    for sample in samples:
        size = len(json.dumps(sample, ensure_ascii=False).encode())
        sizes[sample["iteration"]] = sizes.get(sample["iteration"], 0) + size
    iterations = sorted(sizes)
    while sum(sizes[i] for i in iterations) > most_bytes and len(iterations) > 2:
        share = most_bytes / sum(sizes[i] for i in iterations)
        iterations = thinned(sorted(sizes), max(2, min(len(iterations) - 1, int(len(iterations) * share))))
    shown = set(iterations)
    return [sample for sample in samples if sample["iteration"] in shown]


def _text(prompt: Any) -> str:
    """Return a prompt as text; each message of a conversation begins on a new line, with its role."""
    if isinstance(prompt, list):
        return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)
