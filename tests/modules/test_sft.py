import math

import pytest
import torch
import torch.nn.functional as F

from lit_rlhf.callbacks import IterationCheckpoint
from lit_rlhf.data import Demonstrations
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.modules import SFT
from lit_rlhf.testing import Recorder


@pytest.fixture
def fit_sft(tiny_model, make_trainer, tmp_path):
    def run(*, lr=1e-2, iterations=None, callbacks=(), ckpt_path=None, **options):
        file = tmp_path / "texts.jsonl"
        rows = [(f"w{i % 4} w5", " w7 w8 w9") for i in range(24)]
        file.write_text("\n".join(f'{{"prompt": "{p}", "response": "{r}"}}' for p, r in rows))
        data = Demonstrations(train=str(file), validation=str(file), prompt="prompt", response="response", batch_size=8)
        optimizer = {"optimizer": lambda p: torch.optim.AdamW(p, lr=lr)}
        module = SFT(str(tiny_model("llama")), iterations=iterations, **optimizer | options)
        recorder = Recorder()
        trainer = make_trainer([recorder, *callbacks], max_epochs=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, module, recorder

    return run


def test_loss_is_the_responses_mean_negative_log_probability(fit_sft, tiny_model):
    trainer, module, _ = fit_sft(lr=0.0, iterations=1)
    total, count = 0.0, 0
    for batch in trainer.datamodule.val_dataloader():
        logits = module.actor.model(input_ids=batch.tokens).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
        mask = batch.mask[:, 1:].flatten()
        assert int(mask.sum()) == 8 * 4  # three words and the end token, in eight rows
        assert batch.mask[:, :3].sum() == 0  # the beginning-of-sequence token and the prompt's two words
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    val = float(trainer.callback_metrics["val/loss"])
    assert total / count == pytest.approx(val, rel=1e-5)
    assert float(trainer.callback_metrics["val/perplexity"]) == pytest.approx(math.exp(val), rel=1e-4)


def test_the_validation_texts_are_used_for_testing_too(fit_sft):
    trainer, module, _ = fit_sft(iterations=1)
    validated = float(trainer.callback_metrics["val/loss"])
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert tested["test/loss"] == pytest.approx(validated, rel=1e-6)
    assert tested["test/perplexity"] == pytest.approx(math.exp(validated), rel=1e-4)


def test_it_learns_and_counts(fit_sft):
    trainer, _, recorder = fit_sft(iterations=20)
    losses = [m["train/loss"] for m in recorder.metrics]
    assert len(losses) == 20  # more than the two epochs of three batches, because iterations take precedence
    assert losses[-1] < 0.3 * losses[0]
    assert float(trainer.callback_metrics["val/loss"]) < 0.3 * losses[0]


def test_without_iterations_the_epochs_decide(fit_sft):
    _, module, recorder = fit_sft()
    assert len(recorder.metrics) == 6
    assert int(module.iteration) == 6


def test_the_scheduler_steps_after_every_batch(fit_sft):
    trainer, _, _ = fit_sft(
        iterations=4, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step)
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)


