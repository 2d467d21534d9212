import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lit_rlhf.generation import Sampling
from lit_rlhf.generation.sampling import draw

VOCABULARY = 20
MANY = 2**16
LARGEST = 1 - 2**-24
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_k": VOCABULARY + 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.8},
]


def sample(logits, uniforms, sampling, forbidden=None):
    """Return only the sampled tokens; ``forbidden`` contains token ids that are the same for all rows."""
    never = None
    if forbidden is not None:
        never = torch.zeros_like(logits, dtype=torch.bool)
        never[:, forbidden] = True
    return draw(logits, uniforms, sampling, never)[0]


def make_logits(seed=0, rows=1):
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def distribution(logits, sampling, forbidden=()):
    """Return the expected probabilities of the tokens, computed by sorting lists of floats."""
    weights = {t: x / sampling.temperature for t, x in enumerate(logits.tolist()) if t not in forbidden}
    most = max(weights.values())
    weights = {t: 2.718281828459045 ** (x - most) for t, x in weights.items()}
    order = sorted(weights, key=weights.get, reverse=True)[: sampling.top_k or None]
    total = sum(weights[t] for t in order)
    below = [0.0, *itertools.accumulate(weights[t] / total for t in order)]
    order = [t for t, before in zip(order, below, strict=False) if before < sampling.top_p]
    total = sum(weights[t] for t in order)
    return [weights[t] / total if t in order else 0.0 for t in range(len(logits))]


def frequencies(logits, sampling, forbidden=None):
    """Return how often each token is drawn if the uniform numbers are spread evenly over [0, 1)."""
    even = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    tokens = sample(logits.expand(MANY, -1), even, sampling, forbidden)
    assert (tokens.diff() >= 0).all()  # as the inverse of a cumulative distribution must be
    return tokens.bincount(minlength=VOCABULARY) / MANY


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("forbidden", [(), (3, 11, 12)])
def test_frequencies(setting, forbidden):
    for seed in range(3):
        logits, sampling = make_logits(seed), Sampling(**setting)
        expected = torch.tensor(distribution(logits[0], sampling, forbidden))
        drawn = frequencies(logits, sampling, torch.tensor(forbidden) if forbidden else None)
        torch.testing.assert_close(drawn, expected, atol=2 / MANY, rtol=0)
        assert (drawn[expected == 0] == 0).all()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_tokens_remain_as_in_transformers(setting):
    logits, sampling = make_logits(rows=50), Sampling(**setting)
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    for row, remaining in zip(logits, warped.isfinite(), strict=True):
        assert [p > 0 for p in distribution(row, sampling)] == remaining.tolist()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_ends_of_the_interval(setting):
    logits, sampling, forbidden = make_logits(), Sampling(**setting), (0, VOCABULARY - 1)
    possible = [t for t, p in enumerate(distribution(logits[0], sampling, forbidden)) if p > 0]
    ends = torch.tensor([0.0, LARGEST], dtype=torch.float64)
    tokens = sample(logits.expand(2, -1), ends, sampling, torch.tensor(forbidden))
    assert tokens.tolist() == [possible[0], possible[-1]]


def test_rounding_never_gives_a_token_outside_the_vocabulary():
    logits = torch.randn(50, 30_000, generator=torch.Generator().manual_seed(0))
    assert (logits.softmax(-1).double().sum(-1) < LARGEST).any()
    assert sample(logits, torch.full((50,), LARGEST, dtype=torch.float64), Sampling()).max() < 30_000


@pytest.mark.parametrize("setting", [*SETTINGS, {"temperature": 0}], ids=str)
def test_logprobs_are_those_of_the_whole_distribution(setting):
    logits, sampling = make_logits(rows=30), Sampling(**setting)
    u = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    never = torch.zeros_like(logits, dtype=torch.bool)
    never[:10, 3] = True
    tokens, logprobs, entropy = draw(logits, u, sampling, never)
    assert not (tokens[:10] == 3).any()
    expected = torch.distributions.Categorical(logits=logits / (sampling.temperature or 1.0))
    torch.testing.assert_close(logprobs, expected.log_prob(tokens))
    torch.testing.assert_close(entropy, expected.entropy())


def test_numbers_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log()
    drawn = {0.0: 0, 0.09: 0, 0.11: 1, 0.29: 1, 0.31: 3, 0.59: 3, 0.61: 4, LARGEST: 4}
    uniforms = torch.tensor(list(drawn), dtype=torch.float64)
    assert sample(logits.expand(len(drawn), -1), uniforms, Sampling()).tolist() == list(drawn.values())


def test_rows_are_drawn_independently():
    logits, u = make_logits(rows=40), torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(top_k=5, top_p=0.9)
    alone = [sample(logits[i : i + 1], u[i : i + 1], sampling).item() for i in range(40)]
    assert sample(logits, u, sampling).tolist() == alone


def test_temperature_0_takes_the_most_likely_token():
    logits = make_logits(rows=10)
    u = torch.full((10,), LARGEST, dtype=torch.float64)
    assert torch.equal(sample(logits, u, Sampling(temperature=0)), logits.argmax(1))
    best = logits.argmax(1)[:1]
    second = logits[:1].topk(2).indices[0, 1].item()
    assert sample(logits[:1], u[:1], Sampling(temperature=0), forbidden=best).item() == second


def test_logits_are_not_changed():
    logits = make_logits()
    before = logits.clone()
    settings = Sampling(temperature=0.5, top_k=4, top_p=0.9)
    sample(logits, torch.tensor([0.5], dtype=torch.float64), settings, torch.tensor([1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("min_tokens", -1), ("min_tokens", 129), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("responses", 0)],
)  # fmt: skip
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^sampling\.{field} must .*{value}$"):
        Sampling(**{field: value})


class NoFloatingCumsum(TorchFunctionMode):
    """Refuses cumulative sums of floating-point numbers, as a GPU does if algorithms must be deterministic."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.cumsum, torch.Tensor.cumsum) and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_deterministic_algorithms_draw_the_same(setting):
    logits, sampling = make_logits(rows=500), Sampling(**setting)
    u = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sample(logits, u, sampling)
    torch.use_deterministic_algorithms(True)
    try:
        with NoFloatingCumsum():
            assert torch.equal(sample(logits, u, sampling), expected)
    finally:
        torch.use_deterministic_algorithms(False)
