"""The language-model head, a chunk of tokens at a time: logits over the vocabulary exist for no more than one chunk."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**24
"""Logits held at a time, in floats: few enough for a CPU's cache, many enough to fill a GPU."""
LEAST_ROWS = 64
"""Tokens of a chunk at least, so that reading the head's weights pays."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk."""
    elements = CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS
    return max(LEAST_ROWS, elements // vocabulary)


def logprobs_and_entropy(
    logits_of: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], hidden: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy H(π) of each token's distribution π = softmax(logits), in nats.

    The backward pass computes a chunk's logits again, and from them ∂ log π(t) / ∂ logits = 1ₜ − π and
    ∂H / ∂ logits = −π (log π + H). Differentiable once.

    Args:
        logits_of: Hidden states [n, H] to logits [n, V] in float32.
        parameters: What ``logits_of`` has of its own and may be trained.
        hidden: [N, H].
        targets: [N] int64.
        rows: Tokens of a chunk.

    Returns:
        [N] and [N], float32.
    """
    return _Head.apply(logits_of, rows, targets, hidden, *parameters)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_of: Callable[[Tensor], Tensor], rows: int, targets: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        for states, chosen in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = logits_of(states)
            normalizer = logits.logsumexp(-1, keepdim=True)
            logprobs = logits.sub_(normalizer)
            picked = logprobs.gather(-1, chosen[:, None]).squeeze(-1)
            entropy = -(logprobs.exp().mul_(logprobs)).sum(-1)
            pieces.append((picked, entropy, normalizer))
        picked, entropy, normalizer = (torch.cat(found) for found in zip(*pieces, strict=True))
        ctx.logits_of, ctx.rows = logits_of, rows
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(targets, hidden, entropy, normalizer, *parameters)
        ctx.set_materialize_grads(False)
        return picked, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_picked: Tensor | None, for_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        targets, hidden, entropy, normalizer, *parameters = ctx.saved_tensors
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients: list[Tensor] = []
        for_hidden = torch.empty_like(hidden)
        kind, dtype, enabled = ctx.autocast
        for start in range(0, max(1, len(hidden)), ctx.rows):
            part = slice(start, start + ctx.rows)
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                states = hidden[part].detach().requires_grad_()
                logits = ctx.logits_of(states)
            logprobs = logits.detach() - normalizer[part]
            for_logits = logprobs.exp()
            if for_entropy is None:
                for_logits.mul_(0.0 if for_picked is None else -for_picked[part, None])
            else:
                factor = logprobs.add_(entropy[part, None]).mul_(-for_entropy[part, None])
                if for_picked is not None:
                    factor.sub_(for_picked[part, None])
                for_logits.mul_(factor)
            if for_picked is not None:
                for_logits.scatter_add_(1, targets[part, None], for_picked[part, None])
            found = torch.autograd.grad(logits, [states, *trained], for_logits)
            for_hidden[part] = found[0]
            if not gradients:  # added up in float32 at least: FSDP's weights are of half precision
                gradients = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in found[1:]]
            else:
                for total, gradient in zip(gradients, found[1:], strict=True):
                    total += gradient
        ordered = iter(gradients)
        of_parameters = [next(ordered).to(p.dtype) if p.requires_grad else None for p in parameters]
        return (None, None, None, for_hidden, *of_parameters)
