"""The minimum time of an iteration: the operations of its matrix multiplications divided by this machine's rate.

    python benchmarks/floor.py

Only the multiplications for non-padding tokens are counted: 2 operations per multiply-add, the causal half of
attention, and 3 times the forward pass for the forward and backward passes together. No recomputation is counted.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

SMALL_DECODER = ((2048, 256, 768), (2048, 768, 256), (2048, 1024, 4096))


def matrix_rate(
    dtype: torch.dtype,
    seconds: float = 0.5,
    shapes: Sequence[tuple[int, int, int]] = SMALL_DECODER,
    device: str | None = None,
) -> float:
    """Return the operations per second of the fastest of a few matrix multiplications.

    Args:
        dtype: The type of the matrices.
        seconds: The time for which each multiplication is repeated.
        shapes: The sizes m, k, n of each product [m, k] · [k, n]; by default those of a small decoder.
        device: The device; None for the GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    best = 0.0
    for m, k, n in shapes:
        x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        for _ in range(3):
            torch.nn.functional.linear(x, w)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            torch.nn.functional.linear(x, w)
            count += 1
            if device == "cuda":
                torch.cuda.synchronize()
        best = max(best, 2 * m * k * n * count / (time.perf_counter() - began))
    return best


def operations(
    policy: Path, prompt: int, responses: Sequence[int], epochs: int = 4, shared: bool = False
) -> dict[str, float]:
    """Return the number of operations of generation, judging and update in one iteration.

    Args:
        policy: A model folder; critic, reference and reward model have the same shape.
        prompt: The number of tokens of each prompt.
        responses: The number of tokens of each response.
        epochs: The number of passes over the responses.
        shared: Whether the critic is a head on the actor's trunk.
    """
    config = AutoConfig.from_pretrained(policy)
    h, layers = config.hidden_size, config.num_hidden_layers
    kv = h * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size)
    texts = [prompt + response for response in responses]
    trunk = 2.0 * weights * sum(texts) + layers * 2.0 * h * sum(length**2 for length in texts)
    head = 2.0 * h * config.vocab_size * sum(responses)
    critics = 0 if shared else 1
    return {
        "generate": trunk + head,
        "judge": (3 + critics) * trunk + 2 * head,
        "update": 3 * epochs * ((1 + critics) * trunk + head),
    }


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{dtype}: {matrix_rate(dtype) / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
