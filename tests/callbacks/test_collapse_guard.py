"""The callback that warns of collapses or stops the run, in real fits and on rows of metrics."""

import csv
import functools

import preloaded
import pytest
import torch

from lit_rlhf import CollapseGuard, FixedKL, IterationCheckpoint, Reward, Sampling, UserError, default_callbacks
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.testing import Recorder, assert_exact_resume, tiny_ppo
from lit_rlhf.testing.runs import as_reward, tiny_data, train

pytestmark = pytest.mark.usefixtures("without_plans")
HEALTHY = {
    "objective/entropy": 2.0,
    "objective/score": 0.5,
    "objective/score_std": 0.1,
    "objective/kl_to_ref": 4.0,
    "response/length": 20.0,
    "response/truncated_fraction": 0.1,
}


def zeros(responses):
    return [0.0 for _ in responses]


def by_prompt(prompts, responses):
    return [float(len(prompt)) for prompt in prompts]


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def judge(guard, *changes, capsys):
    """Return the warnings of iterations that differ from a healthy one; the first iteration is healthy."""
    for iteration, change in enumerate(({}, *changes), start=1):
        metrics = HEALTHY | change | {"progress/iteration": float(iteration)}
        guard.on_update_end(FirstProcess, None, metrics)
    return warnings_in(capsys.readouterr().out)


class FirstProcess:
    """What the guard reads of a Trainer in order to warn."""

    is_global_zero = True


# ---------------------------------------------------------------------------- real runs


def test_a_dead_reward_is_warned_of_once(capsys, tmp_path):
    module = tiny_ppo([zeros], iterations=5)
    recorder = train(module, tiny_data(module), [CollapseGuard()], folder=tmp_path)
    assert warnings_in(capsys.readouterr().out) == [
        "warning: all scores are 0 in iterations 1 to 3; try the reward on some responses with make_reward_inputs, "
        "choose easier or harder prompts, or use model.dynamic_sampling (collapse.equal_scores)"
    ]
    assert recorder.metrics[0]["objective/score_std"] == 0
    assert recorder.metrics[0]["objective/uninformative_fraction"] == 1


def test_scores_that_depend_on_the_prompt_alone(capsys, tmp_path):
    module = tiny_ppo([by_prompt], iterations=2)
    recorder = train(module, tiny_data(module), [CollapseGuard(iterations=2)], folder=tmp_path)
    (line,) = warnings_in(capsys.readouterr().out)
    assert line.startswith("warning: all responses to a prompt have the same score, for every prompt in iterations 1")
    assert recorder.metrics[0]["objective/score_std"] > 0


def test_a_healthy_run_is_silent(capsys, tmp_path):
    module = tiny_ppo(iterations=6, sampling=Sampling(max_tokens=16, responses=2), kl=FixedKL(0.02))
    train(module, tiny_data(module), [CollapseGuard(iterations=1)], folder=tmp_path)
    assert warnings_in(capsys.readouterr().out) == []


def test_a_policy_that_runs_away(capsys, tmp_path):
    """Its learning rate is 100 times that of the healthy run."""
    module = tiny_ppo(iterations=8, actor_optimizer=functools.partial(torch.optim.AdamW, lr=0.1))
    train(module, tiny_data(module), [CollapseGuard(iterations=2)], folder=tmp_path)
    lines = warnings_in(capsys.readouterr().out)
    assert any(
        "the KL to the reference is " in line and "nats per token, above the bound 2 in" in line for line in lines
    )
    assert any(line.startswith("warning: the entropy fell from ") for line in lines)


def test_stop_ends_the_run_without_an_export(tmp_path, make_module, fit):
    recorder = Recorder()
    module = make_module(rewards=[as_reward(zeros)], iterations=5)
    callbacks = default_callbacks(CollapseGuard(iterations=2, action="stop"), IterationCheckpoint(every_n=5), recorder)
    with pytest.raises(UserError, match=r"^CollapseGuard: all scores are 0 in iterations 1 to 2; try the reward"):
        fit(module, callbacks, enable_progress_bar=True)
    assert len(recorder.metrics) == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert int(read_checkpoint(last)["state_dict"]["iteration"]) == 2
    assert not (tmp_path / "export").exists()
    callbacks = default_callbacks(CollapseGuard(iterations=2, action="stop"), IterationCheckpoint(every_n=5))
    with pytest.raises(UserError, match=r"^CollapseGuard: all scores are 0 in iterations 3 to 4"):
        fit(
            make_module(rewards=[as_reward(zeros)], iterations=5),
            callbacks,
            ckpt_path=str(last),
            enable_progress_bar=True,
        )


