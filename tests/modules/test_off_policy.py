"""An engine whose policy is not the actor's: metrics, corrections, and V-trace in real runs."""

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE
from lit_rlhf.algorithms.corrections import Correction
from lit_rlhf.algorithms.objectives import Clip, Surrogate
from lit_rlhf.algorithms.off_policy_objectives import CISPO, DPPO
from lit_rlhf.algorithms.vtrace import VTrace
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.modules import TRPO, Guard, Update
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.off_policy import measure_off_policy
from lit_rlhf.rewards import RewardFunction
from lit_rlhf.testing import Recorder
from lit_rlhf.types import Trajectory

METHODS = {
    "TIS": Correction(),
    "IcePop": Correction(truncate_above=None, mask_level="token", mask_below=0.5, mask_above=1.5),
    "MIS": Correction("sequence", truncate_above=None, mask_level="sequence", mask_above=1.5),
    "geometric mask": Correction(None, mask_level="geometric", mask_below=0.95, mask_above=1.05),
    "decoupled": Correction(truncate_above=None),
    "bypass": Correction(bypass=True),
    "bypass and mask": Correction(bypass=True, mask_level="geometric", mask_below=0.95, mask_above=1.05),
}
ONE_STEP = Update(epochs=1, minibatches=1, max_tokens=64, clip_grad_norm=None, entropy_coef=0.3)


@dataclass(frozen=True)
class ShiftedEngine(NativeEngine):
    """The native engine, with log-probabilities that are off by up to ``size``, as if it had other weights."""

    size: float = 1.0
    is_exact = False

    def generate(self, *inputs, **options):
        rollout = super().generate(*inputs, **options)
        waves = torch.sin(rollout.group[:, None] + 2.0 * torch.arange(rollout.response_mask.shape[1]))
        shifted = rollout.rollout_logprobs - self.size * torch.where(rollout.response_mask, waves, 0.0)
        return replace(rollout, rollout_logprobs=shifted)


