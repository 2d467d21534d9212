import math
import random
from fractions import Fraction
from itertools import combinations, permutations, product

import pytest
import torch

from lit_rlhf.algorithms.preference_losses import IPO, Hinge, SimPO
from lit_rlhf.callbacks import ExportAtEnd, IterationCheckpoint
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.modules import DPO
from lit_rlhf.testing import WORDS, Recorder


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr=lr)


def words(rng, most=6):
    return [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(1, most))]


def low(response):
    return sum(int(word[1:]) < 8 for word in response)


def rankings(count, places=(2,), seed=0, prompts=True):
    """Return rankings by the number of words w0 … w7 in each response; a ranking of two is a pair."""
    rng, records = random.Random(seed), []
    while len(records) < count:
        ranked = sorted((words(rng) for _ in range(places[len(records) % len(places)])), key=low, reverse=True)
        if len({low(response) for response in ranked}) < len(ranked):
            continue
        texts = ["".join(f" {word}" for word in response) for response in ranked]
        record = {"chosen": texts[0], "rejected": texts[1]} if len(texts) == 2 else {"responses": texts}
        records.append(record | ({"prompt": " ".join(words(rng, 3))} if prompts else {}))
    return records


@pytest.fixture
def make(tiny_model):
    def build(**options) -> DPO:
        defaults = {"actor": str(tiny_model("llama")), "optimizer": adam(1e-3), "sampling": Sampling(max_tokens=6)}
        return DPO(**(defaults | options))

    return build


def held_out(trainer):
    return {name[4:]: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}


def logprobs_of(module, model, record, response):
    """Return the log-probability of each token of a response, in float64 from transformers' own logits."""
    prompt, whole = (module.tokenizer(record["prompt"] + text)["input_ids"] for text in ("", response))
    tokens = torch.tensor([[*whole, module.tokenizer.eos_token_id]])
    with torch.no_grad():
        logprobs = (model.model(tokens).logits.double() / module.sampling.temperature).log_softmax(-1)
    return [logprobs[0, place - 1, tokens[0, place]].item() for place in range(len(prompt), tokens.shape[1])]


def reward_of(module, record, response):
    """Return the implicit reward, computed in float64 from transformers' own logits."""
    policy, reference = (logprobs_of(module, m, record, response) for m in (module.actor, module.reference))
    return module.beta * (sum(policy) - sum(reference))


@pytest.mark.parametrize("places", [(2,), (3,), (2, 3, 4)])
@pytest.mark.parametrize("cache", [True, False])
def test_at_the_reference_all_orders_are_equally_likely(make, fit_preferences, places, cache):
    recorder = Recorder()
    fit_preferences(make(cache_reference=cache), rankings(12, places), None, [recorder], data={"batch_size": 12})
    expected = sum(math.log(math.factorial(k)) for k in places) / len(places)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(expected, abs=1e-6)
    assert recorder.metrics[0]["train/margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_reference_is_cached_in_the_precision_of_the_steps(make, fit_preferences, precision):
    """With the same rounding, actor and reference give a response the same log-probability."""
    recorder = Recorder()
    module = make(beta=1.0, optimizer=sgd(0.0))
    fit_preferences(module, rankings(48), None, [recorder], precision=precision)
    assert [m["train/margin"] for m in recorder.metrics] == pytest.approx([0.0] * 6, abs=1e-6)
    assert [m["train/loss"] for m in recorder.metrics] == pytest.approx([math.log(2)] * 6, abs=1e-6)


@pytest.mark.parametrize(("places", "loss"), [((2,), 0.5), ((2, 3, 4), 1.3)])
def test_it_learns(make, fit_preferences, tiny_model, places, loss):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    actor = RandomWeights(config | {"intermediate_size": 48}, str(tiny_model("llama")))
    recorder, module = Recorder(), make(actor=actor, beta=0.3, optimizer=adam(1e-2))
    records, others = rankings(240, places), rankings(60, places, seed=1)
    found = held_out(fit_preferences(module, records, others, [recorder], max_epochs=3, data={"batch_size": 24}))
    assert found["accuracy"] > 0.85
    assert found["margin"] > 1
    assert found["loss"] < loss
    assert recorder.metrics[-1]["train/loss"] < 0.6 * recorder.metrics[0]["train/loss"]
    assert recorder.metrics[-1]["progress/iteration"] == 30


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_loss_and_metrics_are_those_of_the_implicit_rewards(make, fit_preferences, temperature):
    records = rankings(10, seed=1)
    module = make(beta=0.7, optimizer=adam(1e-2), sampling=Sampling(max_tokens=6, temperature=temperature))
    fit_preferences(module, rankings(16), max_epochs=2)
    found = held_out(fit_preferences(module, None, records, method="validate"))
    ahead = [reward_of(module, r, r["chosen"]) - reward_of(module, r, r["rejected"]) for r in records]
    assert max(abs(a) for a in ahead) > 0.1
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-a)) for a in ahead) / 10, abs=1e-4)
    assert found["margin"] == pytest.approx(sum(ahead) / 10, abs=1e-4)
    assert found["accuracy"] == pytest.approx(sum(a > 0 for a in ahead) / 10)


