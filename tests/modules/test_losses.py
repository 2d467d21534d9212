"""The losses on real models, without a Trainer."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.kl import ReferenceKL, full_kl
from lit_rlhf.algorithms.objectives import Clip, Surrogate
from lit_rlhf.batching import micro_batches
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.scoring import load_critic
from lit_rlhf.modules.losses import Losses, step_totals
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.update import Update
from lit_rlhf.types import Experience, Rollout

NAN = float("nan")
PROMPTS, RESPONSES = [2, 3, 1, 4, 2], [4, 1, 6, 3, 2]


@pytest.fixture(scope="module")
def models(tiny_model) -> dict:
    """Return an actor, a critic and a reference with different weights."""
    folders = [str(tiny_model("llama", seed=seed)) for seed in (0, 1, 2)]
    critic = load_critic(folders[1])
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    return {"actor": Actor(load_model(folders[0])), "critic": critic, "reference": Actor(load_model(folders[2]))}


@pytest.fixture
def make(models):
    """Return a function that makes losses, with some of their parts replaced."""

    def make(update=Update(), **parts) -> Losses:
        parts = {"objective": Clip(), "reference_kl": ReferenceKL(), "kl_coef": 0.3, "max_tokens": 8} | parts
        return Losses(**(models | parts), update=update)

    return make


def make_experience(seed=0) -> Experience:
    g = torch.Generator().manual_seed(seed)
    prompt_lengths, response_lengths = torch.tensor(PROMPTS), torch.tensor(RESPONSES)
    lengths = prompt_lengths + response_lengths
    mask = torch.arange(max(RESPONSES)) < response_lengths[:, None]
    rollout = Rollout(
        tokens=torch.where(
            torch.arange(int(lengths.max())) < lengths[:, None],
            torch.randint(6, 38, (len(PROMPTS), int(lengths.max())), generator=g),
            0,
        ),
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        rollout_logprobs=torch.zeros(mask.shape),
        rollout_entropy=torch.zeros(mask.shape),
        response_mask=mask,
        terminated=torch.ones(len(PROMPTS), dtype=torch.bool),
        group=torch.arange(len(PROMPTS)),
    )
    names = ("ref_logprobs", "values", "advantages", "returns", "old_logprobs")
    numbers = {name: torch.randn(mask.shape, generator=g).where(mask, 0.0) for name in names}
    numbers["old_logprobs"] = numbers["old_logprobs"] - 4.0
    constants = {"reward_scale": torch.full(mask.shape, 2.0), "policy_weights": torch.ones(mask.shape)}
    return Experience(rollout=rollout, **constants, **numbers)


def run(losses, experience, max_tokens=10**6):
    """Return the loss of a step, its KL to the old policy, and its metrics."""
    batches = micro_batches(experience, max_tokens, pads=False)
    metrics, totals = Metrics(torch.device("cpu")), step_totals(batches)
    parts = [part(micro_batch, totals, metrics) for micro_batch in batches for part in losses.parts.values()]
    return sum(part.loss for part in parts), sum(part.kl_to_old for part in parts), metrics.compute()


def distributions(model, rollout, row):
    """Return log π(·|sₜ) for each response token of a row, computed on that row alone."""
    tokens = rollout.tokens[row, : int(rollout.lengths[row])]
    logits = model.model(input_ids=tokens[None]).logits[0].float()
    return torch.log_softmax(logits[int(rollout.prompt_lengths[row]) - 1 : -1], -1)


def loss_by_loop(losses, experience, models, entropy_coef=0.0, value_coef=1.0, clip=0.2):
    """Compute the loss token by token: the clipped objective, the entropy bonus, and the clipped value loss."""
    rollout, terms = experience.rollout, []
    for row in range(len(PROMPTS)):
        tokens = rollout.tokens[row : row + 1, : int(rollout.lengths[row])]
        own = distributions(models["actor"], rollout, row)
        values = models["critic"](tokens)[0, int(rollout.prompt_lengths[row]) - 1 : -1]
        for t in range(RESPONSES[row]):
            token = int(rollout.tokens[row, PROMPTS[row] + t])
            ratio = (own[t, token] - experience.old_logprobs[row, t]).exp()
            advantage, old = experience.advantages[row, t], experience.values[row, t]
            policy = -min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            policy = experience.policy_weights[row, t] * policy + entropy_coef * (own[t].exp() * own[t]).sum()
            near = old + (values[t] - old).clamp(-clip, clip)
            errors = torch.stack([values[t] - experience.returns[row, t], near - experience.returns[row, t]])
            terms.append(policy + value_coef * 0.5 * errors.square().max())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("entropy_coef", "value_coef"), [(0.0, 1.0), (0.7, 0.25)])
@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_equals_a_loop_over_the_tokens(make, models, entropy_coef, value_coef, weighted):
    """The weights of a correction apply to the objective only, and the loss is divided by all tokens."""
    losses, experience = make(Update(entropy_coef=entropy_coef, value_coef=value_coef)), make_experience()
    if weighted:
        mask = experience.rollout.response_mask
        weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(4)) * 2 * (torch.arange(6) != 1)
        experience = replace(experience, policy_weights=torch.where(mask, weights, 1.0))
    expected = loss_by_loop(losses, experience, models, entropy_coef, value_coef)
    torch.testing.assert_close(run(losses, experience)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["reward", "loss"])
@torch.no_grad()
def test_the_full_kl_to_the_reference_is_added(make, models, where):
    """With the KL in the reward, the term completes the gradient and has the scale of the advantages."""
    experience = make_experience()
    plain = run(make(reference_kl=ReferenceKL("reward", "k1")), experience)[0]
    total = run(make(reference_kl=ReferenceKL(where, "full")), experience)[0] - plain
    kl = [
        full_kl(*(distributions(models[name], experience.rollout, row) for name in ("actor", "reference")))
        for row in range(len(PROMPTS))
    ]
    expected = 0.3 * (2.0 if where == "reward" else 1.0) * torch.cat(kl).mean()
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(make, models, tiny_model, aggregation, shared):
    parts = {}
    if shared:
        parts = {"actor": Actor(models["actor"].model, shared_critic=True), "critic": None}
        torch.nn.init.normal_(parts["actor"].value_head.weight, generator=torch.Generator().manual_seed(3))
    losses, results = make(Update(aggregation=aggregation, entropy_coef=0.1), **parts), []
    for max_tokens in (10**6, 20, 1):
        parameters = [p for p in losses.actor.parameters() if p.requires_grad]
        loss, kl, metrics = run(losses, make_experience(), max_tokens)
        gradients = torch.autograd.grad(loss, parameters)
        results.append((loss.detach(), kl, *gradients, torch.tensor([metrics[name] for name in sorted(metrics)])))
    assert results[0][2].abs().sum() > 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient(make):
    losses, experience, results = make(Update(entropy_coef=0.1)), make_experience(), []
    outside = ~experience.rollout.response_mask
    for garbage in (0.0, NAN, 1e30):
        names = ("old_logprobs", "ref_logprobs", "values", "policy_weights", "advantages", "returns", "reward_scale")
        spoilt = replace(experience, **{n: getattr(experience, n).masked_fill(outside, garbage) for n in names})
        loss, kl, metrics = run(losses, spoilt)
        gradients = torch.autograd.grad(loss, list(losses.actor.parameters()) + list(losses.critic.parameters()))
        results.append((loss.detach(), kl, *gradients, torch.tensor(list(metrics.values()))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_the_metrics(make, models):
    experience, metrics = make_experience(), run(make(Update(value_clip=0.2)), make_experience())[2]
    mask, ratios, clipped, kls, entropies = experience.rollout.response_mask, [], [], [], []
    for row in range(len(PROMPTS)):
        own = distributions(models["actor"], experience.rollout, row)
        for t in range(RESPONSES[row]):
            log_ratio = own[t, experience.rollout.tokens[row, PROMPTS[row] + t]] - experience.old_logprobs[row, t]
            ratios.append(float(log_ratio.detach().exp()))
            clipped.append(ratios[-1] > 1.2 if experience.advantages[row, t] > 0 else ratios[-1] < 0.8)
            entropies.append(float(-(own[t].exp() * own[t]).sum().detach()))
            kls.append(float((torch.expm1(log_ratio) - log_ratio).detach()))
    assert metrics["policy/ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics["policy/clip_fraction"] == pytest.approx(sum(clipped) / int(mask.sum()))
    assert 0 < metrics["policy/clip_fraction"] < 1
    assert metrics["policy/kl_to_old"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert metrics["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-3)
    clipped_values, value_errors = 0, []
    for row in range(len(PROMPTS)):
        tokens = experience.rollout.tokens[row : row + 1, : int(experience.rollout.lengths[row])]
        values = models["critic"](tokens)[0, PROMPTS[row] - 1 : -1].detach()
        for t in range(RESPONSES[row]):
            old, target = experience.values[row, t], experience.returns[row, t]
            near = old + (values[t] - old).clamp(-0.2, 0.2)
            value_errors.append(0.5 * max(float(values[t] - target) ** 2, float(near - target) ** 2))
            clipped_values += abs(float(values[t] - old)) > 0.2
    assert metrics["value/loss"] == pytest.approx(sum(value_errors) / len(value_errors), rel=1e-3)
    assert metrics["value/clip_fraction"] == pytest.approx(clipped_values / len(value_errors))


def test_the_largest_ratio_is_that_of_the_objective(make):
    """With sequence-level ratios, the metric is the largest sequence-level ratio."""
    token, sequence = (
        run(make(objective=Surrogate(level)), make_experience())[2]["policy/ratio_max"]
        for level in ("token", "sequence")
    )
    assert sequence < 0.9 * token


@pytest.mark.parametrize(("field", "name"), [("advantages", "policy_loss"), ("returns", "value_loss")])
def test_the_loss_that_is_not_finite_is_found(make, field, name):
    experience, metrics = make_experience(), Metrics(torch.device("cpu"))
    getattr(experience, field)[2, 1] = NAN
    parts = [part(experience, step_totals([experience]), metrics) for part in make().parts.values()]
    means = {name: mean for part in parts for name, mean in part.means.items()}
    assert [name for name, mean in means.items() if not mean.isfinite()] == [name]


def test_without_a_critic_there_is_no_value_loss(make, models):
    experience = replace(make_experience(), values=None)
    loss, _, metrics = run(make(critic=None), experience)
    assert torch.isfinite(loss)
    assert not any(name.startswith("value/") for name in metrics)


def test_step_totals():
    experience = make_experience()
    assert step_totals([experience]).tolist() == [16, 5]
    rollout = experience.rollout
    empty = replace(rollout, response_mask=torch.zeros_like(rollout.response_mask))
    assert step_totals([experience, replace(experience, rollout=empty)]).tolist() == [16, 5]
