import json

import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE
from lit_rlhf.algorithms.kl import FixedKL
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.modules import Update
from lit_rlhf.modules.metrics import Means
from lit_rlhf.modules.update import ReferenceKL
from lit_rlhf.rewards import RewardModel, ScoreShaping
from lit_rlhf.testing import Recorder


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


ONE_STEP = Update(epochs=1, minibatches=1, max_tokens=64)


def test_ppo_learns(make_module, fit):
    recorder = Recorder()
    module = make_module(iterations=15, update=Update(epochs=4, minibatches=2), actor_optimizer=adam(3e-3))
    fit(module, [recorder], batch_size=24)
    scores = [m["objective/score"] for m in recorder.metrics]
    assert len(scores) == 15
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15


@pytest.mark.parametrize("critic", ["actor", "shared", "reward"])
def test_ratio_is_one_in_the_first_minibatch(make_module, fit, tiny_model, critic):
    """With one step an iteration, every ratio is that of a first minibatch."""
    options = {"rewards": [RewardModel(str(tiny_model("llama", task="score")))]} if critic == "reward" else {}
    recorder = Recorder()
    fit(make_module(critic=critic, update=ONE_STEP, actor_optimizer=adam(1e-2), **options), [recorder])
    assert len(recorder.metrics) == 6
    for metrics in recorder.metrics:
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
        assert metrics["policy/kl_to_old"] < 5e-11  # half the mean squared log-ratio: ratios below 1 count as well
        assert metrics["policy/clip_fraction"] == 0
    assert recorder.metrics[-1]["objective/kl_to_ref"] != 0  # it did learn


@pytest.mark.parametrize("special", ["bos_is_eos", "pad_is_eos"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_shape_and_tokenizer(make_module, fit, tiny_model, architecture, special):
    """Two steps an iteration: the engine's log-probabilities are the actor's own, the first ratios are 1."""
    recorder = Recorder()
    options = {"actor": str(tiny_model(architecture, special=special)), "iterations": 2, "actor_optimizer": adam(0.0)}
    fit(make_module(sampling=Sampling(max_tokens=12, temperature=0.7), **options), [recorder])
    for metrics, outputs in zip(recorder.metrics, recorder.outputs, strict=True):
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
        rollout, judged = outputs["judged"].rollout, outputs["judged"]
        difference = (rollout.rollout_logprobs - judged.old_logprobs)[rollout.response_mask]
        assert difference.abs().max() < 1e-4
        assert metrics["value/loss"] > 0


def test_nothing_moves_at_learning_rate_zero(make_module, fit):
    recorder = Recorder()
    module = make_module(iterations=3, actor_optimizer=adam(0.0), critic_optimizer=adam(0.0))
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items() if name != "iteration"}
    fit(module, [recorder])
    for name, value in before.items():
        assert torch.equal(value, recorder.weights[name]), name
    assert all(abs(m["policy/ratio_max"] - 1) < 1e-5 for m in recorder.metrics)
    assert all(abs(m["objective/kl_to_ref"]) < 1e-4 for m in recorder.metrics)


def test_same_seed_same_run(make_module, fit):
    def run():
        recorder = Recorder()
        fit(make_module(iterations=3), [recorder])
        return recorder

    one, two = run(), run()
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(("time/", "perf/"))} == {
            k: v for k, v in b.items() if not k.startswith(("time/", "perf/"))
        }
    assert all(torch.equal(one.weights[k], two.weights[k]) for k in one.weights)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_result(make_module, fit, aggregation):
    """Nor does the engine's batch size."""

    def run(max_tokens, rows):
        recorder = Recorder()
        update = Update(epochs=1, minibatches=2, max_tokens=max_tokens, aggregation=aggregation, entropy_coef=0.01)
        sgd = {name: lambda p: torch.optim.SGD(p, lr=0.1) for name in ("actor_optimizer", "critic_optimizer")}
        module = make_module(iterations=2, update=update, engine=NativeEngine(rows), **sgd)
        fit(module, [recorder])
        return recorder

    whole, parts = run(10_000, None), run(24, 2)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, atol=2e-6, rtol=1e-5, msg=name)