def mean_logprob(module, record, response):
    """Return SimPO's score of a response, without the reference."""
    logprobs = logprobs_of(module, module.actor, record, response)
    return module.beta * sum(logprobs) / len(logprobs)


@pytest.mark.parametrize(
    ("loss", "score", "of_pair"),
    [
        (IPO(), reward_of, lambda d: (d / 0.7 - 1 / 1.4) ** 2),
        (Hinge(), reward_of, lambda d: max(0.0, 1 - d)),
        (SimPO(gamma=0.3), mean_logprob, lambda d: math.log1p(math.exp(0.3 - d))),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_losses_of_pairs_and_of_all_pairs_of_rankings(make, fit_preferences, loss, score, of_pair):
    records, module = rankings(6, (2, 3), seed=1), make(beta=0.7, optimizer=adam(3e-4), loss=loss)
    recorder = Recorder()
    fit_preferences(module, rankings(32), None, [recorder], max_epochs=4)
    assert recorder.metrics[-1]["train/loss"] < 0.9 * recorder.metrics[0]["train/loss"]
    found, expected = held_out(fit_preferences(module, None, records, method="validate")), 0.0
    for record in records:
        ranked = record.get("responses") or [record["chosen"], record["rejected"]]
        scores = [score(module, record, response) for response in ranked]
        of_pairs = [of_pair(better - worse) for better, worse in combinations(scores, 2)]
        expected += sum(of_pairs) / len(of_pairs) / len(records)
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_without_a_place_for_a_margin(make, fit_preferences):
    with pytest.raises(UserError, match=r"^model\.loss IPO has no place for the data's margins$"):
        fit_preferences(make(loss=IPO()), [r | {"gap": 2.0} for r in rankings(8)], data={"margin": "gap"})


@pytest.mark.parametrize("records", [rankings(24), rankings(24, (2, 3, 4))], ids=["pairs", "rankings"])
@pytest.mark.parametrize("iterations", [1, 5])
def test_the_cached_reference_is_the_reference(make, fit_preferences, records, iterations):
    results = []
    for cache in (True, False):
        recorder = Recorder()
        module = make(cache_reference=cache, optimizer=sgd(0.05), iterations=iterations)
        fit_preferences(module, records, None, [recorder])
        results.append((recorder.weights, [m["train/loss"] for m in recorder.metrics]))
    for name, weight in results[0][0].items():
        torch.testing.assert_close(weight, results[1][0][name], rtol=0, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)
    assert len(set(results[0][1])) == iterations


@pytest.mark.parametrize("cache", [True, False])
def test_micro_batches_do_not_change_the_result(make, fit_preferences, cache):
    results, records = [], rankings(24, (2, 3, 4))
    for max_tokens in (64, 4096):
        recorder = Recorder()
        module = make(max_tokens=max_tokens, cache_reference=cache, optimizer=sgd(0.05), iterations=2)
        fit_preferences(module, records, None, [recorder], data={"batch_size": 12})
        results.append(recorder.weights)
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=1e-6)


def test_a_reference_that_differs_from_the_initial_actor(make, fit_preferences, tiny_model):
    other = str(tiny_model("llama", seed=1))
    records = rankings(8)
    module, recorder = make(reference=other, beta=0.05, optimizer=sgd(0.0)), Recorder()
    fit_preferences(module, records, records, [recorder])
    weights = load_model(other).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in module.reference.model.state_dict().items())
    ahead = [reward_of(module, r, r["chosen"]) - reward_of(module, r, r["rejected"]) for r in records]
    expected = sum(math.log1p(math.exp(-a)) for a in ahead) / 8
    assert expected != pytest.approx(math.log(2), abs=1e-2)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_sets_the_best_margin(make, fit_preferences, smoothing):
    """For a single pair, the best margin is the log-odds that the label is right."""
    recorder = Recorder()
    module = make(
        label_smoothing=smoothing,
        beta=1.0,
        optimizer=adam(2e-3),
        iterations=100,
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 100),
    )
    fit_preferences(module, rankings(1), None, [recorder], data={"batch_size": 1})
    assert recorder.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert recorder.metrics[-1]["train/margin"] == pytest.approx(math.log((1 - smoothing) / smoothing), abs=0.02)


