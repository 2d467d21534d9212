import math
import re
from functools import partial

import pytest
import torch
import yaml

from lit_rlhf.algorithms.corrections import Correction, importance_ratio

NAN, INFINITY = float("nan"), float("inf")
assert_same = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
METHODS = {
    "TIS": Correction(),
    "decoupled": Correction(truncate_above=None),
    "IcePop": Correction(truncate_above=None, mask_level="token", mask_below=0.5, mask_above=5.0),
    "MIS": Correction("sequence", truncate_above=None, mask_level="sequence", mask_above=3.0),
    "geometric mask": Correction(None, mask_level="geometric", mask_below=0.99, mask_above=1.01),
    "bypass": Correction(bypass=True),
}
OTHERS = [
    Correction("sequence", truncate_above=3.0, truncate_below=0.25, mask_level="geometric", mask_above=1.2),
    Correction("geometric", truncate_above=1.1, truncate_below=0.9),
    Correction(None, mask_level="token", mask_below=0.5),
    Correction(None, None, bypass=True, mask_level="sequence", mask_above=2.0, mask_below=0.5),
    Correction(truncate_below=0.8, mask_level="sequence", mask_below=0.3),
]
every_correction = pytest.mark.parametrize("correction", [*METHODS.values(), *OTHERS], ids=str)