def sgd(parameters):
    """Return SGD with learning rate 1, whose step is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


@pytest.fixture
def run(make_module, fit):
    """Return a function that trains with a shifted engine and returns the module and its recorder."""

    def run(size=1.0, **options):
        recorder = Recorder()
        defaults = {"engine": ShiftedEngine(size=size), "guard": Guard(responses=0), "iterations": 2}
        module = make_module(**(defaults | options))
        fit(module, [recorder])
        return module, recorder

    return run


def without_times(metrics):
    """Return the metrics without those of time, and without those that only a correction has."""
    left_out = ("time/", "perf/", "off_policy/truncated", "off_policy/masked")
    return {name: value for name, value in metrics.items() if not name.startswith(left_out)}


def test_without_a_correction_the_engines_numbers_change_nothing(run):
    """A correction whose weights are all 1 does not change a bit either, and has the same metrics."""
    harmless = Correction(None, mask_level="token", mask_above=1e6)
    exact, shifted, corrected = run(size=0.0)[1], run()[1], run(correction=harmless)[1]
    for name, weight in exact.weights.items():
        assert torch.equal(shifted.weights[name], weight)
        assert torch.equal(corrected.weights[name], weight)
    for a, b in zip(shifted.metrics, corrected.metrics, strict=True):
        assert without_times(a) == without_times(b)
        assert (b["off_policy/truncated_fraction"], b["off_policy/masked_fraction"]) == (0, 0)


def test_with_an_exact_engine_a_correction_changes_nothing(run):
    plain, corrected = (run(engine=NativeEngine(), correction=c)[1] for c in (None, Correction()))
    assert all(torch.equal(corrected.weights[name], weight) for name, weight in plain.weights.items())
    assert [without_times(m) for m in corrected.metrics] == [without_times(m) for m in plain.metrics]
    for metrics in plain.metrics:
        assert metrics["off_policy/logprob_diff_max"] == metrics["off_policy/kl"] == 0
        assert metrics["off_policy/effective_sample_size"] == 1


def weight_by_definition(correction, logs, t):
    """Return the weight of token t of a response with these log-ratios, and whether it is truncated."""
    levels = {"token": logs[t], "sequence": sum(logs), "geometric": sum(logs) / len(logs)}
    ratios = {level: math.exp(log) for level, log in levels.items()} | {None: 1.0}
    if correction.mask_level is not None:
        ratio = ratios[correction.mask_level]
        if not (correction.mask_below or 0) <= ratio <= (correction.mask_above or math.inf):
            return 0.0, False
    if correction.bypass:
        return 1.0, False
    ratio, bound = ratios[correction.level], correction.truncate_above or math.inf
    return min(ratio, bound), ratio > bound


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_the_step_are_those_of_a_loop(run, method):
    """The objective is clipped at 0.2 and weighted token by token; the entropy bonus is not weighted."""
    correction = METHODS[method]
    module, recorder = run(
        correction=correction, iterations=1, update=ONE_STEP, actor_optimizer=sgd, critic_optimizer=sgd
    )
    scored, metrics = recorder.outputs[0]["scored_rollout"], recorder.metrics[0]
    rollout, mask = scored.rollout, scored.rollout.response_mask
    advantages = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu"))).advantages
    actor = deepcopy(module.reference).requires_grad_()  # as it was before the step
    stats = actor(rollout.tokens, rollout.response_tokens_mask)
    logprobs, entropies = (rollout.at_responses(x) for x in (stats.logprobs, stats.entropy))
    objective, bonus, truncated, weights = [], [], 0, []
    for row, length in enumerate(rollout.response_lengths.tolist()):
        logs = (scored.old_logprobs - rollout.rollout_logprobs)[row, :length].tolist()
        for t in range(length):
            weight, is_truncated = weight_by_definition(correction, logs, t)
            old = rollout.rollout_logprobs if correction.bypass else scored.old_logprobs
            ratio, advantage = (logprobs[row, t] - old[row, t]).exp(), advantages[row, t]
            objective.append(-weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            bonus.append(0.3 * entropies[row, t])
            weights.append(weight)
            truncated += is_truncated
    tokens = int(mask.sum())
    assert metrics["policy/loss"] == pytest.approx(sum(objective).item() / tokens, rel=1e-3, abs=1e-5)
    assert metrics["off_policy/truncated_fraction"] == pytest.approx(truncated / tokens)
    assert metrics["off_policy/masked_fraction"] == pytest.approx(weights.count(0.0) / tokens)
    if correction.mask_level:
        assert 0 < weights.count(0.0) < tokens
    loss = (sum(objective) - sum(bonus)) / tokens
    gradients = torch.autograd.grad(loss, list(actor.parameters()))
    pairs = zip(actor.parameters(), module.actor.parameters(), strict=True)
    steps = torch.cat([(before - after).flatten() for before, after in pairs])
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_old_policy_is_the_engines_with_bypass(run):
    plain, bypass = (run(iterations=1, correction=c, update=ONE_STEP)[1].metrics[0] for c in (None, METHODS["bypass"]))
    assert plain["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert plain["policy/kl_to_old"] == pytest.approx(0, abs=1e-8)
    assert bypass["policy/ratio_max"] == pytest.approx(math.exp(bypass["off_policy/logprob_diff_max"]), rel=0.1)
    assert bypass["policy/kl_to_old"] == pytest.approx(bypass["off_policy/kl"], rel=1e-3)
    assert plain["value/loss"] == bypass["value/loss"]


def test_metrics_by_hand():
    """The log-ratios are log 2 and −log 4; other tokens do not count."""
    old, rollout = torch.tensor([[0.5, 0.1, float("nan")]]).log(), torch.tensor([[0.25, 0.4, 0.5]]).log()
    metrics = Metrics(torch.device("cpu"))
    measure_off_policy(old, rollout, torch.tensor([[True, True, False]]), metrics)
    log2 = math.log(2)
    assert metrics.compute() == pytest.approx(
        {
            "off_policy/logprob_diff_mean": 1.5 * log2,
            "off_policy/logprob_diff_max": 2 * log2,
            "off_policy/kl": ((2 - 1 - log2) + (0.25 - 1 + 2 * log2)) / 2,  # ρ − 1 − log ρ
            "off_policy/effective_sample_size": 2.25**2 / (2 * (4 + 1 / 16)),  # (2 + ¼)² / (2 (2² + ¼²))
        }
    )


def test_the_host_does_not_wait_for_the_device():
    """The meta device stands in for the GPU; its tensors cannot be read."""
    x = torch.zeros(2, 3, device="meta")
    metrics = Metrics(x.device)
    measure_off_policy(x, x, x.bool(), metrics)
    assert {tensor.device.type for tensor in metrics.state()} == {"meta"}
    for correction in METHODS.values():
        assert correction(old_logprobs=x, rollout_logprobs=x, mask=x.bool()).weights.is_meta
    assert VTrace()(Trajectory(rewards=x, values=x, mask=x.bool(), ratios=x)).advantages.is_meta


def test_metrics_of_a_run(run):
    scored, metrics = (records[0] for records in (run()[1].outputs, run()[1].metrics))
    scored, mask = scored["scored_rollout"], scored["scored_rollout"].rollout.response_mask
    logs = (scored.old_logprobs - scored.rollout.rollout_logprobs)[mask].tolist()
    ratios = [math.exp(log) for log in logs]
    assert metrics["off_policy/logprob_diff_mean"] == pytest.approx(sum(map(abs, logs)) / len(logs), rel=1e-5)
    assert metrics["off_policy/logprob_diff_max"] == pytest.approx(max(map(abs, logs)), rel=1e-5)
    kl = sum(ratio - 1 - log for ratio, log in zip(ratios, logs, strict=True)) / len(logs)
    assert metrics["off_policy/kl"] == pytest.approx(kl, rel=1e-5)
    size = sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios))
    assert metrics["off_policy/effective_sample_size"] == pytest.approx(size, rel=1e-5)
    assert 0.3 < size < 0.95


@pytest.mark.parametrize("critic", ["shared", None])
def test_vtrace_sees_the_ratios(run, critic):
    module, recorder = run(advantages=VTrace(lam=0.9), critic=critic, update=replace(ONE_STEP, whiten_advantages=False))
    scored = recorder.outputs[-1]["scored_rollout"]
    trajectory, mask = module.reward(scored), scored.rollout.response_mask
    expected = (scored.old_logprobs - scored.rollout.rollout_logprobs).exp()
    torch.testing.assert_close(trajectory.ratios[mask], expected[mask])
    assert (trajectory.ratios[~mask] == 1).all()
    experience = module.estimate(scored, trajectory, Metrics(torch.device("cpu")))
    torch.testing.assert_close(experience.advantages, VTrace(lam=0.9)(trajectory).advantages)
    assert (experience.advantages - GAE(lam=0.9)(trajectory).advantages).abs().max() > 0.01
    assert (experience.policy_weights == 1).all()
    assert recorder.metrics[-1]["objective/kl_to_ref"] != 0  # the actor has changed


@pytest.mark.parametrize("correction", [Correction(), METHODS["MIS"], METHODS["bypass"]], ids=str)
def test_vtrace_refuses_a_second_weight(make_module, correction):
    message = r"^model.correction weights the tokens, as VTrace already does: set it, or its level, to null$"
    with pytest.raises(UserError, match=message):
        make_module(advantages=VTrace(), correction=correction)
    make_module(advantages=VTrace(), correction=METHODS["geometric mask"])


@pytest.mark.parametrize("objective", [CISPO(eps_high=0.5), DPPO(delta=0.05)], ids=str)
def test_the_off_policy_objectives_train(run, objective):
    _, recorder = run(
        objective=objective,
        correction=METHODS["bypass"],
        critic=None,
        update=Update(epochs=2, minibatches=2, max_tokens=64),
    )
    assert all(math.isfinite(value) for value in recorder.metrics[-1].values())
    assert 0 < recorder.metrics[0]["policy/clip_fraction"] < 1
    assert recorder.metrics[-1]["objective/kl_to_ref"] != 0


def test_trpo_weights_its_surrogate(fit, tiny_model):
    recorder = Recorder()
    module = TRPO(
        actor=str(tiny_model("llama")),
        rewards=[RewardFunction("lit_rlhf.testing.runs:low_words")],
        critic=None,
        sampling=Sampling(max_tokens=12),
        engine=ShiftedEngine(),
        guard=Guard(responses=0),
        correction=METHODS["IcePop"],
        iterations=1,
    )
    fit(module, [recorder])
    scored = recorder.outputs[0]["scored_rollout"]
    mask = scored.rollout.response_mask
    experience = module.estimate(scored, module.reward(scored), Metrics(torch.device("cpu")))
    ratios = (scored.old_logprobs - scored.rollout.rollout_logprobs)[mask].exp()
    weights = torch.where((ratios >= 0.5) & (ratios <= 1.5), ratios, 0.0)
    expected = -(weights * experience.advantages[mask]).mean()
    assert recorder.metrics[0]["policy/loss"] == pytest.approx(float(expected), rel=1e-3)
    assert recorder.metrics[0]["policy/step_share"] > 0
    assert isinstance(module.objective, Surrogate)


def test_the_default_is_no_correction(make_module):
    module = make_module()
    assert module.correction is None
    assert isinstance(module.objective, Clip)
