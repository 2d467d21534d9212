import pytest
import yaml

from lit_rlhf import cli


@pytest.fixture
def config(tmp_path, tiny_model, monkeypatch):
    """Return a configuration file of PPO, whose data do not exist; the current folder is empty but for the file."""
    monkeypatch.chdir(tmp_path)
    reward = {"class_path": "RewardModel", "init_args": {"model": str(tiny_model(task="score"))}}
    options = {
        "model": {
            "class_path": "PolicyGradient",
            "init_args": {"actor": str(tiny_model()), "rewards": [reward], "sampling": {"max_tokens": 8}},
        },
        "data": {"class_path": "Prompts", "init_args": {"train": "missing.jsonl", "max_tokens": 24, "batch_size": 8}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return ["plan", "--config", "run.yaml"]


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_for_hardware_that_is_not_here(config, capsys, tmp_path):
    cli.main([*config, "--gpus", "8", "--gpu", "h100", "--trainer.strategy", "fsdp2"])
    text = said(capsys)
    assert "PolicyGradient on 8 x h100 of 80.0 GB, fsdp2, bf16-mixed" in text
    assert [text.count(f"│ {role} ") for role in ("actor", "critic", "reference", "reward")] == [1] * 4
    assert [text.count(f"│ {phase} ") for phase in ("load", "decode", "judge", "update")] == [1, 2, 2, 2]
    assert "Each text has 32 tokens, 8 of them scored" in text
    assert "40% of 989 TFLOP/s" in text
    assert "It fits: " in text
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_plan_for_this_cpu(config, capsys):
    cli.main([*config, "--gpu", "cpu", "--prompt_tokens", "4", "--model.update.max_tokens", "64"])
    text = said(capsys)
    assert "PolicyGradient on 1 x cpu of " in text
    assert "32-true" in text
    assert "Each text has 12 tokens" in text


def test_the_configuration_of_a_run(config, capsys, tmp_path):
    """Its config.yaml has options of ``fit`` alone, and two GPUs."""
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())
    saved |= {"ckpt_path": None, "weights_only": None, "plan": {"checkpointing": False}, "trainer": {"devices": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(saved))
    cli.main([*config, "--gpu", "l4", "--trainer.precision", "32-true"])
    assert "PolicyGradient on 2 x l4 of 24.0 GB, ddp, 32-true" in said(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "b200"], "'b200' is not in the table"),
        (["--model.update.max_token", "8"], "did you mean 'model.update.max_tokens'"),
        (["--gpus", "0"], "gpus must be 1 or more, not 0"),
        (["--gpus=-3"], "gpus must be 1 or more, not -3"),
        (["--prompt_tokens", "0"], "prompt_tokens must be 1 or more, not 0"),
        (["--gpu", "h100", "--trainer.devices", "0,1"], "say how many GPUs to plan for"),
        (["--trainer.precision", "16-mixed"], "trainer.precision must be 32-true or bf16-mixed"),
        (["--data", "Demonstrations"], "PolicyGradient can be planned with Prompts, not with Demonstrations"),
    ],
)
def test_mistakes(config, capsys, options, message):
    with pytest.raises(SystemExit):
        cli.main([*config, *options])
    assert message in capsys.readouterr().err