def test_label_smoothing_of_rankings_is_refused(make, fit_preferences):
    with pytest.raises(UserError, match=r"^model\.label_smoothing is for pairs"):
        fit_preferences(make(label_smoothing=0.1), rankings(8, (3,)))


def test_a_margin_changes_the_loss(make, fit_preferences):
    recorder = Recorder()
    fit_preferences(make(), [r | {"gap": 2.0} for r in rankings(8)], None, [recorder], data={"margin": "gap"})
    assert recorder.metrics[0]["train/loss"] == pytest.approx(math.log1p(math.exp(2)), abs=1e-6)


def test_kl_to_the_reference(make, fit_preferences):
    module, records = make(optimizer=adam(3e-3)), rankings(48, seed=1)
    before = held_out(fit_preferences(module, None, records, method="validate"))
    assert before["kl_to_ref"] == 0
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0 < before["length"] <= 6
    after = held_out(fit_preferences(module, rankings(64), records, max_epochs=2))
    assert after["kl_to_ref"] > 0.01
    again = held_out(fit_preferences(module, None, records, method="validate"))
    assert again["kl_to_ref"] == pytest.approx(after["kl_to_ref"], abs=1e-5)
    in_small_batches = held_out(
        fit_preferences(module, None, records, method="validate", data={"validation_batch_size": 7})
    )
    assert in_small_batches["kl_to_ref"] == pytest.approx(after["kl_to_ref"], abs=1e-4)


class Started(NativeEngine):
    """An engine that needs a start, and an end, as a server does."""

    def start(self, context):
        self.__dict__["contexts"] = [*self.__dict__.get("contexts", []), context]

    def close(self):
        self.__dict__["closed"] = self.__dict__.get("closed", 0) + 1

    def generate(self, *arguments, **options):
        assert len(self.__dict__["contexts"]) == 1 + self.__dict__.get("closed", 0)
        return super().generate(*arguments, **options)


def test_the_engine_is_started_and_closed(make, fit_preferences):
    engine, records = Started(), rankings(8, seed=1)
    module = make(engine=engine)
    for runs, method in enumerate(("fit", "validate"), 1):
        found = held_out(fit_preferences(module, records, records, method=method))
        assert found["kl_to_ref"] >= 0
        assert len(engine.__dict__["contexts"]) == engine.__dict__["closed"] == runs
    context = engine.__dict__["contexts"][0]
    assert context.tokenizer is module.tokenizer
    fresh = make()
    fresh.configure_model()
    initial = context.load_actor().state_dict()
    assert all(torch.equal(weight, initial[name]) for name, weight in fresh.actor.state_dict().items())


def test_records_without_a_prompt_are_trained_but_have_no_kl(make, fit_preferences):
    records = rankings(24, prompts=False)
    found = held_out(fit_preferences(make(optimizer=adam(3e-3)), records, records, max_epochs=4))
    assert found["accuracy"] > 0.8
    assert "kl_to_ref" not in found
    assert "length" not in found


