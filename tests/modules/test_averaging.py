"""Averaged weights in runs of the command: the average, what uses it, and its interpolation towards the start."""

import contextlib
import csv

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_rlhf import Averaging, LoRA
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.export import export, model_card
from lit_rlhf.models.loading import load_model
from lit_rlhf.modules.averaging import AveragedWeights
from lit_rlhf.strategies import FSDP
from lit_rlhf.testing import assert_exact_resume, tiny_ppo

pytestmark = pytest.mark.usefixtures("without_plans")
DECAY = 0.6
TOKENS = torch.tensor([[2, 6, 7, 8, 9, 1], [2, 9, 10, 11, 12, 13]])


@pytest.fixture(scope="module")
def run(tiny_model, prompt_file, tmp_path_factory):
    """Return a function: options of the command -> the folder of a run of 3 iterations with 3 validations."""

    def fit(*words):
        folder = tmp_path_factory.mktemp("run")
        rewards = '[{"class_path": "RewardFunction", "init_args": {"function": "lit_rlhf.testing.runs:low_words"}}]'
        main(
            [
                *("fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model()), "--model.critic", "null"),
                *("--model.iterations", "3", "--model.sampling.max_tokens", "8", f"--model.rewards={rewards}"),
                *("--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "1e-2"),
                *("--model.update.epochs", "1", "--model.update.minibatches", "2"),
                *("--data", "Prompts", "--data.train", str(prompt_file), "--data.validation", str(prompt_file)),
                *("--data.batch_size", "16", "--trainer.val_check_interval", "1", "--checkpoint.keep_every_n", "1"),
                *("--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu"),
                *("--trainer.enable_progress_bar", "false", "--report.at_end", "false", *words),
            ]
        )
        return folder

    return fit


@pytest.fixture(scope="module")
def averaged(run):
    return run(f"--model.averaging.decay={DECAY}")


@pytest.fixture(scope="module")
def plain(run):
    return run()


@pytest.fixture(scope="module")
def adapted(run):
    return run(f"--model.averaging.decay={DECAY}", "--model.adapter.rank=2")


def states(folder):
    """Return the weights of the actor, and their average, after each iteration."""
    found = [read_checkpoint(folder / "checkpoints" / f"iteration-00000{i}.ckpt")["state_dict"] for i in (1, 2, 3)]
    return [
        {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        for prefix in ("actor.", "averaged.")
        for state in found
    ]


def metrics(folder, names):
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{name: value for name, value in row.items() if name.startswith(names)} for row in rows]


def logprobs(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.log_softmax(-1)


def test_the_average_follows_the_weights(averaged, tiny_model):
    """A loop over the iterations, in float64; the average begins with the initial weights."""
    *weights, first, second, third = states(averaged)
    start = load_model(str(tiny_model())).state_dict()
    names = first.keys()
    assert names == set(weights[0]) - {"model.lm_head.weight"} or names == set(weights[0])
    for name in names:
        average = start[name.removeprefix("model.")].double()
        for now, found in zip(weights, (first, second, third), strict=True):
            average = DECAY * average + (1 - DECAY) * now[name].double()
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-7)
    assert any((third[name] - weights[-1][name]).abs().max() > 1e-3 for name in names)


def test_training_is_the_same_to_the_last_bit(averaged, plain):
    """Validation swaps the weights and swaps them back; responses to learn from are the actor's own."""
    ours, theirs = states(averaged)[2], states(plain)[2]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    own = ("objective/", "policy/", "response/", "rewards/")
    assert metrics(averaged, own) == metrics(plain, own)
    assert not any(name.startswith("averaged.") for name in read_checkpoint(plain / "checkpoints/last.ckpt"))


def test_validation_and_the_exports_use_the_average(averaged, plain, tiny_model, capsys):
    """The exported folder, validated without averaging, has the metrics of the run's last validation."""
    average, actor = states(averaged)[5], states(averaged)[2]
    at_end, exported = (load_model(str(path)).state_dict() for path in (averaged / "export", export(averaged)))
    for name, weight in average.items():
        assert torch.equal(at_end[name.removeprefix("model.")], weight)
        assert torch.equal(exported[name.removeprefix("model.")], weight)
    assert any(not torch.equal(actor[name], weight) for name, weight in average.items())
    *_, last = [row for row in metrics(averaged, "val/") if any(row.values())]
    *_, other = [row for row in metrics(plain, "val/") if any(row.values())]
    assert last["val/kl_to_ref"] != other["val/kl_to_ref"]
    words = [
        "--model.actor",
        str(averaged / "export"),
        "--model.reference",
        str(tiny_model()),
        "--model.averaging=null",
    ]
    capsys.readouterr()
    main(["validate", "--config", str(averaged / "config.yaml"), *words])
    said = capsys.readouterr().out
    assert all(f"{float(last[name]):.5f}"[:6] in said for name in ("val/kl_to_ref", "val/score"))


def test_an_adapter_is_averaged_alone(adapted, tmp_path):
    """The checkpoint holds the average of the adapter's weights and of no other; the exports hold the average."""
    actor, average = states(adapted)[2], states(adapted)[5]
    assert average.keys() == actor.keys()
    assert all(".lora_" in name for name in average)
    at_end, exported = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapted / "export", export(adapted, out=tmp_path / "out"))
    )
    assert at_end.keys() == exported.keys()
    for name, weight in average.items():
        key = name.replace("model.", "base_model.model.", 1).replace(".actor.", ".")
        assert torch.equal(at_end[key], weight), key
        assert torch.equal(exported[key], weight), key


