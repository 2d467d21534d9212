import math

import pytest
import torch

from lit_rlhf.algorithms.kl import FixedKL, k1, k2, k3

VOCABULARY = 9


def distributions(seed=0):
    """The logits of π (a leaf), log π and log π_ref over a vocabulary that can be enumerated."""
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = 1.5 * torch.randn(2, VOCABULARY, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), ref_logits.log_softmax(-1)


def exact_kl(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def expected_gradient(estimator):
    """E over x ~ π of the gradient of the estimate at x, with respect to π's logits."""
    logits, logprobs, ref_logprobs = distributions()
    (logprobs.exp().detach() * estimator(logprobs, ref_logprobs)).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1, [0.5, -0.5]), (k2, [0.125, 0.125]), (k3, [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5])],
)
def test_numbers_by_hand(estimator, expected):
    assert estimator(torch.tensor([-1.0, -1.5]), torch.tensor([-1.5, -1.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased(estimator, seed):
    _, logprobs, ref_logprobs = distributions(seed)
    mean = (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum().item()
    assert mean == pytest.approx(exact_kl(logprobs, ref_logprobs))


def test_k2_is_biased_but_right_where_the_two_are_near():
    _, logprobs, far = distributions()
    near = (logprobs + 0.01 * far).log_softmax(-1)
    bias = [(logprobs.exp() * k2(logprobs, ref)).sum().item() / exact_kl(logprobs, ref) - 1 for ref in (near, far)]
    assert abs(bias[0]) < 0.02
    assert abs(bias[1]) > 0.1


def test_expected_gradients():
    logits, logprobs, ref_logprobs = distributions()
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    (gradient,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(expected_gradient(k1), torch.zeros_like(gradient))
    torch.testing.assert_close(expected_gradient(k2), gradient)
    reverse = logprobs.exp().detach() - ref_logprobs.exp()  # of KL(π_ref ‖ π): what k3's gradient is on average
    torch.testing.assert_close(expected_gradient(k3), reverse)


@pytest.mark.parametrize("r", [0.0, 1e-4, -1e-4, 3.0, -3.0, 50.0, -50.0, 1e4, -1e4])
def test_k3_is_never_negative_and_finite(r):
    logprobs = torch.tensor(-1.0, requires_grad=True)
    value = k3(logprobs, torch.tensor(-1.0 + r))
    value.backward()
    assert value >= 0
    assert (value == 0) == (r == 0)
    assert torch.isfinite(value)
    assert torch.isfinite(logprobs.grad)


def test_fixed_coefficient():
    kl = FixedKL(coef=0.05)
    kl.update(100.0, 64)
    assert kl.coef == 0.05
    assert FixedKL(coef=0.0).coef == 0
    with pytest.raises(ValueError, match=r"^coef must be 0 or more, not -0\.1$"):
        FixedKL(coef=-0.1)