def test_from_the_command_line(tiny_model, tiny_prompts, tmp_path):
    """Without options it warns in one line; with ``stop`` the run ends with one line."""
    (tmp_path / "rewards.py").write_text("def zeros(responses): return [0.0 for _ in responses]\n")
    words = ["-m", "lit_rlhf.cli", "fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model())]
    words += ['--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "rewards.py:zeros"}}]']
    words += ["--model.iterations", "4", "--model.sampling.max_tokens", "4", "--data", "Prompts"]
    words += ["--data.train", str(tiny_prompts), "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    words += ["--report.at_end", "false"]
    warned = preloaded.run(*words, "--trainer.default_root_dir", "warned", cwd=tmp_path)
    assert warned.returncode == 0, warned.stderr
    assert len(warnings_in(warned.stdout)) == 1
    assert (tmp_path / "warned" / "export").exists()
    options = ["--collapse.action", "stop", "--collapse.iterations", "2", "--trainer.default_root_dir", "stopped"]
    stopped = preloaded.run(*words, *options, cwd=tmp_path)
    assert stopped.returncode == 1
    (line,) = [line for line in stopped.stderr.splitlines() if "error" in line]
    assert line.startswith("lit-rlhf: error: CollapseGuard: all scores are 0 in iterations 1 to 2; ")
    with (tmp_path / "stopped" / "metrics.csv").open() as file:
        assert [row["progress/iteration"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    assert not (tmp_path / "stopped" / "export").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_warns_in_the_same_iteration(capsys, at):
    """The checkpoint holds how long the condition has held; the resumed run warns where the whole one did."""
    assert_exact_resume(lambda: tiny_ppo([zeros]), callbacks=lambda: [CollapseGuard()], iterations=4, at=at)
    assert len(warnings_in(capsys.readouterr().out)) == 2


# ------------------------------------------------------------------------------ conditions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective/entropy": 0.49}, "the entropy fell from 2 to 0.49 nats per token in iteration 2; a lower"),
        ({"response/length": 4.0}, "the mean length of the responses fell from 20 to 4 tokens in iteration 2; look"),
        ({"response/truncated_fraction": 0.96}, "the truncated responses rose from 10% to 96% in iteration 2; look"),
        ({"objective/score_std": 1e-8}, "all scores are 0.5 in iteration 2; try the reward"),
        ({"objective/score_std": 0.0, "objective/score": 0.0}, "all scores are 0 in iteration 2; try the reward"),
        (
            {"objective/uninformative_fraction": 1.0},
            "all responses to a prompt have the same score, for every prompt in iteration 2; try",
        ),
        (
            {"objective/kl_to_ref": 41.0},
            "the KL to the reference is 2.05 nats per token, above the bound 2 in iteration 2; a higher",
        ),
    ],
)
def test_each_condition(change, said, capsys):
    (line,) = judge(CollapseGuard(iterations=1), change, change, capsys=capsys)
    assert line.startswith(f"warning: {said}")


@pytest.mark.parametrize(
    "change",
    [
        {"objective/entropy": 0.51},
        {"response/length": 5.1},
        {"response/truncated_fraction": 0.94},
        {"objective/score_std": 1e-5},
        {"objective/score_std": float("nan")},  # of a single response
        {"objective/score": 0.0, "objective/score_std": 1e-5},
        {"objective/uninformative_fraction": 0.99},
        {"objective/kl_to_ref": 39.0},
    ],
)
def test_just_not_a_collapse(change, capsys):
    assert judge(CollapseGuard(iterations=1), change, capsys=capsys) == []


def test_conditions_that_are_off(capsys):
    off = CollapseGuard(entropy=None, length=None, truncated=None, equal_scores=False, kl=None, iterations=1)
    worst = {"objective/entropy": 0.0, "response/length": 1.0, "response/truncated_fraction": 1.0}
    assert judge(off, worst | {"objective/score_std": 0.0, "objective/kl_to_ref": 1e3}, capsys=capsys) == []


def test_an_iteration_in_between_starts_the_count_again(capsys):
    low = {"objective/entropy": 0.1}
    guard = CollapseGuard()
    assert judge(guard, low, low, {}, low, low, capsys=capsys) == []
    assert guard.held == {"entropy": 2}


def test_truncated_responses_from_the_start_are_no_collapse(capsys):
    """Such as those of a task whose texts have no end."""
    guard = CollapseGuard(iterations=1)
    guard.first = {name: HEALTHY[name] for name in HEALTHY} | {"response/truncated_fraction": 0.6}
    assert judge(guard, {"response/truncated_fraction": 1.0}, capsys=capsys) == []


def test_without_a_reference_the_other_conditions_hold(make_module, fit, capsys):
    class Zero(Reward):
        def forward(self, reward_inputs):
            return reward_inputs.rollout.rollout_logprobs.new_zeros(len(reward_inputs.responses))

    fit(make_module(rewards=[Zero()], reference_kl=None, iterations=1), [CollapseGuard(iterations=1)])
    (line,) = warnings_in(capsys.readouterr().out)
    assert line.startswith("warning: all scores are 0 in iteration 1; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy": 1.0}, r"collapse\.entropy must be between 0 and 1, or null, not 1\.0"),
        ({"length": 0.0}, r"collapse\.length must be between 0 and 1, or null, not 0\.0"),
        ({"truncated": -0.5}, r"collapse\.truncated must be between 0 and 1, or null, not -0\.5"),
        ({"kl": float("nan")}, r"collapse\.kl must be positive or null, not nan"),
        ({"iterations": 0}, r"collapse\.iterations must be 1 or more, not 0"),
        ({"action": "end"}, r"collapse\.action must be warn or stop, not end"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CollapseGuard(**options)
