"""Each assertion fails with numbers for a broken part, and passes for a right one (more of these: docs/testing.md)."""

import os
import random
import re

import pytest
import torch

from lit_rlhf import (
    DPO,
    GAE,
    AdvantageEstimator,
    Clip,
    CollapseGuard,
    Estimates,
    GradientShares,
    KLGuard,
    Objective,
    OnPolicyCallback,
    PolicyLoss,
    Reward,
    Throughput,
)
from lit_rlhf.algorithms.objectives import probability_ratio
from lit_rlhf.testing import assert_exact_resume, assert_gradient_matches, assert_learns, assert_same_on_ranks, tiny_ppo


class Count(Reward):
    """The number of times that a word occurs in the response, times a sign."""

    def __init__(self, word, sign=1.0):
        super().__init__()
        self.word, self.sign = word, sign

    def forward(self, inputs):
        return self.sign * torch.tensor([float(r.split().count(self.word)) for r in inputs.responses])


def numbers(message):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", message)]


# ------------------------------------------------------------------ learning


def test_a_reward_of_the_wrong_sign_does_not_reach_its_goal():
    """Its score rises all the same."""
    with pytest.raises(AssertionError, match=r"the goal fell by .* should rise by 0.1 or more") as error:
        assert_learns(tiny_ppo([Count("w5", sign=-1.0)]), by=0.1, goal=lambda r: r.split().count("w5"))
    assert "the mean score went from -0." in str(error.value)
    fell, _, start, end, score_before, score_after = numbers(str(error.value))
    assert start - end == pytest.approx(fell, abs=1e-3)
    assert score_after > score_before


def test_a_constant_reward():
    with pytest.raises(
        AssertionError, match=r"the score did not change, .* every score was 0.5, so there was nothing to learn"
    ):
        assert_learns(tiny_ppo([lambda responses: [0.5 for _ in responses]], iterations=2), by=0.1)


def test_a_reward_that_ignores_the_response():
    rng = random.Random(0)
    with pytest.raises(
        AssertionError, match=r"the score (rose|fell) by .* in the first 2 of 10 iterations, and 0.* last 2"
    ):
        assert_learns(tiny_ppo([lambda responses: [rng.random() for _ in responses]]), by=0.2)


def test_only_modules_that_sample_learn():
    with pytest.raises(TypeError, match="takes a module that samples responses, not DPO"):
        assert_learns(DPO(actor="some/model"), by=0.1)


# ------------------------------------------------------------------ resuming


class Tokens(OnPolicyCallback):
    """Counts tokens, and forgets them when the run is resumed."""

    def __init__(self):
        self.tokens = 0

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.tokens += int(rollout.response_lengths.sum())


class SavedTokens(Tokens):
    def state_dict(self):
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict):
        self.tokens = state_dict["tokens"]


class Harder(Reward):
    """Gives less in each iteration, and forgets the iteration when the run is resumed."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return torch.tensor([len(set(r.split())) / self.calls for r in inputs.responses])


def test_the_ready_made_callbacks_resume_exactly():
    """And those of a user that save what they keep."""
    made = []

    def callbacks():
        made.append(
            [KLGuard(bound=1e-6, iterations=4, action="warn"), GradientShares(), Throughput(1.0), SavedTokens()]
        )
        return made[-1]

    with pytest.warns(
        UserWarning, match="the KL to the reference was .* nats per response in iterations 2 to 5, above"
    ):
        assert_exact_resume(tiny_ppo, callbacks=callbacks, iterations=5, at=3)
    assert made[0][0].above == made[1][0].above
    assert made[0][-1].tokens == made[1][-1].tokens > 500


def test_a_callback_that_saves_nothing():
    with pytest.raises(
        AssertionError, match=r"after iteration 1 of 2, .* callback Tokens\['tokens'\] is \d+, not \d+$"
    ):
        assert_exact_resume(tiny_ppo, callbacks=lambda: [Tokens()], iterations=2, at=1)


def test_a_reward_that_forgets():
    with pytest.raises(AssertionError, match=r"iteration 2: rewards/Harder is [\d.]+, not [\d.]+; .*; and \d+ more$"):
        assert_exact_resume(lambda: tiny_ppo([Harder()]), iterations=2, at=1)


def test_the_place_of_the_checkpoint():
    with pytest.raises(ValueError, match="at must be between 1 and 3, not 4"):
        assert_exact_resume(tiny_ppo, iterations=4, at=4)


# ----------------------------------------------------------------- processes


def lengths_on_the_first(responses):
    """Return the numbers of letters, but 0 on all processes except the first."""
    return [len(response) * float(os.environ.get("RANK", "0") == "0") for response in responses]


def on_the_first():
    return tiny_ppo([lengths_on_the_first])


def no_module():
    raise RuntimeError("no model today")


def measuring():
    return [KLGuard(), CollapseGuard(), GradientShares(), Throughput(1.0)]


def test_the_ready_made_callbacks_on_two_processes():
    """With shards; the callbacks' metrics are compared, too."""
    assert_same_on_ranks(tiny_ppo, callbacks=measuring, strategy="fsdp2", iterations=1)


