"""The language-model head, applied to chunks of tokens, so that only one chunk's logits exist at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**27
"""The number of logits in a chunk: small enough for the cache of a CPU, and large on a GPU.

For each chunk, autocast casts the head's weights, and the backward pass adds to their whole gradient in float32. By
calculation, with a model of 8 billion parameters and a vocabulary of 152,000, an H100 needs as long for this as for the
matrix products of about 500 rows; 2²⁷ logits are 883 rows. The backward pass needs 10 bytes of memory for each logit
under bf16-mixed, and 14 if the temperature is not 1: up to 1.9 GB.
"""
LEAST_ROWS = 64
"""The minimum number of tokens in a chunk; with fewer, reading the head's weights would take most of the time."""


def chunk_rows(vocabulary: int, device: torch.device, memory: int = 1) -> int:
    """Return the number of tokens whose logits are computed at a time.

    Args:
        vocabulary: The size of the vocabulary.
        device: The device of the logits.
        memory: The memory for each logit as a multiple of what `logprobs_and_entropy` needs; ignored on a CPU.

    >>> chunk_rows(50_000, torch.device("cpu")), chunk_rows(50_000, torch.device("cuda"))
    (64, 2684)
    """
    elements = CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS // memory
    return max(LEAST_ROWS, elements // vocabulary)


def logprobs_and_entropy(
    logits_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], hidden: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Compute log π(target) and the entropy H(π) of each token's distribution π = softmax(logits).

    The backward pass recomputes the logits of each chunk. For the target t with the one-hot vector 1ₜ, it uses
    ∂ log π(t) / ∂ logits = 1ₜ − π and ∂H / ∂ logits = −π (log π + H). The outputs can be differentiated only once.

    Args:
        logits_of: A function from hidden states [n, H] to logits [n, V] in float32.
        parameters: The parameters of ``logits_of`` that may be trained.
        hidden: The hidden states, [N, H].
        targets: The ids of the tokens whose log-probabilities are computed, one for each hidden state, [N] int64.
        rows: The number of tokens in a chunk.

    Returns:
        The log-probabilities, [N] float32, and the entropies, [N] float32, in nats.

    >>> weight, hidden, targets = torch.zeros(4, 2), torch.ones(3, 2), torch.tensor([0, 1, 2])
    >>> logprobs_and_entropy(lambda x: x @ weight.T, [weight], hidden, targets, rows=2)  # −log 4 and log 4
    (tensor([-1.3863, -1.3863, -1.3863]), tensor([1.3863, 1.3863, 1.3863]))
    """
    return _Head.apply(logits_of, rows, targets, hidden, *parameters)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_of: Callable[[Tensor], Tensor], rows: int, targets: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunks: list[tuple[Tensor, Tensor, Tensor]] = []
        for chunk_hidden, chunk_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = logits_of(chunk_hidden)
            normalizer = logits.logsumexp(-1, keepdim=True)
            logprobs = logits.sub_(normalizer)
            target_logprobs = logprobs.gather(-1, chunk_targets[:, None]).squeeze(-1)
            entropy = -(logprobs.exp().mul_(logprobs)).sum(-1)
            chunks.append((target_logprobs, entropy, normalizer))
        target_logprobs, entropy, normalizer = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.logits_of, ctx.rows = logits_of, rows
        device = hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(targets, hidden, entropy, normalizer, *parameters)
        ctx.set_materialize_grads(False)
        return target_logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        targets, hidden, entropy, normalizer, *parameters = ctx.saved_tensors
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grad_trained: list[Tensor] = []
        grad_hidden = torch.empty_like(hidden)
        device, dtype, enabled = ctx.autocast
        for start in range(0, max(1, len(hidden)), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                states = hidden[chunk].detach().requires_grad_()
                logits = ctx.logits_of(states)
            logprobs = logits.detach().sub_(normalizer[chunk])  # in place, like what follows, to save memory
            grad_logits = logprobs.exp()
            if grad_entropy is None:
                grad_logits.mul_(0.0 if grad_logprobs is None else -grad_logprobs[chunk, None])
            else:
                factor = logprobs.add_(entropy[chunk, None]).mul_(-grad_entropy[chunk, None])
                if grad_logprobs is not None:
                    factor.sub_(grad_logprobs[chunk, None])
                grad_logits.mul_(factor)
            if grad_logprobs is not None:
                grad_logits.scatter_add_(1, targets[chunk, None], grad_logprobs[chunk, None])
            grad_hidden[chunk], *grads = torch.autograd.grad(logits, [states, *trained], grad_logits)
            if not grad_trained:  # accumulated in float32 at least, since FSDP's weights may be in half precision
                grad_trained = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in grads]
            else:
                for total, grad in zip(grad_trained, grads, strict=True):
                    total += grad
        in_order = iter(grad_trained)
        grad_parameters = [next(in_order).to(p.dtype) if p.requires_grad else None for p in parameters]
        return (None, None, None, grad_hidden, *grad_parameters)
