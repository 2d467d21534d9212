from copy import deepcopy

import pytest
import torch

from lit_rlhf.algorithms.group_baselines import LeaveOneOut
from lit_rlhf.algorithms.kl import ReferenceKL
from lit_rlhf.algorithms.trust_region import flatten, line_search
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import TRPO, TrustRegion, Update
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.testing import Recorder


@pytest.fixture
def make_trpo(tiny_model):
    def make(**options) -> TRPO:
        defaults = {
            "actor": str(tiny_model("llama")),
            "rewards": [RewardFunction("lit_rlhf.testing.runs:low_words")],
            "sampling": Sampling(max_tokens=12),
            "update": Update(epochs=2, minibatches=2, max_tokens=256),
            "critic_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        }
        return TRPO(**(defaults | options))

    return make


@pytest.mark.parametrize("max_kl", [pytest.param(0.003, marks=pytest.mark.long), 0.03])
def test_the_kl_after_the_step_stays_within_its_bound(make_trpo, fit, max_kl):
    recorder = Recorder()
    fit(make_trpo(iterations=4, region=TrustRegion(max_kl=max_kl, damping=0.01)), [recorder], batch_size=24)
    assert len(recorder.metrics) == 4
    for metrics in recorder.metrics:
        # within the bound, and not far below it
        assert 0.1 * max_kl < metrics["policy/kl_to_old"] <= max_kl * (1 + 1e-5)
        assert 0 < metrics["policy/step_share"] <= 1


def test_steps_that_break_the_bound_are_not_taken(make_trpo, fit):
    """Without damping and with one CG iteration, the proposed step is far too long: the line search must shorten it."""
    recorder = Recorder()
    region = TrustRegion(max_kl=0.5, cg_iterations=1, damping=0.0, backtracks=1)
    module = make_trpo(iterations=3, region=region, critic=None)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.actor.named_parameters()}
    fit(module, [recorder])
    refused = [m for m in recorder.metrics if m["policy/step_share"] == 0]
    assert all(m["policy/kl_to_old"] == pytest.approx(0, abs=1e-7) for m in refused)
    if len(refused) == 3:
        assert all(torch.equal(p, before[n]) for n, p in module.actor.named_parameters())
    assert all(m["policy/kl_to_old"] <= 0.5 for m in recorder.metrics)


def kl_after_the_step(module, rollout):
    """Return KL(π_old ‖ π) at each response token, summed over the vocabulary, from the logits of the models."""
    before, after = (
        torch.log_softmax(deepcopy(model.model).double()(input_ids=rollout.tokens).logits / model.temperature, -1)
        for model in (module.old, module.actor)
    )
    return rollout.before_responses((before.exp() * (before - after)).sum(-1)).detach()


@pytest.mark.parametrize(("fisher_every", "damping"), [(1, 0.0), (1, 1.0), (4, 1.0)])
def test_the_step_is_as_long_as_the_region_allows(make_trpo, fit, fisher_every, damping):
    """½ sᵀ (F + damping) s = δ, and ½ sᵀ F s is the KL over the prompts from which F is computed."""
    recorder, max_kl = Recorder(), 1e-4
    region = TrustRegion(max_kl=max_kl, damping=damping, fisher_every=fisher_every)
    module = make_trpo(iterations=1, region=region, critic=None, sampling=Sampling(max_tokens=12, temperature=0.7))
    fit(module, [recorder], batch_size=24)
    rollout, step_share = recorder.outputs[0]["scored_rollout"].rollout, recorder.metrics[0]["policy/step_share"]
    kl = kl_after_the_step(module, rollout)[rollout.response_mask & (rollout.group % fisher_every == 0)[:, None]]
    start, end = (flatten([p.detach() for p in model.parameters()]) for model in (module.old, module.actor))
    bound = float(kl.mean() + 0.5 * damping * (end - start).square().sum())
    assert step_share > 0
    assert bound == pytest.approx(step_share**2 * max_kl, rel=0.03)


