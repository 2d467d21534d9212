import json
import math
import random

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.callbacks import ExportAtEnd, IterationCheckpoint
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.modules import RewardModeling, reward_modeling
from lit_rlhf.testing import WORDS, Recorder


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr=lr)


def words(rng, most=6, least=1):
    return [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(least, most))]


def low(response):
    return sum(int(word[1:]) < 8 for word in response)


def low_pairs(count, seed=0):
    """Return pairs whose chosen response has more of the words w0 … w7."""
    rng, records = random.Random(seed), []
    while len(records) < count:
        one, other = words(rng), words(rng)
        if low(one) == low(other):
            continue
        better, worse = sorted([one, other], key=low, reverse=True)
        records.append(record(words(rng, 3), chosen=better, rejected=worse))
    return records


def low_rankings(count, places=(2, 3, 4), seed=0):
    """Return responses ranked by how many of the words w0 … w7 they have."""
    rng, records = random.Random(seed), []
    while len(records) < count:
        ranked = sorted((words(rng) for _ in range(places[len(records) % len(places)])), key=low, reverse=True)
        if len({low(response) for response in ranked}) == len(ranked):
            records.append(record(words(rng, 3), responses=ranked))
    return records


def record(prompt, **responses):
    def text(response):
        return "".join(f" {word}" for word in response)

    ranked = {k: [text(r) for r in v] if k == "responses" else text(v) for k, v in responses.items()}
    return {"prompt": " ".join(prompt)} | ranked


@pytest.fixture
def make(tiny_model):
    def build(**options) -> RewardModeling:
        return RewardModeling(**({"reward": str(tiny_model("llama")), "optimizer": adam(1e-2)} | options))

    return build


def all_scores(module, loader):
    """Return the score of every response of every ranking, computed one response at a time."""
    scores = []
    with torch.no_grad():
        for batch in loader:
            for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
                scores.append(module.reward(row[None, :length])[0, -1].item())
    return torch.tensor(scores, dtype=torch.float64)


def score_of(module, prompt, response):
    ids = module.tokenizer(f"{prompt} {response}")["input_ids"]
    with torch.no_grad():
        return module.reward(torch.tensor([[*ids, module.tokenizer.eos_token_id]]))[0, -1].item()


def small_model(tiny_model):
    """Return the source of a model with one layer and weights of the usual small size."""
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return RandomWeights(config=config | {"num_attention_heads": 4}, tokenizer=str(tiny_model("llama")))


def test_accuracy_rises_with_training(make, fit_preferences, tiny_model):
    recorder, module = Recorder(), make(reward=small_model(tiny_model))
    trainer = fit_preferences(
        module, low_pairs(480), low_pairs(120, seed=1), [recorder], max_epochs=4, data={"batch_size": 32}
    )
    metrics = trainer.callback_metrics
    assert float(metrics["val/accuracy"]) > 0.9
    assert float(metrics["val/margin"]) > 1
    assert float(metrics["val/loss"]) < 0.3
    assert recorder.metrics[-1]["train/loss"] < 0.3 * recorder.metrics[0]["train/loss"]
    assert [m["progress/iteration"] for m in recorder.metrics] == list(range(1, 61))


def test_a_linear_reward_is_recovered_from_sampled_preferences(fit_preferences, tiny_model):
    """The preferences are sampled from a Bradley–Terry model whose reward is linear in the word counts."""
    rng = random.Random(0)
    weights = {f"w{i}": rng.gauss(0, 1) for i in range(WORDS)}

    def true(response):
        return sum(weights[word] for word in response)

    def sample():
        one, other = words(rng, 8), words(rng, 8)
        if one == other:
            return sample()
        wins = rng.random() < 1 / (1 + math.exp(true(other) - true(one)))
        return record(words(rng, 2, 2), chosen=one if wins else other, rejected=other if wins else one)

    pairs = [sample() for _ in range(3000)]
    module = RewardModeling(
        small_model(tiny_model),
        optimizer=adam(1e-2),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 181),
    )
    fit_preferences(module, pairs, max_epochs=3, data={"batch_size": 50})
    held_out = [words(rng, 8) for _ in range(300)]
    scores = torch.tensor([[score_of(module, "w1 w2", " ".join(r)) for r in held_out], [true(r) for r in held_out]])
    ranks = scores.argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] >= 0.95


