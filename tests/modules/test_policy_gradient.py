import json
from copy import deepcopy

import lightning
import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE, MonteCarlo
from lit_rlhf.algorithms.group_baselines import GroupNormalized
from lit_rlhf.algorithms.kl import AdaptiveKL, FixedKL, ReferenceKL
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.algorithms.objectives import Clip, KLPenalty
from lit_rlhf.data import Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.modules import Update
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.rewards import RewardModel, ScoreShaping
from lit_rlhf.testing import Recorder, assert_learns, tiny_ppo


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


def sgd(parameters):
    """Return SGD with learning rate 1, whose step is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


ONE_STEP = Update(epochs=1, minibatches=1, max_tokens=64)


def test_ppo_learns():
    assert_learns(tiny_ppo(), by=0.4)


@pytest.mark.parametrize("critic", ["actor", "shared", "reward"])
def test_ratio_is_one_in_the_first_minibatch(make_module, fit, tiny_model, critic):
    """With one step per iteration, every minibatch is the first of its iteration."""
    options = {"rewards": [RewardModel(str(tiny_model("llama", task="score")))]} if critic == "reward" else {}
    recorder = Recorder()
    fit(make_module(critic=critic, update=ONE_STEP, actor_optimizer=adam(1e-2), **options), [recorder])
    assert len(recorder.metrics) == 6
    for metrics in recorder.metrics:
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
        assert metrics["policy/kl_to_old"] < 5e-11  # about half the mean squared log-ratio, so ratios below 1 count too
        assert metrics["policy/clip_fraction"] == 0
    assert recorder.metrics[-1]["objective/kl_to_ref"] != 0  # the actor has changed


@pytest.mark.parametrize("special", ["bos_is_eos", "pad_is_eos"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_architecture_and_tokenizer(make_module, fit, tiny_model, architecture, special):
    """Without learning, the engine's log-probabilities are used as the old ones, and all ratios are 1."""
    recorder = Recorder()
    options = {"actor": str(tiny_model(architecture, special=special)), "iterations": 2, "actor_optimizer": adam(0.0)}
    fit(make_module(sampling=Sampling(max_tokens=12, temperature=0.7), **options), [recorder])
    for metrics, outputs in zip(recorder.metrics, recorder.outputs, strict=True):
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
        assert outputs["scored_rollout"].old_logprobs is outputs["scored_rollout"].rollout.rollout_logprobs
        assert metrics["value/loss"] > 0


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"critic": "shared"}, "32-true"),
        ({"reference_kl": ReferenceKL(estimator="full")}, "32-true"),
        ({}, "bf16-mixed"),
    ],
    ids=["shared", "full KL", "bf16"],
)
def test_the_actor_recomputes_what_the_engine_cannot_provide(make_module, fit, options, precision):
    """The engine computes neither values nor the full KL, and in half precision it rounds differently."""
    recorder = Recorder()
    fit(make_module(iterations=1, actor_optimizer=adam(0.0), **options), [recorder], precision=precision)
    scored = recorder.outputs[0]["scored_rollout"]
    mask = scored.rollout.response_mask
    for recomputed, from_engine in (
        (scored.old_logprobs, scored.rollout.rollout_logprobs),
        (scored.entropy, scored.rollout.rollout_entropy),
    ):
        assert recomputed is not from_engine
        torch.testing.assert_close(
            recomputed[mask], from_engine[mask], rtol=0, atol=1e-5 if precision == "32-true" else 0.2
        )
    assert abs(recorder.metrics[0]["policy/ratio_max"] - 1) < 1e-5


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


@pytest.mark.parametrize(
    "aggregation", ["token", *(pytest.param(name, marks=pytest.mark.long) for name in ("sequence", "constant"))]
)
def test_micro_batches_do_not_change_the_result(make_module, fit, aggregation):
    """The engine's batch size does not change it either."""

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
    scored = recorder.outputs[-1]["scored_rollout"]
    rollout, mask = scored.rollout, scored.rollout.response_mask
    module.trainer = trainer
    rewards = module.reward(scored).rewards
    assert not rollout.terminated.all()
    assert rollout.terminated.any()
    for row in range(len(rewards)):
        n = int(rollout.response_lengths[row])
        expected = -coef * (scored.old_logprobs[row, :n] - scored.ref_logprobs[row, :n])
        expected[-1] += scored.scores[row] - (0.0 if rollout.terminated[row] else 0.5)
        torch.testing.assert_close(rewards[row, :n], expected)
        assert (rewards[row, n:] == 0).all()
    kl = masked_sum(scored.old_logprobs - scored.ref_logprobs, mask, 1).mean()
    assert recorder.metrics[-1]["objective/kl_to_ref"] == pytest.approx(float(kl), rel=1e-4)
    assert recorder.metrics[-1]["objective/reward"] == pytest.approx(float(rewards.sum(1).mean()), rel=1e-4)
    assert recorder.metrics[-1]["objective/score"] == pytest.approx(float(scored.scores.mean()), rel=1e-4)


