"""The guard stops a run whose engine does not draw from the actor's policy, and no other run."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.generation import Engine, NativeEngine, Sampling, native
from lit_rlhf.generation.engine import join_responses
from lit_rlhf.generation.sampling import draw
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.modules import Guard
from lit_rlhf.testing import Recorder
from lit_rlhf.types import PromptBatch

SAMPLING = Sampling(max_tokens=12, temperature=0.8)


class Faulty(Engine):
    """The native engine, which a fault changes: subclasses change the actor, the prompts, or the sampling."""

    def actor(self, actor):
        return actor

    def prompts(self, prompts):
        return prompts

    def sampling(self, sampling):
        return sampling

    def generate(self, actor, prompts, sampling, special_tokens, *, stream, iteration):
        used, options = self.actor(actor), (self.sampling(sampling), special_tokens)
        rollout = NativeEngine().generate(used, self.prompts(prompts), *options, stream=stream, iteration=iteration)
        if rollout.prompt_lengths.equal(prompts.mask.sum(1)):
            return rollout
        # the engine's own prompts are not the trainer's: the trainer joins the responses to its own
        starts, width = rollout.prompt_lengths[:, None], rollout.response_mask.shape[1]
        tokens = rollout.tokens.gather(1, (starts + torch.arange(width)).clamp(max=rollout.tokens.shape[1] - 1))
        return join_responses(
            prompts,
            sampling,
            special_tokens.pad,
            tokens=tokens,
            logprobs=rollout.rollout_logprobs,
            entropy=rollout.rollout_entropy,
            lengths=rollout.response_lengths,
            terminated=rollout.terminated,
        )


class StaleWeights(Faulty):
    """Draws with the weights of the iteration before."""

    def __init__(self, folder):
        self.old = Actor(load_model(folder), SAMPLING.temperature)
        self.waiting = None

    def actor(self, actor):
        if self.waiting is not None:
            self.old.load_state_dict(self.waiting)
        self.waiting = {name: x.clone() for name, x in actor.state_dict().items()}
        return self.old


class OtherTemperature(Faulty):
    def sampling(self, sampling):
        return replace(sampling, temperature=1.0)


class OtherTemplate(Faulty):
    """Renders each prompt with one more token at its beginning."""

    def prompts(self, prompts):
        extra = torch.cat([torch.full_like(prompts.tokens[:, :1], 9), prompts.tokens], 1)
        mask = torch.cat([torch.ones_like(prompts.mask[:, :1]), prompts.mask], 1)
        return PromptBatch(
            tokens=extra, mask=mask, group=prompts.group, prompts=prompts.prompts, columns=prompts.columns
        )


class Truncated(Engine):
    """Draws from the top half of the probability, and reports the renormalised log-probabilities."""

    def generate(self, actor, prompts, sampling, special_tokens, *, stream, iteration):
        def renormalised(logits, u, options, forbidden=None):
            order = logits.argsort(-1, descending=True)
            before = logits.softmax(-1).gather(1, order).cumsum(-1) - logits.softmax(-1).gather(1, order)
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > 0.5)
            return draw(logits.masked_fill(dropped, -1e9), u, options, forbidden)

        original, native.draw = native.draw, renormalised
        try:
            return NativeEngine().generate(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)
        finally:
            native.draw = original


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fault", ["stale weights", "temperature", "template", "truncated"])
def test_a_fault_stops_the_run_before_the_update(make_module, fit, tiny_model, fault, precision):
    engine = {
        "stale weights": lambda: StaleWeights(str(tiny_model("llama"))),
        "temperature": OtherTemperature,
        "template": OtherTemplate,
        "truncated": Truncated,
    }[fault]()
    rate = 1e-2 if precision == "bf16-mixed" else 1e-5  # in float32, the smallest steps are seen
    module = make_module(
        engine=engine,
        iterations=3,
        sampling=SAMPLING,
        actor_optimizer=lambda p: torch.optim.AdamW(p, lr=rate),
    )
    recorder = Recorder()
    with pytest.raises(UserError, match=r"model.engine is out of step: in iteration \d, the mean of") as error:
        fit(module, [recorder], precision=precision)
    assert "\n" not in str(error.value)
    assert len(recorder.metrics) == (1 if fault == "stale weights" else 0)  # in the first iteration, none is stale
    weights = module.actor.state_dict()
    if fault != "stale weights":
        start = Actor(load_model(str(tiny_model("llama"))), 0.8).state_dict()
        assert all(torch.equal(weights[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("llama", "bf16-mixed"),
        ("gpt2", "32-true"),
        pytest.param("llama", "32-true", marks=pytest.mark.long),
        pytest.param("gpt2", "bf16-mixed", marks=pytest.mark.long),
    ],
)
def test_a_healthy_run_is_not_stopped(make_module, fit, tiny_model, precision, architecture):
    recorder = Recorder()
    options = {"actor": str(tiny_model(architecture)), "sampling": SAMPLING, "iterations": 6}
    fit(
        make_module(**options, actor_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), [recorder], precision=precision
    )
    assert len(recorder.metrics) == 6
    most = 1e-5 if precision == "32-true" else 0.03
    for metrics in recorder.metrics:
        assert metrics["engine/mismatch_mean"] < most
        assert metrics["engine/mismatch_mean"] <= metrics["engine/mismatch_max"]
    if precision == "bf16-mixed":
        assert recorder.metrics[-1]["engine/mismatch_mean"] > 0


class Shifted(Engine):
    """The native engine with log-probabilities that are off by a number at the last token of one row."""

    def __init__(self, shift):
        self.shift = shift

    def generate(self, actor, prompts, sampling, special_tokens, *, stream, iteration):
        rollout = NativeEngine().generate(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)
        logprobs = rollout.rollout_logprobs.clone()
        logprobs[0, 0] += self.shift
        return replace(rollout, rollout_logprobs=logprobs)


def test_the_mismatch_by_hand(make_module, fit):
    """One token of all is off by 0.5; the bound is beyond it, and the guard takes all eight rows."""
    recorder = Recorder()
    fit(make_module(engine=Shifted(0.5), iterations=1, guard=Guard(bound=1.0)), [recorder])
    tokens = int(recorder.outputs[0]["scored_rollout"].rollout.response_lengths.sum())
    assert recorder.metrics[0]["engine/mismatch_max"] == pytest.approx(0.5, abs=1e-5)
    assert recorder.metrics[0]["engine/mismatch_mean"] == pytest.approx(0.5 / tokens, abs=1e-6)


def test_not_a_number_is_stopped(make_module, fit):
    with pytest.raises(UserError, match=r"^rollout_logprobs is nan in 1 of 8 responses: stopped before the update"):
        fit(make_module(engine=Shifted(float("nan")), iterations=1))


def test_the_guard_can_be_switched_off(make_module, fit):
    recorder = Recorder()
    fit(make_module(engine=Shifted(100.0), iterations=1, guard=Guard(responses=0)), [recorder])
    assert "engine/mismatch_mean" not in recorder.metrics[0]


@pytest.mark.parametrize(
    ("options", "message"), [({"responses": -1}, "guard.responses"), ({"bound": 0.0}, "guard.bound")]
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Guard(**options)
