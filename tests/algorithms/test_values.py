import pytest
import torch

from lit_rlhf.algorithms.values import value_loss


def random_case(seed=0, shape=(5, 7)):
    g = torch.Generator().manual_seed(seed)
    values, old_values, returns = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    return values.requires_grad_(), old_values, returns


def everywhere(x):
    return torch.ones_like(x, dtype=torch.bool)


def loss_by_definition(value, old, target, clip):
    plain = (value - target) ** 2
    if clip is None:
        return plain / 2
    near = min(max(value, old - clip), old + clip)
    return max(plain, (near - target) ** 2) / 2


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss"),
    [
        (2.0, 0.0, 3.0, None, 0.5),
        (2.0, 0.0, 3.0, 0.5, 3.125),  # moved further than the clip allows: the value 0.5 is used, ½ · 2.5²
        (-2.0, 0.0, -3.0, 0.5, 3.125),
        (2.0, 0.0, 0.0, 0.5, 2.0),  # moved away from the target: the value 2 is used
        (0.2, 0.0, 3.0, 0.5, 3.92),
    ],
)
def test_numbers_by_hand(value, old, target, clip, loss):
    values = [torch.tensor([[x]]) for x in (value, old, target)]
    assert value_loss(*values, everywhere(values[0]), clip=clip).item() == pytest.approx(loss)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_equals_a_loop(clip):
    case = random_case()
    for numbers in zip(
        value_loss(*case, everywhere(case[0]), clip).flatten(), *(x.flatten() for x in case), strict=True
    ):
        loss, *given = (x.item() for x in numbers)
        assert loss == pytest.approx(loss_by_definition(*given, clip))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradients(clip):
    values, old_values, returns = random_case()
    old_values.requires_grad_()
    returns.requires_grad_()
    loss = value_loss(values, old_values, returns, everywhere(values), clip)
    loss.sum().backward()
    assert old_values.grad is None
    assert returns.grad is None
    plain = (values - returns).detach()
    counts = torch.ones_like(plain, dtype=torch.bool) if clip is None else loss.detach() <= 0.5 * plain**2
    torch.testing.assert_close(values.grad, torch.where(counts, plain, 0.0))
    assert counts.all() == (clip is None)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(clip, garbage):
    mask, results = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6, []
    for outside in (0.0, garbage):
        values, old_values, returns = (torch.where(mask, x.detach(), outside) for x in random_case())
        loss = value_loss(values.requires_grad_(), old_values, returns, mask, clip)
        loss.sum().backward()
        results.append((loss.detach(), values.grad))
    for expected, spoilt in zip(*results, strict=True):
        assert torch.equal(spoilt, expected)
        assert (spoilt[~mask] == 0).all()


@pytest.mark.parametrize("clip", [0.0, -0.2])
def test_out_of_range(clip):
    with pytest.raises(ValueError, match=f"clip must be positive, not {clip}"):
        value_loss(*random_case(), torch.ones(5, 7, dtype=torch.bool), clip)


def test_another_shape_is_refused():
    values, old_values, returns = random_case()
    with pytest.raises(ValueError, match=r"shapes differ: values \[5, 7\], old_values \[5, 7\], returns \[5, 1\]"):
        value_loss(values, old_values, returns[:, :1], everywhere(values))
