"""Dynamic sampling in real fits: which prompts are learned from, the order of the data, and what is measured."""

import math
from dataclasses import replace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from lit_rlhf import (
    TRPO,
    Ahead,
    Averaging,
    DynamicSampling,
    GroupNormalized,
    OnPolicyCallback,
    Sampling,
    TrustRegion,
    Update,
    UserError,
)
from lit_rlhf.modules.dynamic_sampling import choose, is_informative, join
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.testing import assert_exact_resume, tiny_ppo
from lit_rlhf.testing.runs import tiny_data, train

PROMPTS, BATCH, N = 48, 16, 2


def says_w3_w7_or_w9(responses):
    """Return 1 for few responses, so that most prompts have equal scores."""
    return [float(not {"w3", "w7", "w9"}.isdisjoint(response.split())) for response in responses]


def make(reward=says_w3_w7_or_w9, draws=3, **options):
    defaults = {"critic": None, "advantages": GroupNormalized(), "update": Update(epochs=1, minibatches=2)}
    return tiny_ppo([reward], dynamic_sampling=DynamicSampling(draws), **defaults | options)


class Watch(OnPolicyCallback):
    """Keeps what the hooks receive, and what the update learns from, for each iteration."""

    def __init__(self):
        self.drawn, self.scored, self.learned, self.metrics = [[]], [], [], []

    def on_fit_start(self, trainer, pl_module):
        learn = pl_module.learn

        def watched(experience, metrics):
            self.learned.append(experience)
            learn(experience, metrics)

        pl_module.learn = watched

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.drawn[-1].append(rollout)

    def on_rewards(self, trainer, pl_module, scored, trajectory):
        self.scored.append(scored)

    def on_update_end(self, trainer, pl_module, metrics):
        self.metrics.append(metrics)
        self.drawn.append([])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return what happened in a run of 5 iterations, which draws more than two epochs of the data."""
    watch, module = Watch(), make()
    module.iterations = 5
    train(module, tiny_data(module), [watch], folder=tmp_path_factory.mktemp("run"))
    return watch


def test_the_update_learns_from_the_first_informative_prompts(watched):
    """A loop over the prompts in the order in which they were drawn; every advantage is then different from 0."""
    for draws, scored, learned in zip(watched.drawn, watched.scored, watched.learned, strict=False):
        tokens, scores = scored.rollout.tokens, scored.scores.tolist()
        assert len(scores) == len(draws) * BATCH * N
        assert scored.rollout.group.tolist() == [row // N for row in range(len(scores))]
        chosen = []
        for prompt in range(len(scores) // N):
            rows = [prompt * N, prompt * N + 1]
            if scores[rows[0]] != scores[rows[1]] and len(chosen) < BATCH * N:
                chosen += rows
        width = learned.rollout.tokens.shape[1]
        assert torch.equal(learned.rollout.tokens, tokens[chosen, :width])
        assert learned.rollout.group.tolist() == [row // N for row in range(len(chosen))]
        assert (learned.advantages[learned.rollout.response_mask] != 0).all()


def test_it_draws_until_there_are_enough(watched):
    counts = [len(draws) for draws in watched.drawn[:-1]]
    assert counts == [metrics["dynamic_sampling/draws"] for metrics in watched.metrics]
    assert set(counts) == {2, 3}
    for draws, learned, metrics in zip(counts, watched.learned, watched.metrics, strict=True):
        prompts = len(learned.advantages) / N
        assert prompts == metrics["dynamic_sampling/prompts"]
        assert prompts == BATCH or draws == 3
        if prompts < BATCH:
            informative = 1 - metrics["dynamic_sampling/uninformative_fraction"]
            assert informative * draws * BATCH == pytest.approx(prompts)
    drawn = [sum(counts[: i + 1]) * BATCH * N for i in range(5)]
    assert drawn == [metrics["progress/responses"] for metrics in watched.metrics]


def test_no_batch_of_the_data_is_skipped_or_used_twice(watched):
    """The prompts are those of a plain loop over the epochs, whichever iteration draws them."""
    starts = [
        rollout.tokens[::N][:, : int(rollout.prompt_lengths.max())] * (
            torch.arange(int(rollout.prompt_lengths.max())) < rollout.prompt_lengths[::N, None]
        )
        for draws in watched.drawn
        for rollout in draws
    ]  # fmt: skip
    texts = [tuple(token for token in row if token) for start in starts for row in start.tolist()]
    epochs, rest = divmod(len(texts), PROMPTS)
    assert epochs >= 2
    by_epoch = [sorted(texts[i * PROMPTS : (i + 1) * PROMPTS]) for i in range(epochs)]
    assert all(epoch == by_epoch[0] for epoch in by_epoch)
    assert rest % BATCH == 0


def test_metrics_describe_all_responses(watched):
    for scored, metrics in zip(watched.scored, watched.metrics, strict=True):
        assert metrics["objective/score"] == pytest.approx(float(scored.scores.mean()))
        assert metrics["response/length"] == pytest.approx(float(scored.rollout.response_lengths.float().mean()))


def test_responses_of_different_draws_are_different(watched):
    """Each draw has random numbers of its own, although it has the same iteration and the same places."""
    first, second = watched.drawn[0][:2]
    width = min(first.response_mask.shape[1], second.response_mask.shape[1])
    one, two = (x.at_responses(x.tokens)[:, :width] for x in (first, second))
    assert not torch.equal(one, two)
    assert torch.equal(second.group, first.group + BATCH)


def test_a_resumed_run_ends_with_the_same_bits():
    """The checkpoint holds the position after the further draws, in the middle of an epoch of the data."""
    assert_exact_resume(lambda: make(averaging=Averaging(0.5)), iterations=4, at=2)


def nothing(responses):
    return [0.0 for _ in responses]


@pytest.mark.parametrize("options", [{}, {"critic": "actor"}], ids=["grpo", "ppo"])
def test_without_any_signal_a_few_prompts_remain(tmp_path, options):
    """As many as the minibatches need; with one draw, no further prompts are drawn."""
    options = {"update": Update(epochs=1, minibatches=3), **options}
    if "critic" in options:
        options["advantages"] = tiny_ppo().advantages
    watch, module = Watch(), make(nothing, draws=1, **options)
    module.iterations = 2
    train(module, tiny_data(module), [watch], folder=tmp_path)
    assert [len(learned.advantages) for learned in watch.learned] == [2 * N] * 2
    assert [metrics["dynamic_sampling/prompts"] for metrics in watch.metrics] == [2, 2]
    assert [metrics["dynamic_sampling/uninformative_fraction"] for metrics in watch.metrics] == [1, 1]
    assert [metrics["progress/responses"] for metrics in watch.metrics] == [BATCH * N, 2 * BATCH * N]
    assert all(math.isfinite(value) for name, value in watch.metrics[0].items() if name.startswith("policy/"))


def test_trpo(tmp_path):
    """TRPO's Fisher matrix uses every n-th of the prompts that are left."""
    options = {"region": TrustRegion(fisher_every=2, cg_iterations=2), "sampling": Sampling(max_tokens=8, responses=N)}
    watch, plain = Watch(), tiny_ppo()
    module = TRPO(
        plain.source, [RewardFunction(says_w3_w7_or_w9)], critic=None, advantages=GroupNormalized(), iterations=1,
        dynamic_sampling=DynamicSampling(2), **options,
    )  # fmt: skip
    train(module, tiny_data(module), [watch], folder=tmp_path)
    assert watch.learned[0].rollout.group.tolist() == [row // N for row in range(len(watch.learned[0].advantages))]
    assert watch.metrics[0]["dynamic_sampling/draws"] == 2


def test_ahead_with_one_draw(tmp_path):
    watch, module = Watch(), make(draws=1, engine=Ahead(lag=1, workers=0))
    module.iterations = 2
    train(module, tiny_data(module), [watch], folder=tmp_path)
    assert all(0 < metrics["dynamic_sampling/prompts"] < BATCH for metrics in watch.metrics)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_sampling\.max_draws must be 1 or more, not 0"):
        DynamicSampling(max_draws=0)
    with pytest.raises(UserError, match=r"model\.sampling\.responses is 1, but model\.dynamic_sampling compares"):
        make(sampling=Sampling(responses=1), advantages=tiny_ppo().advantages, critic="actor")
    with pytest.raises(UserError, match=r"max_draws must be 1 with Ahead, not 3"):
        make(engine=Ahead())
    module, data = make(), tiny_data(make())
    loader = data.train_dataloader

    class Other(lightning.LightningDataModule):
        def setup(self, stage):
            data.trainer = self.trainer
            data.setup(stage)

        def train_dataloader(self):
            return DataLoader([[batch] for batch in loader()], batch_size=None, collate_fn=lambda batch: batch[0])

    with pytest.raises(UserError, match=r"further prompts from the data module Prompts, not from DataLoader"):
        train(module, Other(), folder=tmp_path)


def test_informative_prompts_by_hand():
    scores = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.5, 0.5, -1.0, -1.0, -1.0])
    assert is_informative(scores, 3).tolist() == [False, True, False]
    informative = torch.tensor([False, True, False, True, True])
    assert choose(informative, at_least=1, at_most=2).tolist() == [False, True, False, True, False]
    assert choose(informative, at_least=1, at_most=5).tolist() == informative.tolist()
    assert choose(informative, at_least=4, at_most=4).tolist() == [True, True, False, True, True]