def test_frozen_models_are_not_in_the_state_and_not_trained(make_module, fit, tiny_model):
    recorder = Recorder()
    module = make_module(rewards=[RewardModel(str(tiny_model("llama", task="score")))], actor_optimizer=adam(1e-2))
    module.configure_model()
    before = [p.clone() for p in [*module.reference.parameters(), *module.scores.parameters()]]
    fit(module, [recorder])
    after = [*module.reference.parameters(), *module.scores.parameters()]
    assert before
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))
    assert {name.split(".")[0] for name in recorder.weights} == {"actor", "critic", "scores", "iteration"}
    assert not any(name.startswith("scores.rewards") for name in recorder.weights)
    assert not any(m.training for m in module.actor.modules())  # dropout is off


def test_rewards_are_score_on_the_last_token_minus_kl(make_module, fit):
    recorder = Recorder()
    coef = 0.3
    scores = ScoreShaping(truncation_penalty=0.5)
    module = make_module(kl=FixedKL(coef), scores=scores, iterations=3, actor_optimizer=adam(1e-2))
    trainer = fit(module, [recorder])
    judged = recorder.outputs[-1]["judged"]
    rollout, mask = judged.rollout, judged.rollout.response_mask
    module.trainer = trainer
    rewards = module.reward(judged).rewards
    assert not rollout.terminated.all()
    assert rollout.terminated.any()
    for row in range(len(rewards)):
        n = int(rollout.response_lengths[row])
        expected = -coef * (judged.old_logprobs[row, :n] - judged.ref_logprobs[row, :n])
        expected[-1] += judged.scores[row] - (0.0 if rollout.terminated[row] else 0.5)
        torch.testing.assert_close(rewards[row, :n], expected)
        assert (rewards[row, n:] == 0).all()
    kl = masked_sum(judged.old_logprobs - judged.ref_logprobs, mask, 1).mean()
    assert recorder.metrics[-1]["objective/kl_to_ref"] == pytest.approx(float(kl), rel=1e-4)
    assert recorder.metrics[-1]["objective/reward"] == pytest.approx(float(rewards.sum(1).mean()), rel=1e-4)
    assert recorder.metrics[-1]["objective/score"] == pytest.approx(float(judged.scores.mean()), rel=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_holds_the_policy_back(make_module, fit, estimator):
    def final_kl(coef):
        recorder = Recorder()
        module = make_module(
            kl=FixedKL(coef), reference_kl=ReferenceKL("loss", estimator), actor_optimizer=adam(3e-3), iterations=6
        )
        fit(module, [recorder], batch_size=24)
        judged = recorder.outputs[-1]["judged"]
        rewards = module.reward(judged).rewards
        assert ((rewards != 0).sum(1) <= 1).all()  # nothing of the KL is in the reward
        return recorder.metrics[-1]["objective/kl_to_ref"]

    assert final_kl(5.0) < 0.75 * final_kl(0.0)


def test_entropy_bonus_raises_entropy(make_module, fit):
    def final_entropy(coef):
        recorder = Recorder()
        update = Update(epochs=2, minibatches=2, entropy_coef=coef)
        fit(make_module(update=update, actor_optimizer=adam(3e-3)), [recorder])
        return recorder.metrics[-1]["objective/entropy"]

    assert final_entropy(1.0) > final_entropy(0.0) + 0.05


def test_early_stop_at_target_kl(make_module, fit):
    """Every minibatch after the first is over this target, so one step an iteration is taken."""

    def steps(target_kl):
        update = Update(epochs=3, minibatches=2, target_kl=target_kl)
        return fit(make_module(update=update, iterations=2, actor_optimizer=adam(1e-2))).global_step

    assert steps(None) == 2 * 2 * 6  # two optimizers
    assert steps(1e-7) == 2 * 2 * 1


def test_bootstrap_is_the_critics_value_after_truncated_responses(make_module, fit):
    recorder = Recorder()
    module = make_module(bootstrap_truncated=True, advantages=GAE(lam=0.9), critic_optimizer=adam(1e-2), iterations=3)
    fit(module, [recorder])
    judged = recorder.outputs[-1]["judged"]
    terminated = judged.rollout.terminated
    assert (judged.bootstrap[terminated] == 0).all()
    assert (judged.bootstrap[~terminated] != 0).all()
    assert (~terminated).any()


def test_whitening(make_module, fit, prompt_file):
    recorder = Recorder()
    module = make_module(update=Update(epochs=1, minibatches=1, whiten_rewards=True), iterations=2)
    fit(module, [recorder])
    judged = recorder.outputs[-1]["judged"]
    mask = judged.rollout.response_mask
    advantages = module.estimate(judged, module.reward(judged), Means()).advantages[mask]
    assert advantages.mean().abs() < 1e-5
    assert advantages.var(unbiased=False) == pytest.approx(1.0, abs=1e-3)


def test_gradient_norm_is_clipped(make_module, fit):
    """With plain SGD at learning rate 1 the step is as long as the clipped gradient."""
    norm = 1e-3
    module = make_module(
        iterations=1,
        update=Update(epochs=1, minibatches=1, clip_grad_norm=norm),
        actor_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        critic_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    module.configure_model()
    before = torch.cat([p.detach().flatten().clone() for p in module.actor.parameters()])
    recorder = Recorder()
    fit(module, [recorder])
    after = torch.cat([p.detach().flatten() for p in module.actor.parameters()])
    assert recorder.metrics[0]["policy/grad_norm"] > norm
    assert float((after - before).norm()) == pytest.approx(norm, rel=0.02)


def test_schedules_step_once_an_iteration(make_module, fit):
    recorder = Recorder()
    module = make_module(
        iterations=4,
        actor_optimizer=adam(1e-3),
        actor_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    )
    fit(module, [recorder])
    assert [m["policy/lr"] for m in recorder.metrics] == pytest.approx([1e-3, 5e-4, 1e-3 / 3, 2.5e-4])
    assert [m["value/lr"] for m in recorder.metrics] == pytest.approx([1e-3] * 4)


def test_no_critic(make_module, fit):
    recorder = Recorder()
    module = make_module(critic=None)
    fit(module, [recorder])
    assert module.critic is None
    assert "value/loss" not in recorder.metrics[-1]
    assert recorder.metrics[-1]["objective/kl_to_ref"] != 0


def test_a_score_that_is_not_finite_stops_before_the_step(make_module, fit, tiny_model):
    module = make_module(iterations=2, critic_optimizer=adam(float("inf")))
    with pytest.raises(UserError, match=r"value loss is nan.*stopped before the step"):
        fit(module)


def test_validation_scores_held_out_prompts(make_module, fit):
    recorder = Recorder()
    module = make_module(iterations=6, actor_optimizer=adam(3e-3))
    trainer = fit(module, [recorder], batch_size=24, validation=True, val_check_interval=1)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    assert metrics["val/win_rate"] > 0.55
    assert metrics["val/score"] > 0
    assert metrics["val/score_std"] > 0
    assert metrics["val/kl_to_ref"] > 0
    assert 0 < metrics["val/length"] <= 12
    again = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0]
    assert again == pytest.approx(metrics, abs=1e-6)  # the same random numbers each time


def test_against_itself_the_win_rate_is_a_half(make_module, fit):
    module = make_module(iterations=1, actor_optimizer=adam(0.0))
    trainer = fit(module, validation=True, val_check_interval=1)
    assert float(trainer.callback_metrics["val/win_rate"]) == 0.5
    assert float(trainer.callback_metrics["val/kl_to_ref"]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actor": ""}, "model.actor is not set"),
        ({"rewards": []}, "model.rewards is empty"),
        ({"sampling": Sampling(temperature=0)}, "temperature must be positive"),
        ({"critic": None, "bootstrap_truncated": True}, "needs a critic"),
        ({"iterations": 0}, "iterations must be 1 or more"),
    ],
)
def test_settings_that_do_not_fit_together(make_module, options, message):
    with pytest.raises(UserError, match=message):
        make_module(**options)


def test_critic_from_reward_needs_a_reward_model(make_module):
    with pytest.raises(UserError, match="no reward is a RewardModel"):
        make_module(critic="reward").configure_model()


def test_predictions_hold_the_columns(make_module, fit, prompt_file):
    module = make_module(iterations=1)
    trainer = fit(module)
    data = trainer.datamodule
    data.sources["predict"] = str(prompt_file)
    records = [record for batch in trainer.predict(module, datamodule=data) for record in batch]
    lines = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    assert [r["number"] for r in records] == [line["number"] for line in lines]
    assert all(set(r) == {"prompt", "response", "terminated", "number"} for r in records)
