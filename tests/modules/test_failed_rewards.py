"""Rewards that fail in real fits: what the update learns from, what is measured, printed and written."""

import json
import math
import random
import re

import numpy as np
import preloaded
import pytest
import torch
from json_service import serving

from lit_rlhf import (
    TRPO,
    DynamicSampling,
    GroupNormalized,
    OnPolicyCallback,
    RemoteReward,
    Reward,
    RewardFunction,
    ScoreShaping,
    Update,
    UserError,
)
from lit_rlhf.callbacks import Samples
from lit_rlhf.rewards import ExactAnswer
from lit_rlhf.testing import assert_exact_resume, assert_same_on_ranks, tiny_ppo
from lit_rlhf.testing.runs import low_words, tiny_data, train

BATCH, N = 16, 2
NAN = math.nan


def fails_at_w3(responses):
    """Return the share of low words, and nothing for responses with the word w3."""
    return [NAN if "w3" in r.split() else score for r, score in zip(responses, low_words(responses), strict=True)]


def leave_out(function=fails_at_w3, **options):
    return RewardFunction(function, on_failure="leave_out", **options)


def ppo(*rewards, **options):
    return tiny_ppo(rewards or [leave_out()], **{"iterations": 2} | options)


def grpo(*rewards, **options):
    return ppo(*rewards, **{"critic": None, "advantages": GroupNormalized()} | options)