def test_texts_that_already_differ_at_the_first_token(fit_preferences):
    """Without a beginning-of-sequence token nothing predicts the first token; only the others are learned."""
    source = RandomWeights(CONFIG, f"{__file__}:letters")
    module, recorder = DPO(source, beta=1.0, optimizer=sgd(0.0)), Recorder()
    module.configure_model()
    with torch.no_grad():
        for weight in module.actor.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    trainer = fit_preferences(module, [{"chosen": "a b c", "rejected": "b"}], None, [recorder], data={"batch_size": 1})
    (batch,) = trainer.train_dataloader.once()
    chosen, rejected = (
        log_probability(module.actor, row, max(1, prompt)) - log_probability(module.reference, row, max(1, prompt))
        for row, prompt in (
            (tokens[: int(length)].tolist(), int(prompt))
            for tokens, length, prompt in zip(batch.tokens, batch.lengths, batch.prompt_lengths, strict=True)
        )
    )
    assert abs(float(chosen - rejected)) > 0.01
    assert recorder.metrics[0]["train/margin"] == pytest.approx(float(chosen - rejected), abs=1e-5)


def test_conversations(fit_preferences, tiny_model):
    records = []
    for record in rankings(24, (2, 3)):
        turns = {"prompt": [{"role": "user", "content": record.pop("prompt")}]}
        records.append({k: v[1:] if isinstance(v, str) else [r[1:] for r in v] for k, v in record.items()} | turns)
    actor = str(tiny_model("llama", chat=True))
    module = DPO(actor, optimizer=adam(3e-3), sampling=Sampling(max_tokens=6))
    found = held_out(fit_preferences(module, records, records, max_epochs=4))
    assert found["accuracy"] > 0.8
    assert found["kl_to_ref"] > 0


@pytest.mark.parametrize("cache", [True, False])
def test_resuming_from_a_checkpoint_is_bitwise_exact(make, fit_preferences, tmp_path, cache):
    records = rankings(28, (2, 3))
    whole, rest = Recorder(), Recorder()

    def run(iterations, callbacks, **options):
        module = make(
            iterations=iterations,
            cache_reference=cache,
            optimizer=adam(3e-3),
            scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        )
        return fit_preferences(module, records, rankings(20, seed=1), callbacks, **options)

    expected = held_out(run(7, [whole]))
    run(4, [IterationCheckpoint(every_n=4)])
    (path,) = tmp_path.rglob("last.ckpt")
    found = held_out(run(7, [rest], ckpt_path=str(path)))
    assert len(rest.metrics) == 3
    for name in ("train/loss", "train/margin", "train/grad_norm", "train/lr", "progress/iteration"):
        assert [m[name] for m in rest.metrics] == [m[name] for m in whole.metrics[4:]]
    assert whole.weights.keys() == rest.weights.keys()
    assert all(torch.equal(rest.weights[name], weight) for name, weight in whole.weights.items())
    assert found == expected


def test_the_reference_is_not_in_the_checkpoint_and_stays_fixed(make, fit_preferences, tiny_model, tmp_path):
    module = make(optimizer=adam(1e-2))
    fit_preferences(module, rankings(16), rankings(4), [IterationCheckpoint(), ExportAtEnd()], max_epochs=2)
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if not name.startswith(("actor.", "iteration"))]
    start = load_model(str(tiny_model("llama"))).state_dict()
    assert all(torch.equal(weight, start[name]) for name, weight in module.reference.model.state_dict().items())
    assert not any(p.requires_grad for p in module.reference.parameters())
    exported = load_model(str(tmp_path / "export")).state_dict()
    assert exported.keys() == start.keys()
    assert any(not torch.equal(weight, start[name]) for name, weight in exported.items())
    assert all(torch.equal(weight, exported[name]) for name, weight in module.actor.model.state_dict().items())


CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "initializer_range": 0.3}
LETTERS = ("a", "b", "c")