def random_case(seed=0, shape=(30, 12)):
    """Return a case with holes, an empty row 1, a row 2 of one token, and rows 3 to 9 that are nearly on-policy."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=g, dtype=torch.float64) * 5
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    noise[3:10] *= 0.01
    mask = torch.rand(shape, generator=g) < 0.7
    mask[1], mask[2] = False, torch.arange(shape[1]) == 4
    return {"old_logprobs": old, "rollout_logprobs": old + noise, "mask": mask}


def ratio_by_definition(level, own, t):
    """Return the ratio of token t, given the ratios of all tokens of a response."""
    if level == "token":
        return own[t]
    return math.prod(own) if level == "sequence" else math.prod(own) ** (1 / len(own))


def by_definition(correction, own, t):
    """Return the weight of token t, and whether it is truncated or masked."""
    weight, truncated, masked = 1.0, False, False
    if correction.level is not None and not correction.bypass:
        ratio = weight = ratio_by_definition(correction.level, own, t)
        if correction.truncate_above is not None and ratio > correction.truncate_above:
            weight, truncated = correction.truncate_above, True
        if correction.truncate_below is not None and ratio < correction.truncate_below:
            weight, truncated = correction.truncate_below, True
    if correction.mask_level is not None:
        ratio = ratio_by_definition(correction.mask_level, own, t)
        masked = correction.mask_above is not None and ratio > correction.mask_above
        masked |= correction.mask_below is not None and ratio < correction.mask_below
    return (0.0, False, True) if masked else (weight, truncated, masked)


BELOW_ONE = [  # a ratio of 1, such as outside the mask, would be truncated or masked
    Correction("token", truncate_above=0.9),
    Correction(None, mask_level="token", mask_above=0.9),
]


@pytest.mark.parametrize("correction", [*METHODS.values(), *OTHERS, *BELOW_ONE], ids=str)
def test_equals_a_loop(correction):
    case = random_case()
    result = correction(**case)
    for row, counts in enumerate(case["mask"]):
        tokens = counts.nonzero().flatten().tolist()
        logs = (case["old_logprobs"] - case["rollout_logprobs"])[row, counts].tolist()
        for k, t in enumerate(tokens):
            expected = by_definition(correction, [math.exp(log) for log in logs], k)
            assert result.weights[row, t].item() == pytest.approx(expected[0])
            assert (result.truncated[row, t].item(), result.masked[row, t].item()) == expected[1:]
    outside = ~case["mask"]
    assert (result.weights[outside] == 1).all()
    assert not (result.truncated | result.masked)[outside].any()


@pytest.mark.parametrize(
    ("method", "weights", "truncated", "masked"),
    [
        ("TIS", [0.25, 2.0, 1.0], [0, 1, 0], [0, 0, 0]),
        ("decoupled", [0.25, 8.0, 1.0], [0, 0, 0], [0, 0, 0]),
        ("IcePop", [0.0, 0.0, 1.0], [0, 0, 0], [1, 1, 0]),
        ("MIS", [2.0, 2.0, 2.0], [0, 0, 0], [0, 0, 0]),
        ("geometric mask", [0.0, 0.0, 0.0], [0, 0, 0], [1, 1, 1]),
        ("bypass", [1.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_numbers_by_hand(method, weights, truncated, masked):
    """The ratios are 1/4, 8 and 1, with a hole; their product is 2, and their geometric mean 1.26."""
    old = torch.tensor([[0.125, NAN, 0.8, 0.5]], dtype=torch.float64).log()
    rollout = torch.tensor([[0.5, NAN, 0.1, 0.5]], dtype=torch.float64).log()
    counts = torch.tensor([[True, False, True, True]])
    result = METHODS[method](old_logprobs=old, rollout_logprobs=rollout, mask=counts)
    assert_same(result.weights[counts], torch.tensor(weights, dtype=torch.float64))
    assert result.truncated[counts].tolist() == [bool(x) for x in truncated]
    assert result.masked[counts].tolist() == [bool(x) for x in masked]


def test_the_geometric_mask_keeps_responses_near_the_actor():
    case = random_case()
    masked = METHODS["geometric mask"](**case).masked
    assert (masked.any(1) == (masked | ~case["mask"]).all(1) & case["mask"].any(1)).all()  # whole responses
    assert not masked[3:10].any()
    assert masked[10:].any()


@every_correction
def test_on_policy_every_weight_is_one(correction):
    case = random_case()
    result = correction(**case | {"rollout_logprobs": case["old_logprobs"].clone()})
    assert (result.weights == 1).all()
    assert not (result.truncated | result.masked).any()


@every_correction
@pytest.mark.parametrize("garbage", [NAN, INFINITY, -INFINITY, 1e30])
@pytest.mark.parametrize("name", ["old_logprobs", "rollout_logprobs"])
def test_garbage_outside_the_mask_changes_nothing(correction, name, garbage):
    case = random_case()
    spoilt = case | {name: torch.where(case["mask"], case[name], garbage)}
    for expected, result in zip(correction(**case), correction(**spoilt), strict=True):
        assert torch.equal(result, expected)


@every_correction
def test_weights_carry_no_gradient(correction):
    case = random_case()
    case |= {name: case[name].requires_grad_() for name in ("old_logprobs", "rollout_logprobs")}
    assert not correction(**case).weights.requires_grad


def test_the_log_ratio_is_clamped_after_the_sum():
    old = torch.tensor([[900.0, 0.0], [-900.0, 0.0], [100.0, -99.0], [30.0, 2.0]])
    mask, zeros = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 2)
    expected = {
        "token": [[20, 0], [-20, 0], [20, -20], [20, 2]],
        "sequence": [[20, 20], [-20, -20], [1, 1], [20, 20]],
        "geometric": [[20, 20], [-20, -20], [0.5, 0.5], [16, 16]],
    }
    for level, logs in expected.items():
        ratio = importance_ratio(old, zeros, mask, level)
        torch.testing.assert_close(ratio, torch.tensor(logs).exp(), rtol=1e-6, atol=0)


def test_the_methods_of_the_docstring():
    """Each method that it lists with its options is the one that is tested here."""
    listed = re.findall(r"- (?:The )?([^,:]+?),? ``({.*?})``", re.sub(r"\s+", " ", Correction.__doc__))
    found = {name.lower(): Correction(**yaml.safe_load(options)) for name, options in listed}
    assert found == {
        {"decoupled": "decoupled ppo"}.get(name, name.lower()): correction for name, correction in METHODS.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, r"correction.level must be token, sequence or geometric or null, not 'word'"),
        ({"mask_level": "batch"}, r"correction.mask_level must be token, .* not 'batch'"),
        ({"truncate_above": 0.0}, r"correction.truncate_above must be positive and finite, .* not 0.0"),
        ({"truncate_below": -1.0}, r"correction.truncate_below must be positive .* not -1.0"),
        ({"truncate_above": NAN}, r"correction.truncate_above must be positive .* not nan"),
        ({"mask_level": "token", "mask_above": INFINITY}, r"correction.mask_above must be positive .* not inf"),
        ({"truncate_below": 3.0}, r"correction.truncate_below must be less than truncate_above, which is 2.0, not 3.0"),
        (
            {"mask_level": "token", "mask_above": 0.5, "mask_below": 0.5},
            r"correction.mask_below must be less than mask_above, which is 0.5, not 0.5",
        ),
        ({"mask_above": 3.0}, r"correction.mask_above needs a mask_level, token, .* but mask_level is null"),
        ({"mask_below": 3.0}, r"correction.mask_below needs a mask_level"),
        ({"mask_level": "token"}, r"correction.mask_level is 'token', but mask_above and mask_below are null"),
        ({"bypass": True, "level": "sequence"}, r"correction.level is 'sequence', but with bypass .*: leave it out"),
        ({"bypass": True, "truncate_above": 5.0}, r"correction.truncate_above is 5.0, but with bypass"),
        ({"level": None, "truncate_below": 0.5}, r"correction.truncate_below is 0.5, but without a level"),
        ({"level": None}, r"correction.level and mask_level are null, which corrects nothing: set one of them"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        Correction(**options)


@pytest.mark.parametrize("name", ["old_logprobs", "rollout_logprobs", "mask"])
@pytest.mark.parametrize("correction", [METHODS["MIS"], METHODS["IcePop"]], ids=str)
def test_another_shape_is_refused(correction, name):
    case = random_case(shape=(4, 5))
    with pytest.raises(ValueError, match=r"^shapes differ: .*\[1, 5\]"):
        correction(**case | {name: case[name][:1]})
