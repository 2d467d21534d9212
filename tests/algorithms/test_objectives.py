import math
from functools import partial

import pytest
import torch
from torch import nn

from lit_rlhf.algorithms.kl import full_kl
from lit_rlhf.algorithms.masked import token_weights
from lit_rlhf.algorithms.objectives import (
    Clip,
    KLPenalty,
    Objective,
    PolicyLoss,
    Surrogate,
    VanillaPG,
    log_ratio,
    probability_ratio,
)
from lit_rlhf.algorithms.off_policy_objectives import CISPO, DPPO

NAN, INFINITY = float("nan"), float("inf")
SETTINGS = [
    {},
    {"eps": 0.1},
    {"eps": 0.2, "eps_high": 0.5},
    {"dual": 3.0},
    {"eps": 0.1, "eps_high": 0.28, "dual": 1.2},
]
OFF_POLICY = [CISPO(eps_high=1.0), CISPO(eps_low=0.3, eps_high=0.2), DPPO(), DPPO(delta=0.02, coef=0.4)]
TOKEN_LEVEL = [
    VanillaPG(),
    Surrogate(),
    KLPenalty(beta=0.7),
    *(Clip(**setting) for setting in SETTINGS),
    *OFF_POLICY,
]
SEQUENCE_LEVEL = [
    Surrogate("sequence"),
    KLPenalty(beta=0.7, ratio="sequence"),
    Clip(ratio="sequence"),
    Clip(0.1, 0.28, dual=1.2, ratio="sequence"),
]


def label(objective):
    """Return the name of an objective for the test's id."""
    if isinstance(objective, KLPenalty):
        return f"KLPenalty(ratio={objective.ratio!r})"
    return repr(objective) if isinstance(objective, Objective) else None


