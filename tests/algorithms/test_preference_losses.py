import math

import pytest
import torch

from lit_rlhf import IPO, Hinge, SimPO

DIFFERENCES = torch.tensor([-1.5, 0.0, 0.25, 3.0])


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (IPO(), lambda d, beta: (d / beta - 1 / (2 * beta)) ** 2),
        (Hinge(), lambda d, beta: max(0.0, 1 - d)),
        (SimPO(gamma=0.5), lambda d, beta: -math.log(1 / (1 + math.exp(-(d - 0.5))))),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_losses_are_their_equations(loss, by_hand):
    expected = [by_hand(d, 0.2) for d in DIFFERENCES.tolist()]
    assert loss(DIFFERENCES, 0.2).tolist() == pytest.approx(expected, rel=1e-5)


def test_ipo_pushes_the_log_ratios_1_over_2_beta_apart_and_no_further():
    difference = torch.tensor([0.5], requires_grad=True)  # a difference in log-ratios of 1 / 2β
    IPO()(difference, 0.1).backward()
    assert difference.grad.item() == 0


def test_the_hinge_loss_leaves_pairs_alone_whose_scores_differ_by_1():
    difference = torch.tensor([0.99, 1.01], requires_grad=True)
    Hinge()(difference, 0.1).sum().backward()
    assert difference.grad.tolist() == [-1, 0]


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_a_margin_out_of_range(gamma):
    with pytest.raises(ValueError, match=r"^loss\.gamma must be 0 or more"):
        SimPO(gamma=gamma)
