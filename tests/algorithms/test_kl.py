import math
from functools import partial

import pytest
import torch
from torch import nn

from lit_rlhf.algorithms.kl import AdaptiveKL, FixedKL, full_kl, k1, k2, k3

VOCABULARY = 9
NAN, INF = float("nan"), float("inf")
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def distributions(seed=0):
    """Return the logits of π (a leaf), log π and log π_ref over a small vocabulary."""
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = 1.5 * torch.randn(2, VOCABULARY, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), ref_logits.log_softmax(-1)


def exact_kl(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def expected_gradient(estimator):
    """Return the expectation over x ~ π of the gradient of the estimate at x with respect to π's logits."""
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
def test_unbiased(seed):
    _, logprobs, ref_logprobs = distributions(seed)
    exact = exact_kl(logprobs, ref_logprobs)
    assert full_kl(logprobs, ref_logprobs).item() == pytest.approx(exact, rel=1e-10)
    for estimator in (k1, k3):
        mean = (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum()
        assert mean.item() == pytest.approx(exact, rel=1e-10)


def test_k2_is_biased_but_accurate_for_similar_distributions():
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
    reverse = logprobs.exp().detach() - ref_logprobs.exp()  # the gradient of KL(π_ref ‖ π), which k3 has on average
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


def test_k3_of_similar_distributions_is_never_negative():
    r = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 1, 10000)
    for x in (r, r.double()):
        assert (k3(torch.zeros_like(x), x) >= 0).all()


@pytest.mark.parametrize("r", [-1e4, -50.0, -20.5, -3.0, 0.0, 3.0, 19.5, 20.5, 50.0, 1e4])
def test_k3_is_constant_above_20(r):
    """Above 20 the value is constant and the gradient 0; far below 0 both are those of −r − 1."""
    logprobs = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    value = k3(logprobs, torch.tensor(r, dtype=torch.float64))
    value.backward()
    bounded = min(r, 20.0)
    assert value.item() == pytest.approx(math.exp(bounded) - 1 - bounded)
    assert logprobs.grad.item() == pytest.approx(0.0 if r > 20 else 1 - math.exp(r))


def test_full_kl_by_hand():
    logits, ref = torch.tensor([[0.0, 0.0], [0.0, -INF], [-INF, 0.0]]), torch.tensor([0.0, math.log(3.0)])
    expected = torch.tensor([0.5 * math.log(2.0) + 0.5 * math.log(2 / 3), math.log(4.0), math.log(4 / 3)])
    torch.testing.assert_close(full_kl(logits, ref.expand(3, 2)), expected)
    torch.testing.assert_close(full_kl(logits + 5.0, ref.expand(3, 2) - 7.0), expected)  # not normalised
    assert full_kl(ref, torch.tensor([0.0, -INF])) == INF  # π takes a token that the reference never takes
    assert full_kl(torch.tensor([0.0, -INF]), torch.tensor([3.0, -INF])) == 0


def test_gradient_of_full_kl():
    logits, logprobs, ref_logprobs = distributions()
    (gradient,) = torch.autograd.grad(full_kl(logits, ref_logprobs), logits)
    p = logprobs.detach().exp()
    assert_same(gradient, p * (logprobs.detach() - ref_logprobs - exact_kl(logprobs, ref_logprobs)))
    never = torch.tensor([0.3, -INF, 1.0], requires_grad=True)
    full_kl(never, torch.zeros(3)).backward()
    assert torch.isfinite(never.grad).all()
    assert never.grad[1] == 0


def test_full_kl_to_itself_has_the_fisher_matrix_as_its_hessian():
    logits, logprobs, _ = distributions()
    p, logits = logprobs.detach().exp(), logits.detach()
    assert full_kl(logits, logits) == 0
    hessian = torch.autograd.functional.hessian(lambda moved: full_kl(moved, logits), logits)
    assert_same(hessian, torch.diag(p) - p[:, None] * p)


def test_the_fixed_coefficient():
    kl = FixedKL(coef=0.05)
    kl.update(100.0, 64)
    assert kl.coef == 0.05
    assert FixedKL(coef=0.0).coef == 0
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^kl\.coef must be 0 or more and finite, not {wrong}$"):
            FixedKL(coef=wrong)


@pytest.mark.parametrize(
    ("kl", "n", "coef"),
    [
        (6.0, 64, 0.2),
        (6.6, 64, 0.202),  # 10 % above: e = 0.1, a tenth of the horizon
        (5.4, 64, 0.198),
        (7.2, 64, 0.204),
        (12.0, 64, 0.204),  # e is at most 0.2
        (INF, 64, 0.204),
        (4.8, 64, 0.196),
        (0.0, 64, 0.196),
        (-100.0, 64, 0.196),  # a sampled KL may be negative
        (6.6, 320, 0.21),
        (12.0, 640, 0.24),
        (12.0, 10**6, 0.24),  # n is limited to the horizon
        (0.0, 10**6, 0.16),
        (12.0, 0, 0.2),
    ],
)
def test_adaptive_coefficient(kl, n, coef):
    controller = AdaptiveKL(coef=0.2, target=6.0, horizon=640)
    controller.update(kl, n)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


@pytest.mark.parametrize("kl", [0.0, -1e9, 1e9])
def test_adaptive_coefficient_stays_positive_and_finite(kl):
    controller = AdaptiveKL(coef=0.2, target=6.0, horizon=1)
    for _ in range(100):
        controller.update(kl, n=10**9)
    assert 0 < controller.coef < INF
    assert controller.coef == pytest.approx(0.2 * (1.2 if kl > 0 else 0.8) ** 100)


class Parent(nn.Module):
    def __init__(self, kl):
        super().__init__()
        self.layer, self.kl = nn.Linear(2, 2), kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adaptive_coefficient_is_in_the_checkpoint(dtype):
    coef = 1 / 3
    state = Parent(AdaptiveKL(coef=coef)).to(dtype).state_dict()
    parent = Parent(AdaptiveKL(target=2.0, horizon=1)).to(dtype)
    parent.load_state_dict(state)
    assert parent.kl.coef == coef
    assert isinstance(parent.kl.coef, float)
    assert parent.to(torch.bfloat16).kl.coef == coef
    parent.kl.update(1e9, n=1)
    assert parent.kl.coef == coef * 1.2


@pytest.mark.parametrize("field", ["coef", "target", "horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_adaptive_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^kl\.{field} must be positive and finite, not {value}$"):
        AdaptiveKL(**{field: value})