every_objective = pytest.mark.parametrize("objective", TOKEN_LEVEL + SEQUENCE_LEVEL, ids=label)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def random_case(seed=0, shape=(30, 20), constant=False):
    """Return a case with ratios well on both sides of every bound, an empty row 1, and no advantage of 0."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=g, dtype=torch.float64) * 5
    logprobs = old + torch.randn(shape, generator=g, dtype=torch.float64)
    logprobs += torch.randn(shape[0], 1, generator=g, dtype=torch.float64) / 2
    advantages = torch.randn(shape[0], 1 if constant else shape[1], generator=g, dtype=torch.float64).expand(shape)
    mask = torch.rand(shape, generator=g) < 0.7
    mask[1] = False
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": advantages.clone(),
        "mask": mask,
    }


def loss_and_gradient(objective, case, weights=1.0):
    case = case | {"logprobs": case["logprobs"].detach().clone().requires_grad_()}
    loss = objective(**case).loss
    (weights * loss).sum().backward()
    return loss.detach(), case["logprobs"].grad


def clip_by_definition(ratio, advantage, eps=0.2, eps_high=None, dual=None):
    bounded = max(1 - eps, min(1 + (eps_high or eps), ratio))
    objective = min(ratio * advantage, bounded * advantage)
    return -max(objective, dual * advantage) if dual and advantage < 0 else -objective


def loss_by_definition(objective, logprobs, old_logprobs, advantages):
    """Return the losses of a nonempty response, computed with Python floats."""
    own = [math.exp(a) / math.exp(b) for a, b in zip(logprobs, old_logprobs, strict=True)]
    ratios = own
    if getattr(objective, "ratio", "token") == "sequence":
        ratios = [math.prod(own) ** (1 / len(own))] * len(own)
    match objective:
        case VanillaPG():
            return [-a * logprob for a, logprob in zip(advantages, logprobs, strict=True)]
        case Surrogate():
            return [-a * r for a, r in zip(advantages, ratios, strict=True)]
        case KLPenalty(beta=beta):
            each = zip(advantages, ratios, own, strict=True)
            return [-a * r + beta * (r_own - 1 - math.log(r_own)) for a, r, r_own in each]
        case Clip(eps=eps, eps_high=high, dual=dual):
            return [clip_by_definition(r, a, eps, high, dual) for a, r in zip(advantages, ratios, strict=True)]
        case CISPO(eps_low=low, eps_high=high):
            each = zip(advantages, ratios, logprobs, strict=True)
            return [-max(1 - low, min(1 + high, r)) * a * logprob for a, r, logprob in each]
        case DPPO(delta=delta, coef=coef):
            changes = [math.exp(new) - math.exp(old) for new, old in zip(logprobs, old_logprobs, strict=True)]
            dropped = [c > delta if a > 0 else c < -delta for c, a in zip(changes, advantages, strict=True)]
            each = zip(advantages, ratios, dropped, strict=True)
            return [(0 if drop else -a * r) + coef * math.log(r) ** 2 for a, r, drop in each]


def row(objective, ratios, advantages, mask=None, old=-3.0):
    """Return the losses of one response with these ratios."""
    old_logprobs = torch.full((1, len(ratios)), old, dtype=torch.float64)
    return (
        objective(
            logprobs=torch.tensor([ratios], dtype=torch.float64).log() + old_logprobs,
            old_logprobs=old_logprobs,
            advantages=torch.tensor([advantages], dtype=torch.float64),
            mask=torch.ones_like(old_logprobs).bool() if mask is None else torch.tensor([mask]),
        )
        .loss[0]
        .tolist()
    )


@pytest.mark.parametrize(
    ("setting", "ratio", "advantage", "loss"),
    [
        ({}, 1.0, 2.0, -2.0),
        ({}, 1.5, 2.0, -2.4),  # clipped at 1.2
        ({}, 0.5, 2.0, -1.0),  # moved the wrong way: not clipped
        ({}, 0.5, -2.0, 1.6),  # clipped at 0.8
        ({}, 5.0, -2.0, 10.0),  # moved the wrong way: not clipped
        ({"eps_high": 0.4}, 1.5, 2.0, -2.8),
        ({"eps_high": 0.4}, 0.5, -2.0, 1.6),
        ({"dual": 3.0}, 5.0, -2.0, 6.0),  # at most −3 A
        ({"dual": 3.0}, 2.0, -2.0, 4.0),
        ({"dual": 3.0}, 5.0, 2.0, -2.4),  # dual only where A < 0
    ],
)
def test_clip_by_hand(setting, ratio, advantage, loss):
    assert row(Clip(**setting), [ratio], [advantage]) == pytest.approx([loss])
    assert clip_by_definition(ratio, advantage, **setting) == pytest.approx(loss)


LOG2 = math.log(2.0)


@pytest.mark.parametrize(
    ("objective", "losses"),
    [
        (VanillaPG(), [3 - LOG2, 0, -2 * (3 - 3 * LOG2)]),  # −A (log ρ − 3)
        (Surrogate(), [-2, 0, 16]),
        (KLPenalty(beta=10.0), [-2 + 10 * (1 - LOG2), 0, 16 + 10 * (7 - 3 * LOG2)]),  # ρ − 1 − log ρ
        (Clip(eps=0.25, dual=3.0), [-1.25, 0, 6]),
        (CISPO(eps_high=2.0), [2 * (3 - LOG2), 0, -2 * 3 * (3 - 3 * LOG2)]),  # −min(ρ, 3) A (log ρ − 3)
        (DPPO(coef=10.0), [-2 + 10 * LOG2**2, 0, 16 + 10 * (3 * LOG2) ** 2]),  # π − π_old is 0.05 and 0.35
        (DPPO(delta=0.04, coef=10.0), [10 * LOG2**2, 0, 16 + 10 * (3 * LOG2) ** 2]),
        (Surrogate("sequence"), [-4, 0, 8]),  # √(2 · 8)
        (KLPenalty(beta=10.0, ratio="sequence"), [-4 + 10 * (1 - LOG2), 0, 8 + 10 * (7 - 3 * LOG2)]),
        (Clip(eps=0.25, dual=3.0, ratio="sequence"), [-1.25, 0, 6]),
        (Clip(eps=0.25, eps_high=3.5, ratio="sequence"), [-4, 0, 8]),
    ],
    ids=label,
)
def test_numbers_by_hand(objective, losses):
    """The ratios are 2 and 8 with a hole between them; the advantages are 1 and −2."""
    mask = [True, False, True]
    assert row(objective, [2.0, 1e5, 8.0], [1.0, 1e5, -2.0], mask) == pytest.approx(losses)
    assert row(objective, [NAN] * 3, [NAN] * 3, [False] * 3) == [0, 0, 0]


@every_objective
def test_equals_a_loop(objective):
    case = random_case()
    losses = objective(**case).loss
    assert (losses[~case["mask"]] == 0).all()
    for line in case["mask"].any(1).nonzero().flatten().tolist():
        counts = case["mask"][line]
        terms = (case[name][line, counts].tolist() for name in ("logprobs", "old_logprobs", "advantages"))
        assert losses[line, counts].tolist() == pytest.approx(loss_by_definition(objective, *terms), rel=1e-10)


@pytest.mark.parametrize("objective", [o for o in TOKEN_LEVEL + SEQUENCE_LEVEL if not isinstance(o, CISPO)], ids=label)
def test_gradient_is_that_of_the_value(objective):
    case = random_case(shape=(4, 5))
    others = {name: x for name, x in case.items() if name != "logprobs"}
    assert torch.autograd.gradcheck(lambda logprobs: objective(logprobs=logprobs, **others).loss, case["logprobs"])


@every_objective
def test_gradient_at_ratio_one_is_minus_the_advantage(objective):
    """With the sequence's ratio, the gradient is minus the mean advantage of the row."""
    case = random_case()
    case["logprobs"] = case["old_logprobs"].clone()
    expected = case["advantages"].where(case["mask"], 0.0)
    if objective in SEQUENCE_LEVEL:
        lengths = case["mask"].sum(1, keepdim=True).clamp(min=1)
        expected = (expected.sum(1, keepdim=True) / lengths).where(case["mask"], 0.0)
    assert_same(loss_and_gradient(objective, case)[1], -expected)
    assert not objective(**case).clipped.any()