class Watch(OnPolicyCallback):
    """Keeps what the hooks receive, what the update learns from, and random numbers, for each iteration."""

    def __init__(self):
        self.scored, self.learned, self.metrics, self.validations, self.random = [], [], [], [], []

    def on_fit_start(self, trainer, pl_module):
        learn = pl_module.learn

        def watched(experience, metrics):
            self.learned.append(experience)
            learn(experience, metrics)

        pl_module.learn = watched

    def on_rewards(self, trainer, pl_module, scored, trajectory):
        self.scored.append(scored)

    def on_update_end(self, trainer, pl_module, metrics):
        self.metrics.append(metrics)
        self.random.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002

    def on_validation_batch_end(self, trainer, pl_module, outputs, *batch):
        self.validations.append(outputs)

    def on_validation_end(self, trainer, pl_module):
        self.held_out = {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(module, folder, **options):
    watch = Watch()
    return watch, train(module, tiny_data(module), [watch, Samples(count=99)], folder=folder, **options)


def by_prompt(scored):
    """Return the scores as a list for each prompt."""
    return scored.scores.view(-1, N).tolist()


def kept_rows(scored) -> list[int]:
    """Return the rows of the prompts whose responses all have a score."""
    failed = [any(map(math.isnan, scores)) for scores in by_prompt(scored)]
    return [row for row in range(len(scored.scores)) if not failed[row // N]]


def assert_equal_runs(one, other):
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    for found, expected in zip(one.metrics, other.metrics, strict=True):
        for name in found.keys() & expected.keys():
            assert found[name] == expected[name] or name.startswith(("time/", "perf/")), name


# ------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("make", [ppo, grpo])
def test_the_prompts_of_failed_responses_are_left_out(make, tmp_path, capsys):
    watch, _ = fit(make(), tmp_path)
    for scored, learned, metrics in zip(watch.scored, watch.learned, watch.metrics, strict=True):
        scores, rows = scored.scores.tolist(), kept_rows(scored)
        failed = [row for row, response in enumerate(scored.reward_inputs.responses) if "w3" in response.split()]
        assert [row for row, score in enumerate(scores) if math.isnan(score)] == failed
        assert 0 < len(failed) < BATCH * N - len(rows) < BATCH * N  # some prompts have one failed response
        width = learned.rollout.tokens.shape[1]
        assert torch.equal(learned.rollout.tokens, scored.rollout.tokens[rows, :width])
        assert learned.rollout.group.tolist() == [number // N for number in range(len(rows))]
        assert learned.advantages.isfinite().all()
        mean = np.nanmean(scores)
        assert metrics["objective/score"] == pytest.approx(mean, abs=1e-6)
        assert metrics["rewards/fails_at_w3"] == pytest.approx(mean, abs=1e-6)
        assert metrics["objective/reward"] == pytest.approx(mean, abs=1e-6)
        assert metrics["rewards/failed_fraction"] == len(failed) / (BATCH * N)
        lengths = scored.rollout.response_lengths.float().mean()
        assert metrics["response/length"] == pytest.approx(float(lengths), abs=1e-6)
        assert all(map(math.isfinite, metrics.values()))
    count = int(watch.scored[0].scores.isnan().sum())
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "left out" in text]
    assert re.fullmatch(
        rf"reward fails_at_w3: {count} of 32 responses left out in iteration 1: the reward function \S+:fails_at_w3 "
        r"returned nan for the response '.*w3.*'; later ones are only counted, in rewards/failed_fraction",
        line,
    )


def test_the_advantages_are_those_of_the_other_groups(tmp_path):
    watch, _ = fit(grpo(update=Update(epochs=1, minibatches=1, whiten_advantages=False)), tmp_path)
    for scored, learned in zip(watch.scored, watch.learned, strict=True):
        expected = [
            (score - np.mean(scores)) / (np.std(scores, ddof=1) + 1e-8)
            for scores in by_prompt(scored)
            if not np.isnan(scores).any()
            for score in scores
        ]
        np.testing.assert_allclose(learned.advantages[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_scores_are_normalised_by_the_others(tmp_path):
    module = ppo(scores=ScoreShaping(normalize=True), iterations=3)
    watch, _ = fit(module, tmp_path)
    scores = torch.cat([scored.scores for scored in watch.scored]).double()
    others = scores[~scores.isnan()].numpy()
    assert len(others) < len(scores)
    np.testing.assert_allclose(
        [float(module.scores.count), float(module.scores.mean), float(module.scores.squares)],
        [len(others), others.mean(), ((others - others.mean()) ** 2).sum()],
    )
    assert watch.scored[-1].shaped_scores.isnan().equal(watch.scored[-1].scores.isnan())


def test_without_a_failure_the_option_changes_nothing(tmp_path, capsys):
    options = {"scores": ScoreShaping(normalize=True)}
    _, one = fit(ppo(RewardFunction(low_words), **options), tmp_path / "one")
    _, other = fit(ppo(leave_out(low_words, timeout=60.0, retries=2), **options), tmp_path / "other")
    assert_equal_runs(one, other)
    assert [metrics.get("rewards/failed_fraction") for metrics in one.metrics] == [None, None]
    assert [metrics.get("rewards/failed_fraction") for metrics in other.metrics] == [0.0, 0.0]
    assert "left out" not in capsys.readouterr().out


def test_a_reward_that_is_only_measured(tmp_path, capsys):
    _, one = fit(ppo(RewardFunction(low_words)), tmp_path / "one")
    watch, other = fit(ppo(RewardFunction(low_words), leave_out(weight=0.0)), tmp_path / "other")
    assert_equal_runs(one, other)
    for scored, metrics in zip(watch.scored, watch.metrics, strict=True):
        values = scored.rewards["fails_at_w3"]
        assert metrics["rewards/fails_at_w3"] == pytest.approx(float(values.nanmean()))
        assert metrics["rewards/failed_fraction"] == pytest.approx(float(values.isnan().float().mean()))
    assert capsys.readouterr().out.count("reward fails_at_w3: ") == 1


def test_trpo(tmp_path):
    plain = tiny_ppo()
    module = TRPO(
        plain.source, [leave_out()], sampling=plain.sampling, iterations=1, update=Update(epochs=1, minibatches=2)
    )
    watch, _ = fit(module, tmp_path)
    assert len(watch.learned[0].advantages) == len(kept_rows(watch.scored[0])) < BATCH * N
    assert all(map(math.isfinite, watch.metrics[0].values()))


def test_dynamic_sampling_replaces_failed_prompts(tmp_path):
    """A prompt with a failed response is not informative, and is not even used where informative ones are missing."""
    watch, _ = fit(grpo(dynamic_sampling=DynamicSampling(3)), tmp_path / "some")
    for scored, learned, metrics in zip(watch.scored, watch.learned, watch.metrics, strict=True):
        usable = [p for p, s in enumerate(by_prompt(scored)) if not np.isnan(s).any()]
        informative = [p for p in usable if len(set(by_prompt(scored)[p])) > 1][:BATCH]
        rows = [prompt * N + number for prompt in informative for number in range(N)]
        assert torch.equal(learned.rollout.tokens, scored.rollout.tokens[rows, : learned.rollout.tokens.shape[1]])
        assert metrics["dynamic_sampling/draws"] > 1
        even = sum(len(set(by_prompt(scored)[p])) == 1 for p in usable)
        assert metrics["dynamic_sampling/uninformative_fraction"] == pytest.approx(even / len(usable))

    def equal_or_failed(responses, number):
        return [NAN if n % 3 == 0 else 1.0 for n in number]

    options = {"update": Update(epochs=1, minibatches=3), "dynamic_sampling": DynamicSampling(1)}
    watch, _ = fit(grpo(leave_out(equal_or_failed), **options), tmp_path / "none")
    for scored, learned in zip(watch.scored, watch.learned, strict=True):
        first = [p for p, scores in enumerate(by_prompt(scored)) if not np.isnan(scores).any()][:2]
        rows = [prompt * N + number for prompt in first for number in range(N)]
        assert torch.equal(learned.rollout.tokens, scored.rollout.tokens[rows, : learned.rollout.tokens.shape[1]])


# ------------------------------------------------------------------ runs that stop


def raises(responses):
    raise RuntimeError("no model is loaded")


@pytest.mark.parametrize("options", [{}, {"dynamic_sampling": DynamicSampling(2)}], ids=["plain", "dynamic"])
def test_without_any_score_the_run_stops(options, tmp_path):
    with pytest.raises(UserError) as error:
        fit(grpo(leave_out(raises), **options), tmp_path)
    responses = BATCH * N * (2 if options else 1)
    assert re.fullmatch(
        rf"iteration 1 has 0 of {responses} responses left, and its update needs 2 or more "
        r"\(model\.update\.minibatches\): the reward function \S+:raises raised RuntimeError: no model is loaded "
        r"\(.*test_failed_rewards\.py, line \d+\)",
        str(error.value),
    )


def test_with_fewer_responses_than_minibatches_the_run_stops(tmp_path):
    def one(responses):
        return [1.0] * N + [NAN] * (len(responses) - N)

    _, run = fit(ppo(leave_out(one)), tmp_path / "enough")
    assert len(run.metrics) == 2
    with pytest.raises(UserError, match="has 2 of 32 responses left, and its update needs 3 or more"):
        fit(ppo(leave_out(one), update=Update(epochs=1, minibatches=3)), tmp_path / "fewer")


# ------------------------------------------------------------------ files, resuming, validation


def test_samples_are_strict_json(tmp_path):
    def no_constant(name):
        raise AssertionError(name)

    options = {"limit_val_batches": None, "val_check_interval": 1}
    fit(ppo(leave_out(), ExactAnswer("prompt")), tmp_path, **options)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=no_constant) for line in lines]
    for record in records:
        failed = "w3" in record["response"].split()
        assert (record["score"] is None) == (record["rewards"]["fails_at_w3"] is None) == failed
        assert record["rewards"]["ExactAnswer"] == 0.0
    assert {(r["stage"], r["score"] is None) for r in records} == {
        ("train", True), ("train", False), ("val", True), ("val", False),
    }  # fmt: skip
    assert any(r["reference"]["score"] is None for r in records if r["stage"] == "val")


LOW = {"w1", "w2", "w4", "w5", "w6"}


class LowFirstWord(Reward):
    """Says that the first word of a response is its answer; fails for w3."""

    def forward(self, reward_inputs):
        answers = self.extract_answers(reward_inputs)
        return torch.tensor([NAN if answer == "w3" else float(answer in LOW) for answer in answers])

    def extract_answers(self, reward_inputs):
        return [(response.split() or [None])[0] for response in reward_inputs.responses]


def test_held_out_metrics_are_those_of_the_other_responses(tmp_path):
    module = ppo(LowFirstWord(on_failure="leave_out"), iterations=1)
    watch, _ = fit(module, tmp_path, limit_val_batches=None, val_check_interval=1)
    scores = torch.cat([outputs["scores"] for outputs in watch.validations]).numpy()
    reference = torch.cat([outputs["reference"][1] for outputs in watch.validations]).numpy()
    metrics, failed = watch.held_out, np.isnan(scores)
    assert 0 < failed.sum() < len(scores)
    assert np.isnan(reference).any()
    assert metrics["val/rewards/failed_fraction"] == pytest.approx(failed.mean())
    assert metrics["val/score"] == pytest.approx(np.nanmean(scores))
    assert metrics["val/score_std"] == pytest.approx(np.nanstd(scores), abs=1e-6)
    assert metrics["val/reference_score"] == pytest.approx(np.nanmean(reference))
    both = ~failed & ~np.isnan(reference)
    wins = (scores > reference) + 0.5 * (scores == reference)
    assert metrics["val/win_rate"] == pytest.approx(wins[both].mean())
    assert metrics["val/win_rate_low"] < metrics["val/win_rate"] < metrics["val/win_rate_high"]
    prompts = [group for group in scores.reshape(-1, N) if not np.isnan(group).any()]
    assert metrics["val/pass_at_2"] == pytest.approx(np.mean([group.max() for group in prompts]))


def test_a_validation_without_any_score(tmp_path, capsys):
    """The run goes on."""

    def fails_in_validation(responses, trainer_state=None):
        calls.append(len(responses))
        return [NAN if len(calls) > 1 else 1.0] * len(responses)

    calls = []
    module = ppo(leave_out(fails_in_validation), iterations=1)
    watch, _ = fit(module, tmp_path, limit_val_batches=None, val_check_interval=1)
    metrics = watch.held_out
    assert "left out in the validation after iteration 1: " in capsys.readouterr().out
    assert metrics["val/rewards/failed_fraction"] == 1.0
    assert math.isnan(metrics["val/score"])
    assert math.isnan(metrics["val/score_std"])
    assert math.isfinite(metrics["val/kl_to_ref"])


def test_the_reference_is_judged_again_where_a_reward_failed(tmp_path):
    """The service fails in the first validation for some of the reference's responses, and works from then on."""

    def fails_at_first(responses):
        judged.append(responses)
        return fails_at_w3(responses) if len(judged) <= 2 else low_words(responses)

    judged = []  # in each validation, the actor's responses and then, if they must be judged, the reference's
    module = ppo(leave_out(fails_at_first), iterations=1, update=Update(epochs=1, minibatches=1))
    watch, _ = fit(module, tmp_path, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1)
    first, later = (outputs["reference"] for outputs in watch.validations)
    assert list(first[0]) == list(later[0])
    failed = first[1].isnan().view(-1, N).any(1).repeat_interleave(N)
    assert 0 < failed.sum() < len(failed)
    assert judged[-1] == [response for response, again in zip(first[0], failed.tolist(), strict=True) if again]
    assert later[1].tolist() == pytest.approx(low_words(later[0]))
    assert math.isfinite(watch.held_out["val/win_rate"])


def normalized():
    return tiny_ppo([leave_out()], scores=ScoreShaping(normalize=True))


def draws(responses):
    """Fail by chance, with the numbers of the global generators."""
    return [NAN if random.random() < 0.2 else float(torch.rand(())) for _ in responses]


@pytest.mark.parametrize("make", [normalized, lambda: grpo(leave_out(draws))], ids=["normalized", "random"])
def test_a_resumed_run_ends_with_the_same_bits(make):
    assert_exact_resume(make, iterations=3, at=1)


def test_a_service_that_fails_for_some_requests(tmp_path, capsys):
    def answer(body):
        failed = any("w3" in response.split() for response in body["responses"])
        return 503 if failed else {"scores": low_words(body["responses"])}

    with serving(answer) as service:
        reward = RemoteReward(service.url, batch_size=1, retries=1, connections=2, on_failure="leave_out")
        _, one = fit(ppo(reward), tmp_path / "service")
    _, other = fit(ppo(), tmp_path / "function")
    assert_equal_runs(one, other)
    assert "answered 503" in capsys.readouterr().out


# ------------------------------------------------------------------ global state


def low_words_and_more(responses):
    print("half a line", end="")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    return low_words(responses)


def test_a_reward_that_changes_global_state_changes_nothing(tmp_path):
    """The weights, the metrics, and the random numbers that others would draw."""
    one_watch, one = fit(ppo(RewardFunction(low_words)), tmp_path / "one", limit_val_batches=None)
    other_watch, other = fit(ppo(RewardFunction(low_words_and_more)), tmp_path / "other", limit_val_batches=None)
    assert_equal_runs(one, other)
    assert one_watch.random == other_watch.random


# ------------------------------------------------------------------ several processes


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else -1


def fails_on_the_last_process(responses, number):
    """Fail for prompts that only the second of two processes has in some iterations, and both have in others."""
    seen.append({n for n in number if n % 12 == 1})
    assert len(seen) > 1 or rank() < 1 or seen[0], "process 1 should fail in the first iteration"
    assert len(seen) > 1 or rank() != 0 or not seen[0], "process 0 should not fail in the first iteration"
    return [NAN if n % 12 == 1 else score for n, score in zip(number, low_words(responses), strict=True)]


seen: list[set[int]] = []


def on_ranks():
    update = Update(epochs=1, minibatches=2, whiten_advantages=False)
    return grpo(leave_out(fails_on_the_last_process), scores=ScoreShaping(normalize=True), update=update)


def dynamic_on_ranks():
    return grpo(leave_out(), dynamic_sampling=DynamicSampling(2))


@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        (on_ranks, "ddp"),
        pytest.param(dynamic_on_ranks, "ddp", marks=pytest.mark.long),
        pytest.param(on_ranks, "fsdp2", marks=pytest.mark.long),
    ],
)
def test_the_same_on_two_processes(make, strategy):
    assert_same_on_ranks(make, strategy=strategy)


SCRIPT = """
import torch
from lit_rlhf import RewardFunction, UserError
from lit_rlhf.testing import tiny_ppo
from lit_rlhf.testing.runs import low_words, tiny_data, train

def fails_on_process_1(responses):
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("no space left")
    return low_words(responses)

def fails(responses):
    raise RuntimeError("no space left")

for function in (fails_on_process_1, fails):
    module = tiny_ppo([RewardFunction(function, on_failure="leave_out")], iterations=2)
    try:
        run = train(module, tiny_data(module), folder="run", strategy="ddp", devices=2)
        print("fraction", [metrics["rewards/failed_fraction"] for metrics in run.metrics])
    except UserError as error:
        print("stopped:", error)
torch.distributed.destroy_process_group()
"""


def test_the_first_process_says_why_another_one_fails(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    first, second = preloaded.torchrun(2, str(tmp_path / "script.py"), cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    reason = r"the reward function \S+:fails\w* raised RuntimeError: no space left \(.*script.py, line \d+\)"
    told = rf"^reward fails_on_process_1: 16 of 32 responses left out in iteration 1: {reason}; "
    assert len(re.findall(told, first.stdout, re.M)) == 1
    assert "left out" not in second.stdout
    for done in (first, second):
        assert "fraction [0.5, 0.5]" in done.stdout
        assert re.search(rf"^stopped: iteration 1 has 0 of 32 responses left, .*: {reason}$", done.stdout, re.M)
