import math

import pytest
import torch
import torch.nn.functional as F

from lit_rlhf.data import Demonstrations
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights
from lit_rlhf.modules import SFT
from lit_rlhf.testing import Recorder


@pytest.fixture
def fit_sft(tiny_model, make_trainer, tmp_path):
    def run(*, lr=1e-2, iterations=None, **options):
        file = tmp_path / "texts.jsonl"
        rows = [(f"w{i % 4} w5", " w7 w8 w9") for i in range(24)]
        file.write_text("\n".join(f'{{"prompt": "{p}", "response": "{r}"}}' for p, r in rows))
        data = Demonstrations(train=str(file), validation=str(file), prompt="prompt", response="response", batch_size=8)
        module = SFT(str(tiny_model("llama")), lambda p: torch.optim.AdamW(p, lr=lr), iterations=iterations, **options)
        recorder = Recorder()
        trainer = make_trainer([recorder], max_epochs=2)
        trainer.fit(module, datamodule=data)
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
        module = SFT(str(tiny_model(architecture)), lambda p: torch.optim.SGD(p, lr=0.1), iterations=2)
        recorder = Recorder()
        trainer = make_trainer([recorder], max_epochs=2)
        trainer.fit(module, datamodule=Demonstrations(train=str(file), batch_size=8, max_tokens=24, packing=packing))
        found.append((recorder.metrics[-1]["train/loss"], recorder.weights))
    (loss, weights), (packed_loss, packed_weights) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(packed_weights[name], weight, atol=1e-5, rtol=1e-5)


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
