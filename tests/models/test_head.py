import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf.models.head import chunk_rows, logprobs_and_entropy

V, H, N = 23, 6, 17


def make(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=g, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=g)


def by_categorical(hidden, weight, bias, targets):
    distribution = torch.distributions.Categorical(logits=torch.tanh(hidden @ weight.T + bias) * 3)
    return distribution.log_prob(targets), distribution.entropy()


def by_chunks(hidden, weight, bias, targets, rows):
    def logits(states):
        return torch.tanh(states @ weight.T + bias) * 3

    return logprobs_and_entropy(logits, [weight, bias], hidden, targets, rows)


@pytest.mark.parametrize("rows", [1, 5, 17, 100])
@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
def test_values_and_gradients(rows, which):
    hidden, weight, bias, targets = make()
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    found = []
    for logprobs, entropy in (
        by_categorical(hidden, weight, bias, targets),
        by_chunks(hidden, weight, bias, targets, rows),
    ):
        parts = {"logprobs": (weights * logprobs).sum(), "entropy": (weights.flip(0) ** 2 * entropy).sum()}
        loss = sum(parts.values()) if which == "both" else parts[which]
        found.append((logprobs, entropy, torch.autograd.grad(loss, (hidden, weight, bias))))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-12)


def test_numerical_gradients():
    hidden, weight, bias, targets = make()
    assert torch.autograd.gradcheck(lambda *x: by_chunks(*x, targets, 4), (hidden, weight, bias))


def test_frozen_parameters_do_not_get_a_gradient():
    hidden, weight, bias, targets = make()
    weight.requires_grad_(False)
    by_chunks(hidden, weight, bias, targets, 4)[0].sum().backward()
    assert weight.grad is None
    assert bias.grad is not None


def test_without_tokens():
    hidden, weight, bias, targets = make()
    logprobs, entropy = by_chunks(hidden[:0], weight, bias, targets[:0], 4)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert (weight.grad == 0).all()


def test_it_is_differentiable_only_once():
    hidden, weight, bias, targets = make()
    (gradient,) = torch.autograd.grad(by_chunks(hidden, weight, bias, targets, 4)[0].sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_autocast_reaches_the_backward_pass():
    hidden, weight, _, targets = make(dtype=torch.float32)
    seen = []

    def logits(states):
        product = torch.nn.functional.linear(states, weight)
        seen.append(product.dtype)
        return product.float()

    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = logprobs_and_entropy(logits, [weight], hidden, targets, 5)
    logprobs.sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert logprobs.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("vocabulary", [38, 4096, 32_000, 151_936])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_is_small(vocabulary, device):
    rows = chunk_rows(vocabulary, torch.device(device))
    assert rows >= (64 if device == "cpu" else 500)
    assert rows * vocabulary <= max(2**20 if device == "cpu" else 2**27, 64 * vocabulary)


class LargestMemory(TorchDispatchMode):
    """Records the most bytes that the results of operations occupy at the same time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(results) if isinstance(x, torch.Tensor)):
            if storage.data_ptr() not in self.alive:
                self.alive.add(storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return results

    def free(self, address, size):
        self.alive.discard(address)
        self.now -= size


@pytest.mark.parametrize(("temperature", "most"), [(1.0, 10), (0.7, 14)])
def test_memory_of_a_chunk(temperature, most):
    """The number of logits in a GPU's chunk is chosen by their memory."""
    weight, targets = torch.randn(5000, 2, requires_grad=True), torch.zeros(200, dtype=torch.long)

    def logits(states):
        found = torch.nn.functional.linear(states, weight).float()
        return found if temperature == 1.0 else found / temperature

    sizes = []
    for n in (100, 200):
        hidden = torch.randn(n, 2, requires_grad=True)
        with LargestMemory() as memory, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logprobs, entropy = logprobs_and_entropy(logits, [weight], hidden, targets[:n], n)
            (logprobs.sum() + entropy.sum()).backward()
        sizes.append(memory.most)
    assert (sizes[1] - sizes[0]) / (100 * 5000) <= most + 0.1


def test_half_precision_gradients_are_summed_in_float32():
    """With half-precision weights, as under FSDP, many chunks are as accurate as one."""
    hidden, weight, _, targets = (x if x.dtype == torch.int64 else x.detach().bfloat16() for x in make())
    hidden, targets = hidden.repeat(30, 1), targets.repeat(30)
    found = []
    for rows in (1, len(hidden)):
        trained = weight.clone().requires_grad_()
        logits = lambda states, w=trained: (states @ w.T).float()  # noqa: E731
        logprobs, _ = logprobs_and_entropy(logits, [trained], hidden.clone().requires_grad_(), targets, rows)
        logprobs.sum().backward()
        assert trained.grad.dtype == torch.bfloat16
        found.append(trained.grad.float())
    assert (found[0] - found[1]).norm() < 0.005 * found[1].norm()