@every_objective
def test_gradients_flow_only_into_the_logprobs(objective):
    case = random_case()
    case["old_logprobs"].requires_grad_()
    case["advantages"].requires_grad_()
    objective(**case).loss.sum().backward()
    assert case["logprobs"].grad.abs().sum() > 0
    assert case["old_logprobs"].grad is None
    assert case["advantages"].grad is None


@every_objective
@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(objective, name, garbage):
    case, results = random_case(), []
    for outside in (0.0, garbage):
        spoilt = case | {name: torch.where(case["mask"], case[name].detach(), outside)}
        results.append((*loss_and_gradient(objective, spoilt), objective(**spoilt).clipped))
    for expected, spoilt in zip(*results, strict=True):
        assert torch.equal(spoilt, expected)
        assert (spoilt[~case["mask"]] == 0).all()


@every_objective
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_runaway_ratio_stays_finite(objective, log_ratio, advantage):
    case = {"logprobs": torch.tensor([[log_ratio, log_ratio]]), "old_logprobs": torch.zeros(1, 2)}
    case |= {"advantages": torch.full((1, 2), advantage), "mask": torch.ones(1, 2).bool()}
    for result in loss_and_gradient(objective, case):
        assert torch.isfinite(result).all()


@every_objective
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_result(objective, aggregation):
    case, results = random_case(shape=(7, 5)), []
    totals = {"total_tokens": case["mask"].sum(), "total_sequences": case["mask"].any(1).sum(), "max_tokens": 10}
    for sizes in ([7], [3, 4], [1] * 7):
        parts = [{name: x[rows] for name, x in case.items()} for rows in torch.arange(7).split(sizes)]
        weights = [token_weights(part["mask"], aggregation, **totals) for part in parts]
        pieces = [loss_and_gradient(objective, part, weight) for part, weight in zip(parts, weights, strict=True)]
        loss = sum((weight * loss).sum() for weight, (loss, _) in zip(weights, pieces, strict=True))
        results.append((loss, torch.cat([gradient for _, gradient in pieces])))
    for split in results[1:]:
        torch.testing.assert_close(split, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_marks_the_tokens_without_gradient(setting, level):
    case, objective = random_case(constant=True), Clip(**setting, ratio=level)
    gradient, clipped = loss_and_gradient(objective, case)[1], objective(**case).clipped
    assert torch.equal(clipped, (gradient == 0) & case["mask"])
    assert 0 < clipped.sum() < case["mask"].sum()


@pytest.mark.parametrize(
    "objective", [o for o in TOKEN_LEVEL + SEQUENCE_LEVEL if not isinstance(o, Clip | CISPO | DPPO)], ids=label
)
def test_other_objectives_do_not_clip(objective):
    assert not objective(**random_case()).clipped.any()


def test_log_ratio():
    mask = torch.tensor([[True, True, False, False]])
    logs = log_ratio(torch.tensor([[-1.0, 900.0, NAN, 5.0]]), torch.tensor([[-2.5, 100.0, 1.0, NAN]]), mask)
    assert logs.tolist() == [[1.5, 800.0, 0.0, 0.0]]


def test_ratio():
    mask = torch.tensor([[True, True, True, False]])
    ratio = probability_ratio(torch.tensor([[-1.0, 900.0, -900.0, NAN]]), torch.tensor([[-2.0, 0.0, 0.0, 1.0]]), mask)
    torch.testing.assert_close(ratio, torch.tensor([[math.e, math.exp(20), math.exp(-20), 1.0]]), rtol=1e-6, atol=0)


def test_ratio_of_a_sequence():
    """It is the geometric mean, clamped as a mean and not token by token, and 1 outside the mask and in empty rows."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    log_ratios = torch.tensor(
        [[LOG2, 3 * LOG2, NAN, 5 * LOG2], [100, -99, 7, 7], [90, NAN, 5, 2], [9, -90, -2, 9], [NAN] * 4]
    )
    ratio = probability_ratio(log_ratios - 1, torch.full_like(log_ratios, -1.0), mask, level="sequence")
    rows = torch.tensor([8.0, math.exp(0.5), math.exp(20), math.exp(-20), 1.0])
    torch.testing.assert_close(ratio, torch.where(mask, rows[:, None], 1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_sequence_mean_of_the_clipped_losses_is_the_mean_over_rows(setting):
    case = random_case(constant=True)
    expected = []
    for line, counts in enumerate(case["mask"]):
        log_ratios = (case["logprobs"] - case["old_logprobs"])[line, counts].tolist()
        if log_ratios:
            ratio = math.exp(sum(log_ratios) / len(log_ratios))
            expected.append(clip_by_definition(ratio, case["advantages"][line, 0].item(), **setting))
    totals = {"total_tokens": case["mask"].sum(), "total_sequences": len(expected), "max_tokens": 20}
    loss = (token_weights(case["mask"], "sequence", **totals) * Clip(**setting, ratio="sequence")(**case).loss).sum()
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.5, 20.0])
def test_the_penalty_and_its_gradient_are_exact_on_average(beta, seed):
    """The mean of the loss over π_old is minus the mean advantage under π plus β KL(π_old ‖ π)."""
    g = torch.Generator().manual_seed(seed)
    logits, old_logits, advantages = torch.randn(3, 1, 11, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    logprobs, old_logprobs = logits.log_softmax(-1), old_logits.log_softmax(-1)
    terms = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": torch.ones(1, 11).bool()}
    mean = (old_logprobs.exp() * KLPenalty(beta, adaptive=False)(logprobs=logprobs, **terms).loss).sum()
    exact = (-(logprobs.exp() * advantages).sum() + beta * full_kl(old_logits, logits)).sum()
    assert_same(mean, exact)
    assert_same(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, exact)))


@pytest.mark.parametrize(
    ("options", "measured", "beta"),
    [
        ({}, 1.25, 6.0),  # the target is 0.75: doubled above 1.125
        ({}, 1.125, 3.0),
        ({}, 0.75, 3.0),
        ({}, 0.5, 3.0),
        ({}, 0.4375, 1.5),  # halved below 0.5
        ({}, 0.0, 1.5),
        ({}, float("inf"), 6.0),
        ({"high": 4.0}, 3.0, 3.0),
        ({"high": 4.0}, 3.25, 6.0),
        ({"high": 4.0}, 0.4375, 1.5),
        ({"low": 3.0}, 0.25, 3.0),
        ({"low": 3.0}, 0.125, 1.5),
        ({"low": 3.0}, 1.25, 6.0),
        ({"factor": 3.0}, 2.0, 9.0),
        ({"factor": 3.0}, 0.25, 1.0),
        ({"high": 1.0, "low": 1.0}, 0.75, 3.0),
        ({"adaptive": False}, 100.0, 3.0),
        ({"adaptive": False}, 0.0, 3.0),
    ],
)
def test_beta_follows_the_kl(options, measured, beta):
    objective = KLPenalty(beta=3.0, target=0.75, **options)
    objective.update(measured)
    assert objective.beta == beta
    assert objective.follows_kl == options.get("adaptive", True)


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_beta_can_always_recover(kl):
    objective = KLPenalty(beta=1.0, target=0.01)
    for _ in range(2000):
        objective.update(kl)
    loss = objective(**random_case()).loss
    assert torch.isfinite(loss).all()
    stuck = objective.beta
    objective.update(1.0 - kl)
    assert objective.beta == stuck * 2 ** (1 - 2 * kl)


def test_the_loss_uses_the_new_beta():
    objective, same = KLPenalty(beta=1.0, target=0.01), KLPenalty(beta=4.0)
    objective.update(1.0)
    objective.update(1.0)
    assert torch.equal(objective(**random_case()).loss, same(**random_case()).loss)


@every_objective
def test_only_the_penalty_follows_the_kl(objective):
    assert objective.follows_kl == isinstance(objective, KLPenalty)
    if not objective.follows_kl:
        objective.update(1.0)


class Parent(nn.Module):
    def __init__(self, objective):
        super().__init__()
        self.layer, self.objective = nn.Linear(2, 2), objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_beta_is_in_the_checkpoint(dtype):
    beta = 1 / 3
    state = Parent(KLPenalty(beta=beta)).to(dtype).state_dict()
    parent = Parent(KLPenalty()).to(dtype)
    parent.load_state_dict(state)
    assert parent.objective.beta == beta
    assert isinstance(parent.objective.beta, float)
    assert parent.to(torch.bfloat16).objective.beta == beta
    parent.objective.update(0.0)
    assert parent.objective.beta == beta / 2


def test_an_objective_does_not_follow_the_kl_by_default():
    class Plain(Objective):
        def __call__(self, *, logprobs, old_logprobs, advantages, mask):
            ratio = probability_ratio(logprobs, old_logprobs, mask)
            return PolicyLoss(torch.where(mask, -logprobs * advantages, 0.0), ratio, torch.zeros_like(mask))

    assert not Plain().follows_kl


@every_objective
def test_the_ratio_is_the_one_that_the_objective_uses(objective):
    case = random_case()
    level = getattr(objective, "ratio", "token")
    expected = probability_ratio(case["logprobs"], case["old_logprobs"], case["mask"], level)
    assert torch.equal(objective(**case).ratio, expected)


@every_objective
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "mask"])
def test_another_shape_is_refused(objective, name):
    case = random_case(shape=(2, 3))
    case[name] = case[name][:1]
    with pytest.raises(ValueError, match=r"^shapes differ: .*\[1, 3\]"):
        objective(**case)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eps", 0.0), ("eps", 1.0), ("eps", NAN), ("eps_high", 0.0), ("eps_high", NAN), ("dual", 1.0), ("dual", NAN)],
)
def test_clip_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^objective\.{field} must .*{value}"):
        Clip(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("beta", "target") for value in (0.0, -1.0, NAN, INFINITY)]
    + [(bound, value) for bound in ("high", "low") for value in (0.99, -2.0, NAN, INFINITY)]
    + [("factor", value) for value in (1.0, 0.5, NAN, INFINITY)],
)
def test_penalty_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^objective\.{field} must be .*, not {value}$"):
        KLPenalty(**{field: value})


def test_a_fixed_beta_may_be_zero():
    assert KLPenalty(beta=0.0, adaptive=False).beta == 0
    with pytest.raises(ValueError, match=r"^objective\.beta must be .*, not -1\.0$"):
        KLPenalty(beta=-1.0, adaptive=False)


@pytest.mark.parametrize("objective", [Surrogate, KLPenalty, Clip])
@pytest.mark.parametrize("level", ["word", "", "Token"])
def test_unknown_ratio(objective, level):
    with pytest.raises(ValueError, match=rf"^objective\.ratio must be 'token' or 'sequence', not '{level}'$"):
        objective(ratio=level)
