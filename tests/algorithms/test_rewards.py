import pytest
import torch

from lit_rlhf.algorithms.rewards import token_rewards

NAN = float("nan")


def test_numbers_by_hand():
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    kl = torch.tensor([[1.0, NAN, 2.0, -1.0], [3.0, NAN, NAN, NAN]])
    rewards = token_rewards(torch.tensor([10.0, -10.0]), mask, kl, coef=0.5)
    assert rewards.tolist() == [[-0.5, 0.0, -1.0, 10.5], [-11.5, 0.0, 0.0, 0.0]]


def test_without_kl_the_score_is_on_the_last_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert token_rewards(torch.tensor([2.0, 3.0]), mask).tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 7, generator=g) < 0.5
    mask[torch.arange(6), torch.randint(7, (6,), generator=g)] = True
    scores, kl, potentials = torch.randn(6, generator=g), *torch.randn(2, 6, 7, generator=g)
    expected, shaped = torch.zeros(6, 7), torch.zeros(6, 7)
    for row in range(6):
        tokens = [t for t in range(7) if mask[row, t]]
        for t in tokens:
            expected[row, t] = -0.3 * kl[row, t]
        expected[row, tokens[-1]] += scores[row]
        for t, following in zip(tokens, [*tokens[1:], None], strict=True):
            shaped[row, t] = (0.0 if following is None else potentials[row, following]) - potentials[row, t]
    torch.testing.assert_close(token_rewards(scores, mask, kl, coef=0.3), expected)
    outside = potentials.masked_fill(~mask, NAN)
    torch.testing.assert_close(token_rewards(scores, mask, kl, 0.3, outside), expected + shaped)


def test_a_response_without_tokens_has_no_reward():
    mask = torch.tensor([[True, False], [False, False]])
    assert token_rewards(torch.tensor([1.0, 5.0]), mask).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert token_rewards(torch.tensor([1.0]), torch.ones(1, 0, dtype=torch.bool)).shape == (1, 0)


def test_the_rewards_of_a_response_sum_to_its_score_minus_its_kl():
    mask = torch.ones(3, 5, dtype=torch.bool)
    scores, kl = torch.randn(3), torch.randn(3, 5)
    torch.testing.assert_close(token_rewards(scores, mask, kl, coef=0.1).sum(1), scores - 0.1 * kl.sum(1))


@pytest.mark.parametrize(
    ("scores", "kl", "message"),
    [
        (torch.zeros(3), None, r"rows \[2\], scores \[3\]"),
        (torch.zeros(2, 1), None, r"rows \[2\], scores \[2, 1\]"),
        (torch.zeros(2), torch.zeros(2, 1), r"mask \[2, 4\], kl \[2, 1\]"),
    ],
)
def test_another_shape_is_refused(scores, kl, message):
    with pytest.raises(ValueError, match=message):
        token_rewards(scores, torch.ones(2, 4, dtype=torch.bool), kl, coef=1.0)