def test_entropy_bonus_raises_entropy(make_module, fit):
    def final_entropy(coef):
        recorder = Recorder()
        update = Update(epochs=2, minibatches=2, entropy_coef=coef)
        fit(make_module(update=update, actor_optimizer=adam(3e-3)), [recorder])
        return recorder.metrics[-1]["objective/entropy"]

    assert final_entropy(1.0) > final_entropy(0.0) + 0.05


def test_early_stop_at_target_kl(make_module, fit):
    """Every minibatch after the first exceeds this target, so each iteration takes one step."""

    def steps(target_kl):
        update = Update(epochs=3, minibatches=2, target_kl=target_kl)
        return fit(make_module(update=update, iterations=2, actor_optimizer=adam(1e-2))).global_step

    assert steps(None) == 2 * 2 * 6  # two optimizers
    assert steps(1e-7) == 2 * 2 * 1


def test_bootstrap_is_the_critics_value_after_truncated_responses(make_module, fit):
    recorder = Recorder()
    module = make_module(bootstrap_truncated=True, advantages=GAE(lam=0.9), critic_optimizer=adam(1e-2), iterations=3)
    fit(module, [recorder])
    scored = recorder.outputs[-1]["scored_rollout"]
    terminated = scored.rollout.terminated
    assert (scored.bootstrap[terminated] == 0).all()
    assert (scored.bootstrap[~terminated] != 0).all()
    assert (~terminated).any()


def test_whitening(make_module, fit, prompt_file):
    recorder = Recorder()
    module = make_module(update=Update(epochs=1, minibatches=1, whiten_rewards=True), iterations=2)
    fit(module, [recorder])
    scored = recorder.outputs[-1]["scored_rollout"]
    mask = scored.rollout.response_mask
    advantages = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu"))).advantages[mask]
    assert advantages.mean().abs() < 1e-5
    assert advantages.var(unbiased=False) == pytest.approx(1.0, abs=1e-3)


def test_whitened_rewards_keep_their_mean(make_module, fit):
    recorder, update = Recorder(), Update(epochs=1, minibatches=1, whiten_rewards=True, whiten_advantages=False)
    module = make_module(update=update, iterations=1, critic=None, advantages=MonteCarlo())
    fit(module, [recorder], batch_size=24)
    scored = recorder.outputs[0]["scored_rollout"]
    mask, trajectory = scored.rollout.response_mask, module.reward(scored)
    rewards = trajectory.rewards[mask]
    assert rewards.mean() > 0.01
    scaled = (trajectory.rewards - rewards.mean()) / rewards.std(unbiased=False) + rewards.mean()
    advantages = module.estimate(scored, trajectory, Metrics(torch.device("cpu"))).advantages
    torch.testing.assert_close(advantages[:, 0], torch.where(mask, scaled, 0.0).sum(1), rtol=1e-3, atol=1e-4)


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


def test_schedules_step_once_per_iteration(make_module, fit):
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


def test_a_loss_that_is_not_finite_stops_before_the_step(make_module, fit, tiny_model):
    module = make_module(iterations=2, critic_optimizer=adam(float("inf")))
    with pytest.raises(UserError, match=r"value loss is nan.*stopped before the step"):
        fit(module)


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_module, fit):
    module = make_module(iterations=2)
    module.configure_model()
    before = [p.detach().clone() for p in module.actor.parameters()]
    next(module.actor.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"gradient norm is nan.*stopped before the step"):
        fit(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.actor.parameters(), strict=True))


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


class HeldOut(lightning.Callback):
    """Records the outputs of the validation steps."""

    def __init__(self):
        self.outputs = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.outputs.append(outputs)


