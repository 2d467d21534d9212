"""Callbacks that measure a run: shares of the gradient, clipped steps, tokens per second and utilisation."""

import pytest

from lit_rlhf import SFT, Demonstrations, DynamicSampling, RewardFunction, Update
from lit_rlhf.callbacks import GradientShares, Throughput
from lit_rlhf.callbacks.throughput import phase_flops
from lit_rlhf.planning.speed import forward_flops, training_flops
from lit_rlhf.testing import Recorder, tiny_ppo


class Gradients(GradientShares):
    """Keeps the gradients of the critic's last step, by the parameters' names."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.found = {n: p.grad.clone() for n, p in pl_module.critic.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a recorder of two iterations with one step each, and the callbacks."""
    from lit_rlhf.testing.runs import tiny_data, train

    shares, throughput = Gradients(), Throughput(peak_tflops=0.5)
    module = tiny_ppo(iterations=2, update=Update(epochs=1, minibatches=1, max_tokens=1024, clip_grad_norm=0.5))
    recorder = train(module, tiny_data(module), [shares, throughput], folder=tmp_path_factory.mktemp("run"))
    return recorder, shares, throughput, module


def test_shares_of_the_squared_norm(run):
    recorder, shares, _, _ = run
    squares = {name: float(gradient.square().sum()) for name, gradient in shares.found.items()}
    groups = {"head": "head.", "embeddings": "embed", "layers": ".layers."}
    for group, part in groups.items():
        share = sum(x for name, x in squares.items() if part in name) / sum(squares.values())
        assert recorder.metrics[-1][f"value/grad_share_{group}"] == pytest.approx(share, rel=1e-4)
    for own in ("policy", "value"):
        found = {name: x for name, x in recorder.metrics[-1].items() if name.startswith(f"{own}/grad_share_")}
        assert set(found) >= {f"{own}/grad_share_{group}" for group in ("embeddings", "layers", "other")}
        assert sum(found.values()) == pytest.approx(1.0)


def test_the_share_of_clipped_steps(run):
    for metrics in run[0].metrics:
        for own in ("policy", "value"):
            assert metrics[f"{own}/grad_clipped_fraction"] == float(metrics[f"{own}/grad_norm"] > 0.5)
    assert run[0].metrics[0]["policy/grad_clipped_fraction"] == 1


def test_tokens_per_second_of_each_phase(run):
    recorder = run[0]
    rollout, metrics = recorder.outputs[-1]["scored_rollout"].rollout, recorder.metrics[-1]
    responses, both = int(rollout.response_mask.sum()), int(rollout.prompt_lengths.sum() + rollout.response_mask.sum())
    for phase, tokens in {"generate": responses, "judge": both, "update": both}.items():
        assert metrics[f"perf/{phase}_tokens_per_second"] * metrics[f"time/{phase}"] == pytest.approx(tokens, rel=1e-5)


def test_the_utilisation_is_that_of_the_plans_flops(run):
    """With 32 rows of the mean lengths: the update is one pass over the actor, the critic and their gradients.

    The prompts of half of the rows are computed with those of the others.
    """
    recorder, _, throughput, _ = run
    rollout, metrics = recorder.outputs[-1]["scored_rollout"].rollout, recorder.metrics[-1]
    prompt, response = (round(float(x.double().mean())) for x in (rollout.prompt_lengths, rollout.response_lengths))
    setting = throughput._setting
    trained = setting.trained()
    expected = sum(training_flops(role, 32, prompt + response, response, False) for role in trained)
    expected -= sum(training_flops(role, 16, prompt, 0, False) for role in trained)
    found = metrics["perf/update_utilisation"] * metrics["time/update"] * 0.5e12
    assert found == pytest.approx(expected, rel=1e-5)
    judging = [setting.role(name) for name in ("critic", "reference")]
    judges = sum(forward_flops(role, 32, prompt + response, response) for role in judging)
    judges -= sum(forward_flops(role, 16, prompt, 0) for role in judging)
    assert metrics["perf/judge_utilisation"] * metrics["time/judge"] * 0.5e12 == pytest.approx(judges, rel=1e-5)
    assert 0 < metrics["perf/generate_utilisation"] < 1
    assert set(phase_flops(setting, 32, 3.0, 8.0)) == {"generate", "judge", "update"}


def test_all_draws_of_dynamic_sampling_count(tmp_path):
    """The update counts the responses that it learns from, and the other phases those of both draws."""
    from lit_rlhf.testing.runs import tiny_data, train

    module = tiny_ppo([RewardFunction(one_of_many)], iterations=2, dynamic_sampling=DynamicSampling(max_draws=2))
    run = train(module, tiny_data(module), [Throughput()], folder=tmp_path)
    for outputs, metrics in zip(run.outputs, run.metrics, strict=True):
        rollout = outputs["scored_rollout"].rollout
        assert metrics["dynamic_sampling/draws"] == 2
        rows = int(metrics["dynamic_sampling/prompts"]) * module.sampling.responses
        assert rows < len(rollout.tokens)
        drawn = int(rollout.response_lengths.sum())
        assert metrics["perf/generate_tokens_per_second"] * metrics["time/generate"] == pytest.approx(drawn, rel=1e-5)
        learned = metrics["perf/update_tokens_per_second"] * metrics["time/update"]
        assert 0 < learned < metrics["perf/judge_tokens_per_second"] * metrics["time/judge"]
        assert learned <= rows * rollout.tokens.shape[1]


def one_of_many(responses):
    """Return 1 for a response with the word w3, else 0, so that the responses to many prompts have equal scores."""
    return [float("w3" in response.split()) for response in responses]


def test_without_a_peak_there_is_no_utilisation(make_module, fit):
    recorder = Recorder()
    fit(make_module(iterations=1), [Throughput(), recorder])
    names = {name for name in recorder.metrics[0] if name.startswith("perf/")}
    assert "perf/generate_tokens_per_second" in names
    assert not any("utilisation" in name for name in names)


def test_shares_in_supervised_training(tiny_model, make_trainer, tiny_demonstrations):
    """The groups are the user's own; one adds up what no other has."""
    recorder = Recorder()
    trainer = make_trainer([GradientShares({"attention": "self_attn"}), recorder])
    data = Demonstrations(train=str(tiny_demonstrations), batch_size=8)
    trainer.fit(SFT(actor=str(tiny_model()), iterations=1), datamodule=data)
    shares = [recorder.metrics[0][f"actor/grad_share_{group}"] for group in ("attention", "other")]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1.0)


def test_a_peak_that_is_not_positive():
    with pytest.raises(ValueError, match="peak_tflops must be positive or null, not 0"):
        Throughput(peak_tflops=0.0)
