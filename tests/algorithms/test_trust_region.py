import math

import pytest
import torch

from lit_rlhf.algorithms.trust_region import (
    assign,
    conjugate_gradients,
    flatten,
    hessian_product,
    line_search,
    longest_step,
)


def positive_definite(size=12, seed=0, condition=1e3):
    """Return a random symmetric matrix with eigenvalues from 1 to the condition number."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.T


def test_assign_is_the_inverse_of_flatten():
    parameters = [torch.randn(2, 3), torch.randn(4), torch.randn(())]
    copies = [torch.zeros_like(p) for p in parameters]
    assign(copies, flatten(parameters))
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    with pytest.raises(ValueError, match="the vector has 3 elements, but the parameters have 11"):
        assign(copies, torch.zeros(3))


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_solve_a_known_system(seed):
    matrix, b = positive_definite(seed=seed), torch.randn(12, dtype=torch.float64)
    x = conjugate_gradients(lambda v: matrix @ v, b, iterations=60, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)


def test_conjugate_gradients_need_one_iteration_per_distinct_eigenvalue():
    calls = []

    def product(v):
        calls.append(v)
        return torch.tensor([2.0, 2.0, 5.0, 5.0, 9.0], dtype=torch.float64) * v

    x = conjugate_gradients(product, torch.ones(5, dtype=torch.float64), iterations=20)
    torch.testing.assert_close(x, torch.tensor([0.5, 0.5, 0.2, 0.2, 1 / 9], dtype=torch.float64))
    assert len(calls) == 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_conjugate_gradients_stop_at_a_residual_relative_to_the_right_hand_side(scale):
    calls, eigenvalues = [], torch.logspace(0, 3, 12, dtype=torch.float64)
    b = scale * torch.ones(12, dtype=torch.float64)
    x = conjugate_gradients(lambda v: calls.append(v) or eigenvalues * v, b, iterations=20, tolerance=1e-2)
    assert 1e-4 < float((eigenvalues * x - b).square().sum() / b.square().sum()) <= 1e-2
    assert 1 < len(calls) < 12


def test_autocast_does_not_round_the_result():
    eigenvalues, b = torch.logspace(0, 2, 30), torch.linspace(-1, 2, 30)
    weights = torch.linspace(0.1, 1, 30).requires_grad_()

    def compute():
        step = conjugate_gradients(lambda v: eigenvalues * v, b, iterations=10)
        step = longest_step(step, lambda v: eigenvalues * v, max_kl=0.01)
        return torch.cat([step, hessian_product((eigenvalues * weights**3).sum(), [weights], b)])

    expected = compute()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compute(), expected, rtol=0, atol=0)


def test_conjugate_gradients_by_hand():
    """The textbook example has the iterates x₁ = (1/4, 1/2) and x₂ = (1/11, 7/11)."""
    matrix, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64), torch.tensor([1.0, 2.0]).double()
    assert conjugate_gradients(lambda v: matrix @ v, b, iterations=1).tolist() == pytest.approx([0.25, 0.5])
    assert conjugate_gradients(lambda v: matrix @ v, b, iterations=2).tolist() == pytest.approx([1 / 11, 7 / 11])
    assert conjugate_gradients(lambda v: matrix @ v, 0 * b).tolist() == [0, 0]


def test_hessian_product_is_the_hessian_times_the_vector():
    x, y = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    y.requires_grad_()
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss(x, y):
        return (x[:3] * y).sum() ** 3 + torch.exp(x).sum() + x[3] * y[0] ** 2

    (xx, xy), (yx, yy) = torch.autograd.functional.hessian(loss, (x, y))
    hessian = torch.cat([torch.cat([xx, xy], 1), torch.cat([yx, yy], 1)])
    v = torch.randn(9, dtype=torch.float64)
    found = hessian_product(loss(x, y), [x, y, unused], v)
    torch.testing.assert_close(found[:7], hessian @ v[:7])
    assert found[7:].tolist() == [0, 0]


def test_longest_step_has_the_bounds_kl_to_second_order():
    matrix, x = positive_definite(), torch.randn(12, dtype=torch.float64)
    step = longest_step(x, lambda v: matrix @ v, max_kl=0.03)
    assert float(0.5 * step @ matrix @ step) == pytest.approx(0.03)
    assert float(step @ x / step.norm() / x.norm()) == pytest.approx(1.0)
    assert longest_step(0 * x, lambda v: matrix @ v, max_kl=0.03).abs().sum() == 0


@pytest.mark.parametrize(
    ("improves", "kl", "share"),
    [
        (lambda s: 1.0, lambda s: s**2, 0.25),  # the bound is 0.1
        (lambda s: 0.3 - s, lambda s: 0.0, 0.25),  # it improves only below 0.3
        (lambda s: 0.0, lambda s: 0.0, 0.0),  # an equal objective is not an improvement
        (lambda s: 1.0, lambda s: 0.1, 1.0),  # a KL equal to the bound is accepted
        (lambda s: 1.0, lambda s: 0.11, 0.0),
        (lambda s: float("nan") if s > 0.2 else 1.0, lambda s: 0.0, 0.125),
        (lambda s: 1.0, lambda s: float("nan") if s > 0.2 else 0.0, 0.125),
    ],
)
def test_line_search(improves, kl, share):
    assert line_search(lambda s: (improves(s), kl(s)), max_kl=0.1) == share


def test_line_search_gives_up():
    tried = []
    assert line_search(lambda s: tried.append(s) or (-1.0, 0.0), max_kl=0.1, backtracks=3, ratio=0.8) == 0.0
    assert tried == pytest.approx([1.0, 0.8, 0.64])