def letters():
    """Return a tokenizer of three letters and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(("<end>", *LETTERS))}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", padding_side="left")


@torch.no_grad()
def log_probability(actor: Actor, row, prompt):
    """Return the log-probability of the tokens after the prompt."""
    tokens = torch.tensor([row])
    return actor(tokens, torch.arange(len(row))[None] >= prompt).logprobs.double().sum()


def in_proportion(odds, places):
    """Yield every order of every subset exactly in proportion to its Plackett–Luce probability."""
    for subset in combinations(odds, places):
        probability = {}
        for order in permutations(subset):
            weights = [odds[response] for response in order]
            probability[order] = math.prod(Fraction(w, sum(weights[k:])) for k, w in enumerate(weights))
        whole = math.lcm(*(p.denominator for p in probability.values()))
        for order, p in probability.items():
            yield from [order] * int(p * whole)


@pytest.mark.parametrize(
    ("places", "longest", "steps", "lr", "beta"),
    [
        (2, 1, 40, 2e-2, 0.5),
        pytest.param(3, 1, 30, 2e-2, 1.0, marks=pytest.mark.long),
        *(pytest.param(2, 2, 160, 1e-2, beta, marks=pytest.mark.long) for beta in (0.5, 1.0)),
        pytest.param(3, 1, 80, 1e-2, 0.5, marks=pytest.mark.long),
    ],
)
def test_the_policy_is_the_closed_form(fit_preferences, places, longest, steps, lr, beta):
    """π(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x), over the responses in the preferences."""
    responses = [" ".join(r) for length in range(longest + 1) for r in product(LETTERS, repeat=length)]
    odds = {
        start: {response: (1, 2, 4)[i * step % 3] for i, response in enumerate(responses)}
        for step, start in ((1, "a"), (2, "b"))
    }
    records = [
        {"prompt": start, "responses": [f" {response}" for response in order]}
        for start in odds
        for order in in_proportion(odds[start], places)
    ]
    module = DPO(
        RandomWeights(CONFIG, f"{__file__}:letters"),
        beta=beta,
        clip_grad_norm=None,
        optimizer=adam(lr),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / (steps + 1)),
        iterations=steps,
    )
    fit_preferences(module, records, data={"batch_size": len(records)})
    for start, of_start in odds.items():
        rows = [module.tokenizer(f"{start} {response} <end>")["input_ids"] for response in responses]
        policy, reference = (
            torch.stack([log_probability(actor, row, 1) for row in rows]) for actor in (module.actor, module.reference)
        )
        reward = torch.tensor([math.log(of_start[response]) for response in responses])
        expected = (reference + reward / beta).softmax(0)
        assert (reference.softmax(0) - expected).abs().sum() / 2 > 0.1
        assert (policy.softmax(0) - expected).abs().sum() / 2 < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"^model\.beta must be positive, not 0\.0$"),
        ({"beta": -1.0}, r"^model\.beta must be positive, not -1\.0$"),
        ({"beta": math.inf}, r"^model\.beta must be positive, not inf$"),
        ({"beta": math.nan}, r"^model\.beta must be positive, not nan$"),
        ({"label_smoothing": 0.1, "loss": IPO()}, r"^model\.label_smoothing must be 0 with model\.loss IPO, not 0\.1$"),
        ({"label_smoothing": 0.5}, r"^model\.label_smoothing must be in \[0, 0\.5\), not 0\.5$"),
        ({"max_tokens": 0}, r"^model\.max_tokens must be 1 or more, not 0$"),
        ({"clip_grad_norm": 0.0}, r"^model\.clip_grad_norm must be positive or null, not 0\.0$"),
        ({"sampling": Sampling(temperature=0.0)}, r"^model\.sampling\.temperature must be positive"),
    ],
)
def test_numbers_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_without_a_model():
    with pytest.raises(UserError, match=r"^model\.actor is not set"):
        DPO()


def test_the_cache_needs_the_data_module(make, make_trainer):
    message = r"^model\.cache_reference takes its batches from .* Preferences, not from a DataLoader; set it to false$"
    with pytest.raises(UserError, match=message):
        make_trainer().fit(make(), torch.utils.data.DataLoader([0]))
