import numpy as np
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import Reward, Scores, ScoreShaping, make_reward_inputs
from lit_rlhf.types import RewardInputs, Rollout


class Column(Reward):
    """A reward that returns the numbers of a column."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = name
        self.head = torch.nn.Linear(1, 1)

    @property
    def name(self) -> str:
        return self.column

    def forward(self, reward_inputs):
        return torch.tensor(reward_inputs.columns[self.column])


class Plain(Column):
    """A reward that returns the column unchanged."""

    def forward(self, reward_inputs):
        return reward_inputs.columns[self.column]


def reward_inputs(count, **columns) -> RewardInputs:
    rollout = Rollout(
        tokens=torch.zeros(count, 2, dtype=torch.long),
        prompt_lengths=torch.ones(count, dtype=torch.long),
        response_lengths=torch.ones(count, dtype=torch.long),
        rollout_logprobs=torch.zeros(count, 1),
        rollout_entropy=torch.zeros(count, 1),
        response_mask=torch.ones(count, 1, dtype=torch.bool),
        terminated=torch.ones(count, dtype=torch.bool),
        group=torch.arange(count),
    )
    return RewardInputs(prompts=["q"] * count, responses=["a"] * count, columns=columns, rollout=rollout)


def shape(scores, values, terminated=None):
    values = torch.as_tensor(values, dtype=torch.float32)
    ended = torch.ones(len(values), dtype=torch.bool) if terminated is None else torch.tensor(terminated)
    return scores.shape(values, ended, lambda x: x)


def batches(seed=0):
    """Return batches of different sizes with a drifting mean."""
    rng = np.random.default_rng(seed)
    return [rng.normal(100.0 + i, 1.0 + i, size).astype(np.float32) for i, size in enumerate((1, 5, 8, 3, 16))]


def test_the_score_is_the_weighted_sum_of_the_rewards():
    scores = Scores([Column("a", 0.5), Column("b", -2.0)], ScoreShaping())
    parts, total = scores.judge(reward_inputs(3, a=[1.0, 2.0, 3.0], b=[0.0, 1.0, -1.0]))
    assert {name: part.tolist() for name, part in parts.items()} == {"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, -1.0]}
    assert total.tolist() == [0.5, -1.0, 3.5]


def test_two_rewards_with_the_same_name_are_both_reported():
    scores = Scores([Column("a"), Column("a", 2.0)], ScoreShaping())
    parts, total = scores.judge(reward_inputs(1, a=[1.0]))
    assert len(parts) == 2
    assert "a" in parts
    assert total.tolist() == [3.0]


@pytest.mark.parametrize(
    ("values", "returned"),
    [
        (torch.zeros(2, 1), r"shape \(2, 1\)"),
        (torch.zeros(()), r"shape \(\)"),
        (torch.zeros(1), r"shape \(1,\)"),
        ([0.0, 1.0], "list"),
    ],
)
def test_a_reward_returns_one_number_per_response(values, returned):
    scores = Scores([Plain("length")], ScoreShaping())
    assert scores.judge(reward_inputs(2, length=torch.tensor([1.0, 2.0])))[1].tolist() == [1.0, 2.0]
    message = rf"^the reward length should return a tensor of 2 numbers, not {returned}$"
    with pytest.raises(UserError, match=message):
        scores.judge(reward_inputs(2, length=values))


def test_the_score_is_not_changed_by_default():
    assert shape(Scores([], ScoreShaping()), [1.0, -50.0], [True, False]).tolist() == [1.0, -50.0]


def test_normalisation_uses_all_scores_so_far():
    scores, so_far = Scores([], ScoreShaping(normalize=True)), np.array([])
    for batch in batches():
        so_far = np.concatenate([so_far, batch.astype(np.float64)])
        expected = (batch - so_far.mean()) / (so_far.std() + 1e-8)
        np.testing.assert_allclose(shape(scores, batch).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_normalisation_counts_the_scores_of_all_ranks():
    def reduce(x):
        return 2 * x  # another rank with the same scores

    scores = Scores([], ScoreShaping(normalize=True))
    for batch in batches():
        scores.shape(torch.from_numpy(batch), torch.ones(len(batch), dtype=torch.bool), reduce)
    every = np.concatenate(batches()).astype(np.float64)
    assert int(scores.count) == 2 * len(every)
    np.testing.assert_allclose(float(scores.mean), every.mean(), rtol=1e-9)
    np.testing.assert_allclose(float(scores.squares / scores.count), every.var(), rtol=1e-9)


def test_equal_scores_are_normalised_to_zero():
    scores = Scores([], ScoreShaping(normalize=True))
    assert shape(scores, [0.1, 0.1, 0.1]).abs().max() < 1e-3


@pytest.mark.parametrize("equal", [0.0, 0.1, 1e6 / 3])
def test_other_scores_beside_equal_ones_are_only_centred(equal):
    """The scores of the beginnings of responses, for example, are normalised by the statistics of the whole ones."""
    scores = Scores([], ScoreShaping(normalize=True))
    for _ in range(3):
        assert shape(scores, [equal] * 7).abs().max() < 0.1
    assert scores.scale(torch.tensor([equal - 2.0])).tolist() == pytest.approx([-2.0], abs=0.1)


def test_clip_then_truncation_penalty():
    scores = Scores([], ScoreShaping(clip=2.0, truncation_penalty=1.5))
    assert shape(scores, [5.0, 5.0, -5.0, -5.0, 1.0], [True, False, True, False, False]).tolist() == [
        2.0, 0.5, -2.0, -3.5, -0.5,
    ]  # fmt: skip


def test_normalisation_comes_before_the_clip():
    scores = Scores([], ScoreShaping(normalize=True, clip=1.0, truncation_penalty=10.0))
    batch = np.array([100.0, 101.0, 102.0, 130.0])
    expected = np.clip((batch - batch.mean()) / batch.std(), -1, 1) - [0, 0, 10, 0]
    np.testing.assert_allclose(shape(scores, batch, [True, True, False, True]), expected, rtol=1e-5)


def test_the_statistics_are_saved_in_the_state_and_continue_from_it():
    first, second = (Scores([Column("a")], ScoreShaping(normalize=True)) for _ in range(2))
    *before, last = batches()
    for batch in before:
        shape(first, batch)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert {"count", "mean", "squares"} <= state.keys()
    second.load_state_dict(state)
    assert torch.equal(shape(first, last), shape(second, last))
    assert not torch.equal(shape(Scores([], ScoreShaping(normalize=True)), last), shape(second, last))


def test_prepare_freezes_the_rewards():
    scores = Scores([Column("a")], ScoreShaping())
    scores.prepare(None)
    assert not any(parameter.requires_grad for parameter in scores.parameters())
    assert not scores.rewards[0].head.training


@pytest.mark.parametrize(
    ("options", "words"), [({"clip": 0.0}, "clip.*positive.*0"), ({"truncation_penalty": -1}, "penalty.*0 or more.*-1")]
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        ScoreShaping(**options)


def test_an_answer_for_each_response():
    class FirstAnswer(Column):
        def extract_answers(self, reward_inputs):
            return reward_inputs.responses[:1]

    scores, inputs = Scores([FirstAnswer("number")], ScoreShaping()), make_reward_inputs(["7", "8"], number=[1.0, 0.0])
    with pytest.raises(UserError, match="the reward number should extract 2 answers, not 1"):
        scores.check_answers(inputs, scores.judge(inputs)[0])