def test_joined_draws_keep_every_row(watched):
    """Draws of different widths, with different columns."""
    (scored, *_) = watched.scored
    rows = torch.arange(4)
    short = scored.rollout.select(scored.rollout.lengths.argsort()[:4])
    width = short.response_mask.shape[1]
    cut = {"old_logprobs", "entropy", "ref_logprobs"}
    inputs = replace(
        scored.reward_inputs, rollout=short, columns={"only": [1, 2, 3, 4]}, prompts="abcd", responses="efgh"
    )
    small = replace(
        scored,
        rollout=short,
        reward_inputs=inputs,
        rewards={name: x[rows] for name, x in scored.rewards.items()},
        scores=scored.scores[rows],
        shaped_scores=scored.shaped_scores[rows],
        **{name: getattr(scored, name)[rows, :width] for name in cut},
    )
    joined = join([small, scored])
    count = len(scored.scores)
    assert torch.equal(joined.rollout.tokens[4:], scored.rollout.tokens)
    assert torch.equal(joined.rollout.tokens[:4, : short.tokens.shape[1]], short.tokens)
    assert torch.equal(joined.rollout.response_mask[:4].sum(1), short.response_mask.sum(1))
    assert torch.equal(joined.scores, torch.cat([small.scores, scored.scores]))
    assert joined.values is None
    assert [*joined.reward_inputs.prompts][:4] == ["a", "b", "c", "d"]
    assert joined.reward_inputs.columns["only"] == [1, 2, 3, 4] + [None] * count
    assert all(len(column) == count + 4 for column in joined.reward_inputs.columns.values())