def test_the_line_search_sees_the_kl_and_the_improvement_of_the_step(make_trpo, fit, monkeypatch):
    seen = []

    def watched(measure, *args):
        def record(step_share):
            seen.append(measure(step_share))
            return seen[-1]

        return line_search(record, *args)

    monkeypatch.setattr("lit_rlhf.modules.trpo.line_search", watched)
    recorder = Recorder()
    module = make_trpo(
        iterations=1, region=TrustRegion(max_kl=0.5), critic=None, update=Update(max_tokens=64, entropy_coef=0.1)
    )
    fit(module, [recorder], batch_size=24)
    scored = recorder.outputs[0]["scored_rollout"]
    rollout, mask = scored.rollout, scored.rollout.response_mask
    kl = float(kl_after_the_step(module, rollout)[mask].mean())
    assert recorder.metrics[0]["policy/kl_to_old"] == pytest.approx(kl, rel=1e-3)
    learned = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu")))
    stats = module.actor(rollout.tokens, rollout.response_tokens_mask)
    ratio = (rollout.at_responses(stats.logprobs) - scored.old_logprobs)[mask].exp()
    assert recorder.metrics[0]["policy/ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-3)
    better = (ratio - 1) * learned.advantages[mask] + 0.1 * (rollout.at_responses(stats.entropy) - scored.entropy)[mask]
    assert seen[-1] == pytest.approx((float(better.mean()), kl), rel=1e-3)


def test_a_refused_step_does_not_change_the_actor(make_trpo, fit, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.trpo.line_search", lambda measure, *args: 0.0 * measure(1.0)[1])
    recorder = Recorder()
    module = make_trpo(iterations=2, critic=None)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.actor.named_parameters()}
    fit(module, [recorder])
    assert all(torch.equal(p, before[n]) for n, p in module.actor.named_parameters())
    assert [m["policy/kl_to_old"] for m in recorder.metrics] == pytest.approx([0, 0], abs=1e-7)


def test_the_critics_step_is_proportional_to_its_coefficient(make_trpo, fit, tiny_model):
    steps = []
    for coef in (1.0, 0.25):
        module = make_trpo(
            iterations=1,
            critic=str(tiny_model("llama", task="score")),
            critic_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
            update=Update(epochs=1, minibatches=1, max_tokens=64, value_coef=coef, clip_grad_norm=None),
        )
        module.configure_model()
        before = flatten([p.detach() for p in module.critic.parameters()])
        fit(module)
        steps.append(flatten([p.detach() for p in module.critic.parameters()]) - before)
    assert steps[0].norm() > 1e-3
    torch.testing.assert_close(steps[1], 0.25 * steps[0], rtol=1e-3, atol=1e-5)


def test_the_step_does_not_depend_on_micro_batches(make_trpo, fit):
    weights = []
    for max_tokens in (40, 4096):
        recorder = Recorder()
        fit(make_trpo(iterations=1, critic=None, update=Update(max_tokens=max_tokens, entropy_coef=0.01)), [recorder])
        weights.append({k: v for k, v in recorder.weights.items() if k.startswith("actor.")})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_architecture(make_trpo, fit, tiny_model, architecture):
    recorder = Recorder()
    module = make_trpo(
        actor=str(tiny_model(architecture)),
        iterations=2,
        critic=None,
        advantages=LeaveOneOut(),
        sampling=Sampling(max_tokens=8, responses=2),
        reference_kl=ReferenceKL(where="loss", estimator="full"),
    )
    fit(module, [recorder])
    assert all(0 < m["policy/kl_to_old"] <= 0.01 * (1 + 1e-5) for m in recorder.metrics)
    assert "value/loss" not in recorder.metrics[-1]


def test_the_old_policy_is_not_in_checkpoints(make_trpo):
    module = make_trpo()
    module.configure_model()
    names = module.state_dict().keys()
    assert any(n.startswith("actor.") for n in names)
    assert not any(n.startswith(("old.", "reference.")) for n in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "shared"}, "would leave TRPO's region"),
        ({"update": Update(target_kl=0.1)}, "model.region.max_kl"),
    ],
)
def test_settings_that_contradict_each_other(make_trpo, options, message):
    with pytest.raises(UserError, match=message):
        make_trpo(**options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_kl", 0.0),
        ("cg_iterations", 0),
        ("backtracks", 0),
        ("fisher_every", 0),
        ("damping", -0.1),
        ("cg_tolerance", -1.0),
        ("backtrack_ratio", 1.0),
        ("backtrack_ratio", 0.0),
    ],
)
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^region\.{field} must .*{value}"):
        TrustRegion(**{field: value})