def test_held_out_metrics_are_the_means_over_the_prompts(make_module, fit, prompt_file):
    module = make_module(iterations=2, actor_optimizer=adam(1e-2))
    trainer, held_out = fit(module, validation=True, limit_val_batches=0), HeldOut()
    trainer.limit_val_batches = 1.0
    trainer.callbacks.append(held_out)
    data = trainer.datamodule
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    scores, kl = (torch.cat([o[name] for o in held_out.outputs]) for name in ("scores", "kl_to_ref"))
    rollouts = [o["reward_inputs"].rollout for o in held_out.outputs]
    others = torch.cat([module.reference_answers[i][1] for i in range(len(rollouts))])
    truncated = torch.cat([~rollout.terminated for rollout in rollouts]).float()
    assert len(scores) == 48
    assert 0 < truncated.mean() < 0.9
    assert (scores == others).any()
    expected = {
        "val/score": scores.mean(),
        "val/score_std": scores.std(unbiased=False),
        "val/rewards/low_words": scores.mean(),
        "val/kl_to_ref": kl.mean(),
        "val/length": torch.cat([rollout.response_lengths for rollout in rollouts]).float().mean(),
        "val/truncated_fraction": truncated.mean(),
        "val/win_rate": ((scores > others).float() + 0.5 * (scores == others)).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
    data.sources["test"] = str(prompt_file)
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    assert tested == pytest.approx({k.replace("val/", "test/"): v for k, v in metrics.items()})
    module.actor.load_state_dict(module.reference.state_dict())  # the next test measures only the actor as it is now
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    assert (tested["test/win_rate"], tested["test/kl_to_ref"]) == pytest.approx((0.5, 0.0), abs=1e-4)


def test_the_references_scores_are_those_on_the_current_prompts(make_module, fit, prompt_file, tmp_path):
    """A test on other prompts does not reuse the reference's scores on the validation prompts of the fit before it."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(prompt_file.read_text().splitlines(keepends=True)[30:]))
    module = make_module(iterations=2, actor_optimizer=adam(1e-2))
    trainer = fit(module, validation=True, val_check_interval=1)
    after_fit = trainer.test(module, datamodule=Prompts(test=str(other)), verbose=False)[0]
    fresh = make_module()
    fresh.configure_model()
    fresh.load_state_dict(module.state_dict())
    alone = trainer.test(fresh, datamodule=Prompts(test=str(other)), verbose=False)[0]
    assert after_fit == pytest.approx(alone)


def test_each_validation_measures_the_current_actor(make_module, fit):
    module = make_module(iterations=3, actor_optimizer=adam(1e-2))
    trainer = fit(module, validation=True, val_check_interval=1)
    last = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    assert trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0] == pytest.approx(last, abs=1e-6)


def test_the_win_rate_against_itself_is_one_half(make_module, fit):
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
        ({"advantages": GroupNormalized(), "critic": None, "sampling": Sampling(max_tokens=4, responses=2),
          "reference_kl": ReferenceKL(estimator="full")}, "GroupNormalized changes the scale for each prompt"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(make_module, options, message):
    with pytest.raises(UserError, match=message):
        make_module(**options)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.9}])
def test_a_restricted_distribution_is_refused_in_training_only(make_module, fit, prompt_file, options):
    module = make_module(sampling=Sampling(max_tokens=4, **options), iterations=1)
    (name,) = options
    with pytest.raises(UserError, match=rf"^model.sampling.{name} is .* training needs responses from the whole"):
        fit(module)
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    assert len(trainer.predict(module, datamodule=Prompts(predict=str(prompt_file)))) > 0


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


@pytest.mark.parametrize(
    ("aggregation", "estimator"), [("token", "k2"), ("sequence", "k3"), ("constant", "full"), ("token", "full")]
)
def test_the_step_is_the_gradient_of_the_loss(make_module, fit, tiny_model, aggregation, estimator):
    """The expected gradient is computed row by row, without padding, from the logits of the models."""
    recorder = Recorder()
    module = make_module(
        iterations=1,
        critic=str(tiny_model("llama", task="score")),
        reference=str(tiny_model("llama", seed=1)),
        sampling=Sampling(max_tokens=12, temperature=0.7),
        kl=FixedKL(0.3),
        reference_kl=ReferenceKL("loss", estimator),
        update=Update(
            epochs=1, minibatches=1, max_tokens=64, aggregation=aggregation,
            entropy_coef=0.2, value_coef=0.5, clip_grad_norm=None,
        ),
        actor_optimizer=sgd,
        critic_optimizer=sgd,
    )  # fmt: skip
    module.configure_model()
    actor, critic, reference = deepcopy((module.actor.model, module.critic, module.reference.model))
    fit(module, [recorder])
    scored = recorder.outputs[0]["scored_rollout"]
    learned = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu")))
    rows, tokens = len(scored.scores), int(scored.rollout.response_lengths.sum())
    for row, (prompt, n) in enumerate(
        zip(scored.rollout.prompt_lengths.tolist(), scored.rollout.response_lengths.tolist(), strict=True)
    ):
        text, states = scored.rollout.tokens[row : row + 1, : prompt + n], slice(prompt - 1, prompt + n - 1)
        vocab_logprobs, ref_vocab_logprobs = (
            torch.log_softmax(model(input_ids=text).logits[0, states] / 0.7, -1) for model in (actor, reference)
        )
        logprobs, ref_logprobs = (
            x.gather(1, text[0, prompt:, None]).squeeze(1) for x in (vocab_logprobs, ref_vocab_logprobs.detach())
        )
        r = ref_logprobs - logprobs
        kl = {
            "k2": r**2 / 2,
            "k3": r.exp() - 1 - r,
            "full": (vocab_logprobs.exp() * (vocab_logprobs - ref_vocab_logprobs.detach())).sum(-1),
        }
        values = critic(text)[0, states]
        torch.testing.assert_close(scored.values[row, :n], values.detach(), rtol=1e-4, atol=1e-4)
        weight = {"token": 1 / tokens, "sequence": 1 / (rows * n), "constant": 1 / (rows * 12)}[aggregation]
        ratio, entropy = (logprobs - logprobs.detach()).exp(), -(vocab_logprobs.exp() * vocab_logprobs).sum(-1)
        policy = -learned.advantages[row, :n] * ratio - 0.2 * entropy + 0.3 * kl[estimator]
        (weight * (policy + 0.5 * 0.5 * (values - learned.returns[row, :n]) ** 2).sum()).backward()
    for before, after in ((actor, module.actor.model), (critic, module.critic)):
        for start, end in zip(before.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(start - end, start.grad, rtol=1e-3, atol=1e-5)


def test_values_are_taken_before_each_token_and_the_bootstrap_after_the_last(make_module, fit, tiny_model):
    recorder = Recorder()
    module = make_module(
        iterations=1,
        critic=str(tiny_model("llama", task="score")),
        critic_optimizer=adam(0.0),
        bootstrap_truncated=True,
    )
    fit(module, [recorder], batch_size=24)
    scored = recorder.outputs[0]["scored_rollout"]
    rollout = scored.rollout
    assert 0 < rollout.terminated.sum() < len(rollout.terminated)
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        values = module.critic(rollout.tokens[row : row + 1, :end])[0]
        torch.testing.assert_close(scored.values[row, : end - start], values[start - 1 : -1], rtol=1e-4, atol=1e-4)
        after = 0.0 if rollout.terminated[row] else float(values[-1])
        assert float(scored.bootstrap[row]) == pytest.approx(after, rel=1e-4, abs=1e-4)


@pytest.fixture
def two_steps(make_module, fit, tiny_model):
    """Return a function that runs one iteration with one or two steps; the second may be refused."""

    def run(epochs, **options):
        recorder = Recorder()
        module = make_module(
            iterations=1,
            critic=str(tiny_model("llama", task="score")),
            actor_optimizer=adam(1e-2),
            critic_optimizer=adam(1e-3),
            update=Update(epochs=epochs, minibatches=1, max_tokens=64, **options),
        )
        return module, recorder, fit(module, [recorder]).global_step

    return run


def test_the_metrics_of_a_second_step(two_steps):
    """They are the means of both steps: the first measures the old policy, the second the policy after the first."""
    module, recorder, _ = two_steps(1)
    once, twice = recorder.metrics[0], two_steps(2)[1].metrics[0]
    scored = recorder.outputs[0]["scored_rollout"]
    rollout, mask = scored.rollout, scored.rollout.response_mask
    learned = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu")))
    logprobs = rollout.at_responses(module.actor(rollout.tokens, rollout.response_tokens_mask).logprobs)[mask]
    log_ratio, advantages = logprobs - scored.old_logprobs[mask], learned.advantages[mask]
    ratio = log_ratio.exp()
    assert twice["policy/ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-3)
    values, old = rollout.before_responses(module.critic(rollout.tokens))[mask], scored.values[mask]
    near, returns = old + (values - old).clamp(-0.2, 0.2), learned.returns[mask]
    second = {
        "policy/kl_to_old": ratio - 1 - log_ratio,
        "policy/clip_fraction": (((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))).float(),
        "policy/loss": -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages),
        "value/clip_fraction": ((values - old).abs() > 0.2).float(),
        "value/loss": 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2),
    }
    for name, expected in second.items():
        assert 2 * twice[name] - once[name] == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-5), name
    assert 0.1 < float(second["policy/clip_fraction"].mean()) < 0.9
    assert 0.1 < float(second["value/clip_fraction"].mean()) < 0.9


def test_the_target_kl_is_a_mean_per_token(two_steps):
    kl = 2 * two_steps(2)[1].metrics[0]["policy/kl_to_old"]  # the KL at the second step; at the first it is 0
    assert [two_steps(2, target_kl=factor * kl)[2] for factor in (0.9, 1.1)] == [2, 4]  # two optimizers


def test_the_objective_follows_the_kl_from_the_old_policy_to_the_new(make_module, fit):
    recorder = Recorder()
    module = make_module(iterations=1, objective=KLPenalty(), actor_optimizer=adam(1e-2))
    fit(module, [recorder])
    scored = recorder.outputs[0]["scored_rollout"]
    rollout = scored.rollout
    logprobs = rollout.at_responses(module.actor(rollout.tokens, rollout.response_tokens_mask).logprobs)
    log_ratio = (logprobs - scored.old_logprobs)[rollout.response_mask]
    kl, swapped = (float((x.exp() - 1 - x).mean()) for x in (log_ratio, -log_ratio))
    assert recorder.metrics[0]["policy/kl_to_old_end"] == pytest.approx(kl, rel=1e-3)
    assert swapped != pytest.approx(kl, rel=1e-2)


def test_the_kl_coefficient_is_adapted_by_the_number_of_responses(make_module, fit):
    recorder = Recorder()
    module = make_module(iterations=4, kl=AdaptiveKL(coef=0.3, target=0.5, horizon=50), actor_optimizer=adam(1e-2))
    fit(module, [recorder])
    coef = 0.3
    for metrics in recorder.metrics:
        assert metrics["objective/kl_coef"] == pytest.approx(coef)
        error = min(max(metrics["objective/kl_to_ref"] / 0.5 - 1, -0.2), 0.2)
        coef *= 1 + error * 8 / 50
    assert module.kl.coef == pytest.approx(coef)


def rows_of(logprobs, mask):
    """Return each row's log-probabilities without padding, by which the row is recognised."""
    return [tuple(row[counts].tolist()) for row, counts in zip(logprobs, mask, strict=True)]


def test_each_epoch_has_its_own_minibatches_and_each_iteration_its_own_random_numbers(make_module, fit):
    steps, drawn, splits, recorder = [], [], [], Recorder()

    class RecordingClip(Clip):
        def __call__(self, *, old_logprobs, mask, **others):
            steps.append(rows_of(old_logprobs, mask))
            return super().__call__(old_logprobs=old_logprobs, mask=mask, **others)

    class RecordingEngine(NativeEngine):
        def generate(self, *args, stream, iteration):
            drawn.append(iteration)
            return super().generate(*args, stream=stream, iteration=iteration)

    update = Update(epochs=2, minibatches=2, max_tokens=10_000)  # one micro-batch per minibatch
    module = make_module(iterations=3, engine=RecordingEngine(), objective=RecordingClip(), update=update)
    fit(module, [recorder], batch_size=24)
    assert drawn == [0, 1, 2]
    assert len(steps) == 3 * 2 * 2
    for iteration, outputs in enumerate(recorder.outputs):
        scored = outputs["scored_rollout"]
        number = {row: i for i, row in enumerate(rows_of(scored.old_logprobs, scored.rollout.response_mask))}
        assert len(number) == 24
        splits += [frozenset(number[row] for row in step) for step in steps[4 * iteration : 4 * iteration + 4]]
    epochs = list(zip(splits[::2], splits[1::2], strict=True))
    assert all(len(one) == len(two) == 12 and one | two == set(range(24)) for one, two in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 3 * 2


def test_the_profiler_names_the_phases(make_module, fit):
    trainer = fit(make_module(iterations=2), profiler="simple")
    recorded = {name: len(times) for name, times in trainer.profiler.recorded_durations.items()}
    assert {phase: recorded[phase] for phase in ("generate", "judge", "update")} == dict.fromkeys(
        ("generate", "judge", "update"), 2
    )
    assert all(f"|  {phase} " in trainer.profiler.summary() for phase in ("generate", "judge", "update"))