def test_a_reward_that_depends_on_the_process():
    with pytest.raises(AssertionError, match=r"rewards/lengths_on_the_first of iteration 1 is ([\d.]+), but") as error:
        assert_same_on_ranks(on_the_first, iterations=1)
    assert "on process 0 of 2" in str(error.value)
    alone, spread = re.search(r"is ([\d.]+), but ([\d.]+) on process 0", str(error.value)).groups()
    assert float(spread) == pytest.approx(float(alone) / 2, rel=0.2)


def test_a_process_that_fails():
    with pytest.raises(AssertionError, match=r"process . of . failed: RuntimeError: no model today \(.*, line \d+\)"):
        assert_same_on_ranks(no_module)


def test_functions_that_other_processes_cannot_import():
    with pytest.raises(ValueError, match=r"functions defined at the top level of a file, .* not .*<lambda>"):
        assert_same_on_ranks(lambda: tiny_ppo())


# ----------------------------------------------------------------- gradients


class Detached(Objective):
    """−ρₜ Aₜ, of which half of the gradient is missing."""

    def __call__(self, *, logprobs, old_logprobs, advantages, mask):
        ratio = probability_ratio(logprobs, old_logprobs, mask)
        loss = -0.5 * (ratio + ratio.detach()) * torch.where(mask, advantages, 0.0)
        return PolicyLoss(loss, ratio, torch.zeros_like(mask))


class Multiplied(Objective):
    """Multiplies by the mask; 0 × NaN is NaN."""

    def __call__(self, *, logprobs, old_logprobs, advantages, mask):
        return PolicyLoss(-logprobs * advantages * mask, torch.ones_like(logprobs), torch.zeros_like(mask))


class Unmasked(AdvantageEstimator):
    """Subtracts 1 everywhere."""

    def __call__(self, trajectory):
        advantages = torch.where(trajectory.mask, trajectory.rewards, 0.0) - 1.0
        return Estimates(advantages=advantages, returns=advantages)


class WholeMean(AdvantageEstimator):
    """Subtracts a mean over all places, padding included."""

    def __call__(self, trajectory):
        advantages = torch.where(trajectory.mask, trajectory.rewards - trajectory.rewards.mean(), 0.0)
        return Estimates(advantages=advantages, returns=advantages)


def test_gradients_are_compared_with_finite_differences():
    with pytest.raises(
        AssertionError, match=r"Detached: d loss\[\d, \d\] / d logprobs\[\d, \d\] is .* by autograd"
    ) as error:
        assert_gradient_matches(Detached())
    automatic, numeric = numbers(str(error.value))
    assert automatic == pytest.approx(numeric / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Multiplied(), r"Multiplied: nan in logprobs outside the mask changes loss\[1, 2\] from 0 to nan"),
        (WholeMean(), r"WholeMean: nan in rewards outside the mask changes advantages\[0, 0\] from -?\d.\d+ to nan"),
        (Unmasked(), r"Unmasked: advantages\[1, 2\], which is outside the mask, is -1, but should be 0"),
    ],
    ids=["objective", "estimator", "unmasked"],
)
def test_garbage_outside_the_mask(part, message):
    with pytest.raises(AssertionError, match=f"^{message}$"):
        assert_gradient_matches(part)


def test_a_gradient_that_is_nan_outside_the_mask():
    """Its value is right: the exponential is only dropped after it was taken."""

    def late(x, mask):
        return torch.where(mask, x.exp(), 0.0).sum()

    given = {"mask": torch.tensor([True, False])}
    with pytest.raises(AssertionError, match=r"changes the gradient with respect to input 0\[1\] from 0 to nan$"):
        assert_gradient_matches(late, torch.tensor([1.0, 2.0]), **given)
    assert_gradient_matches(lambda x, mask: late(torch.where(mask, x, 0.0), mask), torch.tensor([1.0, 2.0]), **given)


def test_holes_in_the_mask_and_empty_rows():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for part in (Clip(0.2, ratio="sequence"), GAE(lam=0.5)):
        assert_gradient_matches(part, mask=mask)


def test_tensors_belong_to_functions():
    for given in ((Clip(0.2), torch.ones(2)), (torch.exp,)):
        with pytest.raises(TypeError, match="takes tensors with a function, and none with any other part"):
            assert_gradient_matches(*given)