@pytest.mark.parametrize("options", [{}, {"adapter": LoRA(rank=2), "critic": "shared"}], ids=["whole", "adapter"])
def test_a_resumed_run_ends_with_the_same_bits(options):
    assert_exact_resume(lambda: tiny_ppo(averaging=Averaging(DECAY), **options))


def test_towards_start(averaged, adapted, tiny_model, tmp_path, capsys):
    """A quarter of the change of the averaged weights, and of the output of the adapter's B A; a share of 1 is all."""
    start, average = load_model(str(tiny_model())).state_dict(), states(averaged)[5]
    main(["export", str(averaged), "--towards-start", "0.25"])
    folder = averaged / "export_towards_start_0.25"
    assert capsys.readouterr().out == f"exported: {folder}\n"
    model = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in average.items():
        before = start[name.removeprefix("model.")]
        torch.testing.assert_close(model[name.removeprefix("model.")], before + 0.25 * (weight - before))
    assert "Its weights are start + 0.25 · (trained − start)." in (folder / "README.md").read_text()
    assert "start +" not in model_card(averaged, "actor", 3)
    whole = export(adapted, out=tmp_path / "whole", merge=True)
    quarter = export(adapted, out=tmp_path / "quarter", merge=True, towards_start=0.25)
    assert export(adapted, towards_start=0.25) == adapted / "export_towards_start_0.25"
    all_of_it, some = (load_model(str(path)).state_dict() for path in (whole, quarter))
    for name, before in start.items():
        torch.testing.assert_close(some[name], before + 0.25 * (all_of_it[name] - before))
    found = logprobs(load_model(str(adapted / "export_towards_start_0.25")))
    torch.testing.assert_close(found, logprobs(load_model(str(quarter))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(averaged, share):
    with pytest.raises(UserError, match=r"--towards-start must be above 0 and at most 1 .*, not"):
        export(averaged, towards_start=share)


def test_without_a_start_nothing_is_interpolated(averaged, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"--towards-start needs a start, which only an actor has.*a critic has none"):
        export(averaged, role="critic", towards_start=0.5)
    text = (averaged / "config.yaml").read_text()
    assert "reference: null" in text
    assert "adapter: null" in text
    (tmp_path / "checkpoints").symlink_to(averaged / "checkpoints")
    for change, message in (
        ({"reference: null": f"reference: {tiny_model('gpt2')}"}, "the reference .* has other parameters than the"),
        ({"adapter: null": "adapter: {dora: true}"}, "--towards-start cannot scale an adapter with DoRA"),
        ({"adapter: null": "adapter: {rank: 2}", "reference: null": "reference: ./r"}, "the reference is ./r; export"),
    ):
        changed = text
        for old, new in change.items():
            changed = changed.replace(old, new)
        (tmp_path / "config.yaml").write_text(changed)
        with pytest.raises(UserError, match=message):
            export(tmp_path, towards_start=0.5)


def test_the_reference_of_a_run_is_its_start(averaged, tiny_model, tmp_path):
    other = load_model(str(tiny_model(seed=1))).state_dict()
    (tmp_path / "checkpoints").symlink_to(averaged / "checkpoints")
    text = (averaged / "config.yaml").read_text().replace("reference: null", f"reference: {tiny_model(seed=1)}")
    (tmp_path / "config.yaml").write_text(text)
    model = load_model(str(export(tmp_path, towards_start=0.5))).state_dict()
    for name, weight in states(averaged)[5].items():
        before = other[name.removeprefix("model.")]
        torch.testing.assert_close(model[name.removeprefix("model.")], before + 0.5 * (weight - before))


def test_the_weights_come_back_to_the_bit_after_an_error():
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_rlhf.models.actor import Actor

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    actor = Actor(LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, tie_word_embeddings=True, **shape)))
    average = AveragedWeights(actor, decay=0.0)
    before = {name: x.clone() for name, x in average.state_dict().items()}
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 1e-8 + 0.3 * parameter
    own = {name: x.clone() for name, x in actor.state_dict().items()}
    with contextlib.suppress(KeyboardInterrupt), torch.inference_mode(), average.in_use():
        assert all(torch.equal(x, before[name]) for name, x in actor.named_parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(x, own[name]) for name, x in actor.state_dict().items())
    assert all(torch.equal(x, before[name]) for name, x in average.state_dict().items())
    average.update()  # with a decay of 0, the average is the actor
    assert all(torch.equal(x, own[name]) for name, x in average.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"averaging\.decay must be in \[0, 1\), not"):
        Averaging(decay=decay)


def test_fsdp1_is_refused(make_module, fit, one_process):
    with pytest.raises(UserError, match=r"trainer\.strategy: fsdp cannot average weights.*use fsdp2"):
        fit(make_module(averaging=Averaging(), iterations=1), strategy=FSDP(), devices=1, inference_mode=False)