def test_a_resumed_run_ends_with_the_same_bits(fit_sft, tmp_path):
    options = {"scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step), "max_tokens": 24}
    _, _, whole = fit_sft(iterations=7, **options)
    fit_sft(iterations=4, callbacks=[IterationCheckpoint(every_n=4)], **options)
    (path,) = tmp_path.rglob("last.ckpt")
    trainer, _, rest = fit_sft(iterations=7, ckpt_path=str(path), **options)
    assert trainer.global_step == 7
    for name in ("train/loss", "train/grad_norm", "progress/iteration"):
        assert [m[name] for m in rest.metrics] == [m[name] for m in whole.metrics[4:]]
    assert all(torch.equal(rest.weights[name], weight) for name, weight in whole.weights.items())


def test_the_held_out_loss_is_the_mean_over_tokens_not_batches(fit_sft, tmp_path):
    trainer, module, _ = fit_sft(lr=0.0, iterations=1)
    file = tmp_path / "longer.jsonl"
    file.write_text("".join(f'{{"text": "{" ".join(["w1", "w9"] * n)}"}}\n' for n in (1, 1, 8, 8)))
    data = Demonstrations(validation=str(file), loss_on="all", batch_size=2)
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        total += float(module.actor(batch.tokens, batch.mask).logprobs.sum())
        count += int(batch.mask.sum())
    assert metrics["val/loss"] == pytest.approx(-total / count, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packing_changes_neither_the_loss_nor_the_step(tiny_model, make_trainer, tmp_path, architecture):
    file = tmp_path / "texts.jsonl"
    rows = [f"w{i} " + " ".join(["w5", "w9"] * (1 + i % 4)) for i in range(8)]
    file.write_text("\n".join(f'{{"text": "{row}"}}' for row in rows))
    found = []
    for packing in (False, True):
        module = SFT(str(tiny_model(architecture)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), iterations=2)
        recorder = Recorder()
        trainer = make_trainer([recorder], max_epochs=2)
        trainer.fit(module, datamodule=Demonstrations(train=str(file), batch_size=8, max_tokens=24, packing=packing))
        found.append((recorder.metrics[-1]["train/loss"], recorder.weights))
    (loss, weights), (packed_loss, packed_weights) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(packed_weights[name], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_change_neither_the_steps_nor_the_held_out_loss(tiny_model, make_trainer, tmp_path, packing):
    """The longest row is longer than a micro-batch; the metrics include the norm of the gradient and the validation."""
    file, found, sizes = tmp_path / "texts.jsonl", [], []
    file.write_text("".join(f'{{"text": "w{i}{" w5 w9" * (1 + i % 6)}"}}\n' for i in range(16)))
    for max_tokens in (10_000, 14):
        module = SFT(
            str(tiny_model("llama")), max_tokens, clip_grad_norm=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        recorder, data = Recorder(), Demonstrations(str(file), str(file), batch_size=8, max_tokens=18, packing=packing)
        trainer = make_trainer([recorder], max_epochs=2)
        module.configure_model()
        module.actor.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
        trainer.fit(module, datamodule=data)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found.append((recorder.metrics, metrics, recorder.weights))
    assert max(rows for rows, _ in sizes) > 2
    assert all(rows == 1 or rows * width <= 14 for rows, width in sizes[8:])
    (rows, metrics, weights), (other_rows, other_metrics, other_weights) = found
    assert rows[0]["train/grad_norm"] > 0.1
    for row, other in zip((*rows, metrics), (*other_rows, other_metrics), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-6, rtol=1e-6)


def test_gradient_norm_is_clipped(tiny_model, fit_sft):
    """With plain SGD at learning rate 1 the step is as long as the clipped gradient."""
    before = load_model(str(tiny_model("llama")))
    _, module, recorder = fit_sft(clip_grad_norm=1e-3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), iterations=1)
    differences = [a - b for a, b in zip(module.actor.model.parameters(), before.parameters(), strict=True)]
    assert recorder.metrics[0]["train/grad_norm"] > 1e-3
    assert float(torch.cat([x.detach().flatten() for x in differences]).norm()) == pytest.approx(1e-3, rel=0.02)


def test_a_loss_that_is_not_finite_stops_before_the_step(fit_sft):
    with pytest.raises(UserError, match=r"the loss is nan: stopped before the step"):
        fit_sft(lr=float("inf"))


@pytest.mark.parametrize(
    ("options", "message"), [({"max_tokens": 0}, "1 or more"), ({"clip_grad_norm": 0}, "positive")]
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=rf"^model\.{next(iter(options))} must be {message}"):
        SFT("folder", **options)


@pytest.fixture
def packed(tmp_path):
    """Return a data module that packs several short texts into each row."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "w{i} w5 w9"}}\n' for i in range(8)))
    return Demonstrations(train=str(file), validation=str(file), batch_size=8, max_tokens=16, packing=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_packing_with_sharded_half_precision_weights(one_process, packed, tiny_model, make_trainer, architecture):
    module = SFT(str(tiny_model(architecture)), iterations=1)
    trainer = make_trainer(strategy="fsdp2", devices=1, precision="bf16-mixed", inference_mode=False)
    trainer.fit(module, datamodule=packed)
    assert int(module.iteration) == 1


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_packing_is_refused_if_the_attention_mixes_texts(packed, tiny_model, make_trainer, method):
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    module = SFT(RandomWeights(config, str(tiny_model("llama"))))
    with pytest.raises(UserError, match=r"^data.packing: BloomForCausalLM does not keep packed texts apart"):
        getattr(make_trainer(), method)(module, datamodule=packed)
    assert int(module.iteration) == 0