@pytest.mark.parametrize("places", [(2,), (3,), (4,), (2, 3, 4)])
def test_the_first_loss_is_that_of_equal_scores(make, fit_preferences, places):
    recorder = Recorder()
    fit_preferences(make(), low_rankings(12, places), None, [recorder], data={"batch_size": 12})
    expected = sum(math.log(math.factorial(k)) for k in places) / len(places)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(expected, abs=1e-6)
    assert recorder.metrics[0]["train/accuracy"] == 0.5
    assert recorder.metrics[0]["train/margin"] == 0


@pytest.mark.parametrize("as_pairs", [False, True])
def test_rankings_of_different_sizes_train(make, fit_preferences, tiny_model, as_pairs):
    module, data = make(reward=small_model(tiny_model)), {"batch_size": 60 if as_pairs else 20, "as_pairs": as_pairs}
    trainer = fit_preferences(module, low_rankings(300), low_rankings(60, seed=1), max_epochs=3, data=data)
    assert float(trainer.callback_metrics["val/accuracy"]) > 0.9


@pytest.mark.parametrize("records", [low_pairs(24), low_rankings(24)], ids=["pairs", "rankings"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_do_not_change_the_result(make, fit_preferences, records, clip):
    results = []
    for max_tokens in (64, 4096):
        recorder = Recorder()
        module = make(max_tokens=max_tokens, optimizer=sgd(0.1), clip_grad_norm=clip)
        trainer = fit_preferences(
            module, records, records, [recorder], data={"batch_size": 12, "validation_batch_size": 12}
        )
        held_out = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        results.append((recorder.weights, recorder.metrics[-1]["train/loss"], held_out))
    for name, weight in results[0][0].items():
        torch.testing.assert_close(weight, results[1][0][name], rtol=0, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)
    assert results[0][2] == pytest.approx(results[1][2], abs=1e-5)


def test_the_scores_mean_and_deviation_are_those_of_the_training_set(make, fit_preferences, tmp_path):
    recorder = Recorder()
    records = low_rankings(21)
    module = make(max_tokens=64)
    trainer = fit_preferences(module, records, None, [recorder, ExportAtEnd(), IterationCheckpoint()], max_epochs=2)
    scores = all_scores(module, trainer.train_dataloader.once())
    assert len(scores) == 7 * (2 + 3 + 4)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (path,) = tmp_path.rglob("last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    mean, std = scores.mean().item(), scores.std(unbiased=False).item()
    assert std > 0.1
    for saved in (config, module.state_dict(), recorder.weights, state):
        assert float(saved["score_mean"]) == pytest.approx(mean, abs=1e-6)
        assert float(saved["score_std"]) == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize(("at_epoch_end", "every_n"), [(False, 100), (None, 1)], ids=["after_validation", "default"])
def test_a_model_that_is_stopped_and_the_best_one_have_mean_and_deviation(
    make, fit_preferences, tmp_path, at_epoch_end, every_n
):
    """The second validation is not better than the first by 10, so it ends the run; the first one is the best."""
    records, module = low_pairs(24), make(max_tokens=64)
    stop = EarlyStopping("val/loss", patience=1, min_delta=10, check_on_train_epoch_end=at_epoch_end)
    save = IterationCheckpoint(
        every_n=every_n, keep_every_n=1 if every_n == 1 else None, monitor="val/loss", mode="max"
    )
    trainer = fit_preferences(module, records, records, [stop, ExportAtEnd(), save], max_epochs=9)
    assert int(module.iteration) == 6
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    states = {path.name: torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.rglob("*.ckpt")}
    assert int(states["best.ckpt"]["iteration"]) == 3
    loader = trainer.train_dataloader
    for name, saved in (("last.ckpt", config), ("last.ckpt", states["last.ckpt"]), ("best.ckpt", states["best.ckpt"])):
        module.load_state_dict(states[name])
        scores = all_scores(module, loader.once())
        assert float(saved["score_mean"]) == pytest.approx(scores.mean().item(), abs=1e-6)
        assert float(saved["score_std"]) == pytest.approx(scores.std(unbiased=False).item(), abs=1e-6)
    others = [state["score_mean"] for state in states.values() if int(state["iteration"]) not in (3, 6)]
    assert len(others) == (4 if every_n == 1 else 0)
    assert all(mean.isnan() for mean in others)


def test_a_finished_run_without_batches_is_exported_again(make, fit_preferences, tmp_path):
    records, save = low_pairs(24), IterationCheckpoint(every_n=2, keep_every_n=2)
    fit_preferences(make(max_tokens=64), records, None, [save], max_epochs=1)
    start = str(tmp_path / "checkpoints" / "iteration-000002.ckpt")
    options = {"max_epochs": 1, "limit_train_batches": 0, "ckpt_path": start}
    fit_preferences(make(max_tokens=64), records, None, [ExportAtEnd()], **options)
    assert "score_mean" not in json.loads((tmp_path / "export" / "config.json").read_text())


def test_a_larger_training_set_is_measured_on_a_sample(make, fit_preferences, monkeypatch):
    monkeypatch.setattr(reward_modeling, "MEASURED", 10)
    module = make(max_tokens=64)
    loader = fit_preferences(module, low_pairs(30), None, data={"batch_size": 4}).train_dataloader
    sample, whole = all_scores(module, loader.once(10)), all_scores(module, loader.once())
    assert (len(sample), len(whole)) == (20, 60)
    assert float(module.score_mean) == pytest.approx(sample.mean().item(), abs=1e-6)
    assert float(module.score_std) == pytest.approx(sample.std(unbiased=False).item(), abs=1e-6)
    assert float(module.score_mean) != pytest.approx(whole.mean().item(), abs=1e-3)


def test_mean_and_deviation_are_measured_once_at_the_end(make, fit_preferences):
    class Watch(lightning.Callback):
        def __init__(self):
            self.means = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.means.append(float(module.score_mean))

    for options, last in (({"max_epochs": 2}, 6), ({"iterations": 4}, 4)):
        watch = Watch()
        module = make(iterations=options.pop("iterations", None))
        fit_preferences(module, low_pairs(24), None, [watch], **options)
        assert [math.isnan(mean) for mean in watch.means] == [True] * (last - 1) + [False]


def test_a_limit_on_the_batches_of_an_epoch(make, fit_preferences, tmp_path):
    """An epoch has 8 batches; one that ends after 5 leaves the next one as long; a resumed run has the same bits."""
    weights = []
    for start in (None, str(tmp_path / "checkpoints" / "iteration-000006.ckpt")):
        module, recorder = make(max_tokens=256), Recorder()
        callbacks = [recorder, IterationCheckpoint(every_n=1, keep_every_n=1)]
        options = {"ckpt_path": start, "max_epochs": 2, "limit_train_batches": 5}
        fit_preferences(module, low_pairs(32), None, callbacks, data={"batch_size": 4}, **options)
        assert int(module.iteration) == 10
        assert torch.isfinite(module.score_mean)
        weights.append(recorder.weights)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_export_is_a_classifier_of_transformers(fit_preferences, tiny_model, tmp_path, architecture):
    module = RewardModeling(str(tiny_model(architecture)), optimizer=adam(1e-2))
    fit_preferences(module, low_pairs(48), None, [ExportAtEnd()], max_epochs=2)
    folder = tmp_path / "export"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token != tokenizer.eos_token
    texts = [f"{r['prompt']}{r['chosen']}" for r in low_pairs(20, seed=2)]
    expected = [score_of(module, r["prompt"], r["chosen"].strip()) for r in low_pairs(20, seed=2)]
    tokenizer.padding_side = "right"
    batch = tokenizer([f"{text} {tokenizer.eos_token}" for text in texts], return_tensors="pt", padding=True)
    assert len({int(length) for length in batch["attention_mask"].sum(1)}) > 1
    with torch.no_grad():
        scores = classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 0.1
    again = RewardModeling(str(folder))
    again.configure_model()
    assert score_of(again, "w1", "w2") == pytest.approx(score_of(module, "w1", "w2"), abs=1e-6)


def test_training_starts_from_a_classifier_with_its_head(make, fit_preferences, tiny_model):
    folder = str(tiny_model("llama", task="score"))
    recorder, records = Recorder(), low_pairs(8)
    module = make(reward=folder, optimizer=sgd(0.0))
    fit_preferences(module, records, None, [recorder])
    classifier = load_model(folder, "score")
    assert torch.equal(module.reward.head.weight, classifier.score.weight)
    losses = []
    with torch.no_grad():
        for r in records:
            ids = [module.tokenizer(r["prompt"] + r[name])["input_ids"] for name in ("chosen", "rejected")]
            chosen, rejected = (classifier(torch.tensor([[*i, 1]])).logits.item() for i in ids)
            losses.append(math.log1p(math.exp(rejected - chosen)))
    assert recorder.metrics[0]["train/loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert recorder.metrics[0]["train/loss"] != pytest.approx(math.log(2), abs=1e-3)


class ByFirstWord(RewardModeling):
    """Scores each response by its first word."""

    def scores(self, batch):
        table = {"w0": 0.0, "w1": math.log(3), "w2": math.log(19)}
        first = batch.tokens.gather(1, batch.prompt_lengths[:, None]).squeeze(1).tolist()
        return torch.tensor([table[word] for word in self.tokenizer.convert_ids_to_tokens(first)])


@pytest.mark.parametrize("validation_batch_size", [1, 2, 64])
@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_held_out_metrics_by_hand(fit_preferences, tiny_model, validation_batch_size, max_tokens):
    pairs = [  # σ(log 3) = 0.75, σ(log 19) = 0.95
        (" w1 w9 w9", " w0"),  # ahead by log 3, longer
        (" w1", " w0 w9"),  # ahead by log 3, shorter
        (" w0 w9", " w1"),  # behind by log 3, longer
        (" w2", " w0"),  # ahead by log 19, equally long
        (" w0", " w2 w9"),  # behind by log 19, shorter
    ]
    records = [{"prompt": "w5", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    module = ByFirstWord(str(tiny_model("llama")), max_tokens=max_tokens)
    sizes = {"validation_batch_size": validation_batch_size}
    trainer = fit_preferences(module, None, records, method="validate", data=sizes)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    losses = [math.log(4 / 3)] * 2 + [math.log(4), math.log(20 / 19), math.log(20)]
    scores = [math.log(3)] * 3 + [math.log(19)] * 2 + [0.0] * 5
    mean = sum(scores) / 10
    expected = {
        "val/loss": sum(losses) / 5,
        "val/accuracy": 3 / 5,
        "val/margin": math.log(3) / 5,
        "val/accuracy_of_length": (2 + 0.5) / 5,
        "val/accuracy_if_longer": 1 / 2,
        "val/accuracy_if_shorter": 1 / 2,
        "val/score": mean,
        "val/score_std": (sum((s - mean) ** 2 for s in scores) / 10) ** 0.5,
        "val/ece": 3 / 5 * abs(0.75 - 2 / 3) + 2 / 5 * abs(0.95 - 1 / 2),
    }
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_held_out_metrics_of_a_ranking_are_those_of_its_pairs(fit_preferences, tiny_model):
    """The scores are log 3, 0 and log 19; the lengths are 2, 1 and 1, plus the end token."""
    records = [{"prompt": "w5", "responses": [" w1 w9", " w0", " w2"]}]
    trainer = fit_preferences(ByFirstWord(str(tiny_model("llama"))), None, records, method="validate")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(math.log(23 / 3) + math.log(20), abs=1e-5)  # 3/23 · 1/20
    assert metrics["val/accuracy"] == pytest.approx(1 / 3)
    assert metrics["val/margin"] == pytest.approx((math.log(3) - math.log(19 / 3) - math.log(19)) / 3, abs=1e-5)
    assert metrics["val/accuracy_of_length"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert metrics["val/accuracy_if_longer"] == pytest.approx(1 / 2)
    p = 19 / 22  # the probability of log 19 over log 3, in the bin [0.8, 0.9)
    assert metrics["val/ece"] == pytest.approx((0.25 + p + 0.95) / 3, abs=1e-5)


def test_equal_scores_are_right_half_the_time_and_calibrated(make, fit_preferences):
    metrics = fit_preferences(make(), None, low_pairs(20), method="validate").callback_metrics
    assert float(metrics["val/accuracy"]) == 0.5
    assert float(metrics["val/loss"]) == pytest.approx(math.log(2))
    assert float(metrics["val/ece"]) == pytest.approx(0, abs=1e-6)


def test_each_validation_is_independent_of_earlier_ones(make, fit_preferences):
    module, records = make(), low_pairs(20, seed=1)
    last = fit_preferences(module, low_pairs(24), records, max_epochs=3).callback_metrics
    alone = fit_preferences(module, None, records, method="validate").callback_metrics
    assert float(alone["val/ece"]) > 0.01
    assert {name: float(last[name]) for name in alone} == {name: float(value) for name, value in alone.items()}


def test_test_metrics(make, fit_preferences):
    module = make()
    trainer = fit_preferences(module, low_pairs(24), low_pairs(20, seed=1))
    held_out = {k[4:]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    tested = fit_preferences(module, None, low_pairs(20, seed=1), method="test").callback_metrics
    assert {k[5:]: float(v) for k, v in tested.items() if k.startswith("test/")} == pytest.approx(held_out)


@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (1.5, 0.0), (-1.0, 0.2), (0.0, 0.2)])
def test_the_first_loss_with_margin_and_smoothing(make, fit_preferences, margin, smoothing):
    recorder = Recorder()
    records = [r | {"gap": margin} for r in low_pairs(8)]
    fit_preferences(make(label_smoothing=smoothing), records, None, [recorder], data={"margin": "gap"})
    p = 1 / (1 + math.exp(margin))
    expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.2), (1.0, 0.2), (-1.0, 0.1)])
def test_the_best_distance_with_margin_and_smoothing(make, fit_preferences, tiny_model, margin, smoothing):
    """For one pair it is the margin plus the log-odds that the label is right."""
    recorder = Recorder()
    module = make(
        reward=small_model(tiny_model),
        iterations=80,
        label_smoothing=smoothing,
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 80),
    )
    fit_preferences(
        module, [low_pairs(1)[0] | {"gap": margin}], None, [recorder], data={"margin": "gap", "batch_size": 1}
    )
    expected = margin + math.log((1 - smoothing) / smoothing)
    assert recorder.metrics[-1]["train/margin"] == pytest.approx(expected, abs=0.02)


def test_label_smoothing_of_rankings_is_refused(make, fit_preferences):
    with pytest.raises(UserError, match=r"^model\.label_smoothing is for pairs: .*rankings of more than two$"):
        fit_preferences(make(label_smoothing=0.1), low_rankings(8, (3,)))
    fit_preferences(make(label_smoothing=0.1), low_rankings(8, (3,)), data={"as_pairs": True})


def test_a_resumed_run_ends_with_the_same_bits(make, fit_preferences, tmp_path):
    records = low_rankings(28)  # three batches per epoch: the second epoch ends after six
    whole, rest = Recorder(), Recorder()

    def run(iterations, callbacks, **options):
        module = make(
            iterations=iterations,
            scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        )
        fit_preferences(module, records, low_pairs(8), callbacks, **options)

    run(7, [whole])
    run(4, [IterationCheckpoint(every_n=4)])
    (path,) = tmp_path.rglob("last.ckpt")
    run(7, [rest], ckpt_path=str(path))
    assert len(rest.metrics) == 3
    for name in ("train/loss", "train/margin", "train/grad_norm", "train/lr", "progress/iteration"):
        assert [m[name] for m in rest.metrics] == [m[name] for m in whole.metrics[4:]]
    assert whole.weights.keys() == rest.weights.keys()
    assert all(torch.equal(rest.weights[name], weight) for name, weight in whole.weights.items())
    assert torch.isfinite(whole.weights["score_mean"])


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_trunk_and_head_are_trained(make, fit_preferences, where):
    recorder, module = Recorder(), make()
    fit_preferences(module, low_pairs(24), None, [recorder])
    fresh = make()
    fresh.configure_model()
    before = fresh.state_dict()
    moved = [not torch.equal(w, before[k]) for k, w in recorder.weights.items() if k.startswith(f"reward.{where}")]
    assert moved
    assert all(moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, r"^model\.label_smoothing must be in \[0, 0\.5\), not 0\.5$"),
        ({"label_smoothing": -0.1}, r"^model\.label_smoothing must be in \[0, 0\.5\), not -0\.1$"),
        ({"max_tokens": 0}, r"^model\.max_tokens must be 1 or more, not 0$"),
        ({"clip_grad_norm": 0.0}, r"^model\.clip_grad_norm must be positive or null, not 0\.0$"),
        ({"clip_grad_norm": math.nan}, r"^model\.clip_grad_norm must be positive or null, not nan$"),
    ],
)
def test_numbers_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_without_a_model():
    with pytest.raises(UserError, match=r"^model\.reward is not set"):
        RewardModeling()


def test_a_loss_that_is_not_finite_stops_before_the_step(make, fit_preferences):
    module = make(optimizer=sgd(1e30), clip_grad_norm=None)
    with pytest.raises(UserError, match=r"^the (loss|gradient norm) is (nan|inf): stopped before the step"):
        fit_preferences(module, low_pairs(80))
