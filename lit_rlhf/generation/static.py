"""A decoding step whose tensors keep their memory and shape, for ``torch.compile`` and CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.generation.cache import RowCache
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.quantization import QuantizedLinear


class StaticStep:
    """A compiled decoding step for all rows and columns of a cache; a GPU replays it as one CUDA graph.

    Rows without a sequence are also computed, but their results are not used. The graph is captured when the step is
    first called, and is freed with this object. The graphs that ``torch.compile`` itself can capture would never be
    freed, although they are useless in the next generation, where the cache and gathered weights have other addresses.

    Args:
        actor: The policy.
        cache: The cache, whose tensors must not be replaced as long as this step is used.
        mask: The mask of the cache, bool [rows, columns], with at least one True in each row. The caller changes it in
            place between two steps.
    """

    def __init__(self, actor: Actor, cache: RowCache, mask: Tensor) -> None:
        self.cache = cache
        cache.column = torch.zeros(1, dtype=torch.long, device=mask.device)
        self.tokens = torch.zeros(cache.rows, 1, dtype=torch.long, device=mask.device)
        self.positions = torch.zeros_like(self.tokens)
        self.step = partial(_compiled_next_logits(), actor, self.tokens, mask, self.positions, cache)
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the next token for the rows in use, [used, V]; the next call may overwrite them.

        Args:
            tokens: The newest tokens, [used] int64.
            positions: The positions of these tokens in their sequences, [used] int64.
        """
        used, column = self.cache.used, self.cache.column
        assert column is not None
        self.tokens[:used, 0], self.positions[:used, 0] = tokens, positions
        column.fill_(self.cache.end)
        with torch.compiler.set_stance("default"):
            if self.replay is None:
                self.replay = capture(self.step, tokens.device)
            return self.replay()[:used]


@lru_cache
def _compiled_next_logits() -> Callable[..., Tensor]:
    """Return the decoding step, compiled for any number of rows and columns so that a process compiles it only once."""
    return torch.compile(Actor.next_logits, dynamic=True)


def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return a function that repeats a step on the same tensors, with their contents at the time of the call.

    On a GPU, the function replays a CUDA graph, so that the CPU need not launch each kernel. Each replay overwrites the
    result of the previous one.

    Args:
        step: The step, which must be repeatable, because on a GPU it runs once before it is captured.
        device: The device of the step's tensors.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the step, and allocates the libraries' workspaces, neither of which can be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's thread may query its events meanwhile
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Make a model's linear layers hold their weights and biases in autocast's precision, inside this context.

    A compiled step does not use autocast's cache, so it would otherwise read and cast every weight at each token.
    Only float32 weights are cast, quantized layers stay as they are, and without autocast, nothing changes. The cast
    weights have no gradients.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False) if isinstance(layer, nn.Linear | Conv1D) else ():
            kind = weight.device.type
            rounds = torch.is_autocast_enabled(kind) and not isinstance(layer, QuantizedLinear)
            if rounds and weight.dtype == torch.float32:
                replaced.append((layer, name, weight))
                half = weight.detach().to(torch.get_autocast_dtype(kind))
                setattr(layer, name, nn.Parameter(half, requires_grad=False))
    try:
        yield
    finally:
        for layer, name, weight in replaced:
            setattr(layer, name, weight)
