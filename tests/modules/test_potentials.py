"""Potential-based shaping: tokens are rewarded for what they change in the score of the response so far."""

import functools
import itertools
import tempfile
from pathlib import Path

import lightning
import pytest
import torch

from lit_rlhf import GAE, FixedKL, GroupNormalized, PolicyGradient, RewardFunction, RewardModel, Sampling, ScoreShaping
from lit_rlhf.errors import UserError
from lit_rlhf.modules.potentials import first_tokens
from lit_rlhf.testing import Recorder, assert_exact_resume, assert_same_on_ranks, tiny_ppo
from lit_rlhf.testing.models import make_tiny_model
from lit_rlhf.testing.runs import low_words

EVERY = 3
STOP = [f"w{number}" for number in range(0, 32, 6)]  # responses then have different lengths


def options(**more):
    return {"scores": ScoreShaping(normalize=True, potential_every=EVERY), "kl": FixedKL(0.0), "iterations": 2} | more


@pytest.mark.parametrize("reward", ["function", "model"])
def test_the_rewards_are_differences_of_the_scores_of_beginnings(make_module, fit, tiny_model, reward):
    model = RewardModel(str(tiny_model("llama", task="score", seed=3)))
    more = {"rewards": [model]} if reward == "model" else {}
    recorder, module = Recorder(), make_module(**options(**more))
    fit(module, [recorder])
    scored = recorder.outputs[-1]["scored_rollout"]
    rollout, rewards = scored.rollout, module.reward(scored).rewards
    std = (module.scores.squares / module.scores.count).sqrt()
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)):
        scores = []
        for count in range(0, int(length), EVERY):
            if reward == "model":  # a truncated response is scored with the end token after it
                tokens = [*rollout.tokens[row, : start + count].tolist(), module.special_tokens.stop[0]]
                scores.append(float(model.model(torch.tensor([tokens]))[0, -1]))
            else:
                tokens = rollout.tokens[row, start : start + count]
                scores += low_words([module.tokenizer.decode(tokens, skip_special_tokens=True)])
        potentials = (torch.tensor(scores).double() - module.scores.mean) / (std + 1e-8)
        expected = torch.zeros(rewards.shape[1], dtype=torch.double)
        for number, (before, after) in enumerate(itertools.pairwise(potentials)):
            expected[EVERY * (number + 1) - 1] = after - before
        expected[int(length) - 1] = scored.shaped_scores[row] - potentials[-1]
        torch.testing.assert_close(rewards[row].double(), expected, atol=1e-5, rtol=1e-4)
    assert int(rollout.response_lengths.max()) > EVERY
    assert (scored.potentials[~scored.rollout.response_mask] == 0).all()


def test_responses_that_end_between_beginnings_are_not_scored_again(make_module, fit):
    recorder, scored_texts = Recorder(), []

    def reward(responses):
        scored_texts.extend(responses)
        return low_words(responses)

    module = make_module(
        **options(rewards=[RewardFunction(reward)], sampling=Sampling(max_tokens=7, stop=STOP), iterations=1)
    )
    fit(module, [recorder])
    scored = recorder.outputs[-1]["scored_rollout"]
    sums = module.reward(scored).rewards.sum(1)
    torch.testing.assert_close(sums, scored.shaped_scores - scored.potentials[:, 0], atol=1e-5, rtol=1e-4)
    whole = first_tokens(scored.rollout, 7, module.special_tokens.pad)
    assert torch.equal(whole.tokens, scored.rollout.tokens)
    assert torch.equal(whole.terminated, scored.rollout.terminated)
    lengths = scored.rollout.response_lengths
    assert len(lengths.unique()) > 2
    assert len(scored_texts) == len(lengths) + int((lengths.double() / EVERY).ceil().sum())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"advantages": GroupNormalized(), "critic": None, "sampling": Sampling(max_tokens=4, responses=2)},
         "model.scores.potential_every has no effect with GroupNormalized"),
        ({"bootstrap_truncated": True}, "cannot be combined with model.bootstrap_truncated"),
        ({"advantages": GAE(gamma=0.99)}, "only without a discount, but model.advantages.gamma is 0.99: set it to 1"),
        ({"rewards": [RewardFunction(low_words, on_failure="leave_out")]}, "combined with a reward with on_failure"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make_module, more, message):
    with pytest.raises(UserError, match=message):
        make_module(**options(**more))


def test_fewer_than_one_token_is_refused():
    with pytest.raises(ValueError, match=r"scores.potential_every must be 1 or more, or null, not 0"):
        ScoreShaping(potential_every=0)


def make() -> PolicyGradient:
    return tiny_ppo([RewardFunction(low_words)], advantages=GAE(lam=0.7), **options(iterations=3))


def test_resuming_is_exact():
    assert_exact_resume(make)


@functools.cache
def scorer() -> str:
    """Write a reward model, once per process."""
    return str(make_tiny_model(Path(tempfile.mkdtemp()), task="score", seed=3))


def make_scored() -> PolicyGradient:
    sampling = Sampling(max_tokens=24, stop=STOP)
    return tiny_ppo([RewardModel(scorer())], advantages=GAE(lam=0.7), **options(sampling=sampling))


class DifferentLengths(lightning.Callback):
    """Fails at the end of a run on several processes, unless they once had different numbers of beginnings."""

    def __init__(self) -> None:
        self.found = False

    def on_rewards(self, trainer, pl_module, scored, trajectory):
        count = -(-scored.rollout.response_mask.shape[1] // EVERY)
        most, fewest = pl_module.max_over_ranks(count, -count)
        self.found |= most > -fewest

    def on_train_end(self, trainer, pl_module):
        assert self.found or trainer.world_size == 1


def different_lengths() -> list[lightning.Callback]:
    return [DifferentLengths()]


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.long)])
def test_the_same_on_two_processes_whose_responses_have_different_lengths(strategy):
    """Each beginning is a call of the reward model, whose weights FSDP2 gathers on all processes."""
    assert_same_on_ranks(make_scored, callbacks=different_lengths, strategy=strategy, timeout=120)
