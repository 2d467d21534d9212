"""Every role of a run can be exported to a folder that transformers loads without lit-rlhf."""

from pathlib import Path

import preloaded
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.export import check_folder, export, model_card
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.scoring import load_critic

pytestmark = pytest.mark.usefixtures("without_plans")


@pytest.fixture(scope="module", params=["actor", "shared", "reward"])
def run(request, tiny_model, prompt_file, tmp_path_factory):
    """Train PPO for two iterations, with the critic from each possible source, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("run")
    reward = str(tiny_model("llama", task="score"))
    main(
        [
            *("fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))),
            *("--model.critic", request.param, "--model.iterations", "2", "--model.sampling.max_tokens", "8"),
            *("--model.rewards", f'[{{"class_path": "RewardModel", "init_args": {{"model": "{reward}"}}}}]'),
            *("--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "1e-3"),
            *("--model.critic_optimizer", "AdamW", "--model.critic_optimizer.lr", "1e-2"),
            *("--data", "Prompts", "--data.train", str(prompt_file), "--data.batch_size", "8"),
            *("--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", "--report.at_end", "false"),
            *("--model.update.epochs", "1", "--model.update.minibatches", "2"),
        ]
    )
    return folder


def test_the_actor_generates_the_same_with_transformers_alone(run):
    folder = export(run)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = load_model(yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["actor"])
    model.load_state_dict({k[len("actor.model.") :]: v for k, v in state.items() if k.startswith("actor.model.")})
    tokenizer, alone = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(["w1 w2 w3", "w4 w5 w6"], return_tensors="pt")
    ours, theirs = (m.generate(**batch, max_new_tokens=10, do_sample=False) for m in (model, alone))
    assert torch.equal(ours, theirs)
    fresh = load_model(yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["actor"])
    assert any(not torch.equal(p, q) for p, q in zip(alone.parameters(), fresh.parameters(), strict=True))


def test_the_critic_is_a_classifier(run):
    folder = export(run, role="critic")
    assert folder == run / "export_critic"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    options = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    tokens = torch.tensor([[2, 6, 7, 8, 9, 1]])
    if options["critic"] == "shared":
        actor = Actor(load_model(options["actor"]), shared_critic=True)
        actor.load_state_dict({k[len("actor.") :]: v for k, v in state.items() if k.startswith("actor.")})
        expected = actor(tokens, torch.arange(6)[None] > 0).values
    else:
        bias = "critic.head.bias" in state
        start = options["actor"] if options["critic"] == "actor" else options["rewards"][0]["init_args"]["model"]
        critic = load_critic(start, bias=bias)
        critic.load_state_dict({k[len("critic.") :]: v for k, v in state.items() if k.startswith("critic.")})
        expected = critic(tokens)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    value = classifier(tokens).logits[0, 0] + getattr(classifier.config, "value_bias", 0.0)
    torch.testing.assert_close(value, expected[0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_critic(str(folder))(tokens), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0


def test_the_model_card_describes_the_training(run):
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["lit-rlhf", "PolicyGradient"]
    assert yaml.safe_load(header)["pipeline_tag"] == "text-generation"
    assert "for 2 iterations" in text
    quoted = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert quoted["model"] == yaml.safe_load((run / "config.yaml").read_text())["model"]


def test_a_role_that_the_run_does_not_have_is_refused(run):
    with pytest.raises(UserError, match="does not contain a reward model"):
        export(run, role="reward")


def test_the_command_exports_a_role(run, tmp_path):
    words = ["export", str(run), "--role", "critic", "--out", str(tmp_path / "out")]
    done = preloaded.run("-m", "lit_rlhf.cli", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"exported: {tmp_path / 'out'}\n"
    assert Path(tmp_path / "out" / "model.safetensors").exists()


def test_an_export_replaces_nothing_but_an_earlier_export(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    check_folder(folder)
    folder.mkdir()
    check_folder(folder)
    (folder / "README.md").write_text(model_card(tmp_path, "actor", iterations=1))
    check_folder(folder)
    (folder / "README.md").write_text("# My project, with lit-rlhf\n")
    with pytest.raises(UserError, match=r"^--out: .*model contains other files"):
        check_folder(folder)
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    for above in (".", "..", str(tmp_path)):
        with pytest.raises(UserError, match=r"^--out must name a folder for the export alone"):
            check_folder(Path(above))
