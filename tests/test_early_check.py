"""Unknown options are refused before torch is imported, with the same message; whatever may be right is left alone."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from lit_rlhf import early_check, recipes
from lit_rlhf.cli import main
from lit_rlhf.early_check import mistake_in
from lit_rlhf.lightning_cli import run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache folder with the schema of this installation, which the first refusal of an option has stored."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        assert early_check.stored() is None
        with pytest.raises(SystemExit):
            run(["fit", "--config", "ppo", "--model.updat.epochs", "3"])
        assert early_check.stored() is not None
    return folder


@pytest.fixture(autouse=True)
def folder(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ("--config", "ppo", "--model.updat.epochs", "3"),
        ("--config=ppo", "--model.sampling.temprature=1"),
        ("--config", "ppo", "--model.advantages.lamm", "0.9"),
        ("--config", "grpo", "--model.advantages.lam", "0.9"),  # an option of GAE, which is not chosen
        ("--config", "dpo", "--model.update.max_tokens", "9"),
        ("--config", "dpo", "--model.learning_rate", "9"),
        ("--config", "reward", "--model.actor", "model"),
        ("--config", "ppo", "--model.rewards.wieght", "2"),
        ("--config", "ppo", "--trainer.max_epoch", "2"),
        ("--config", "ppo", "--trianer.max_epoch", "2"),
        ("--config", "ppo", "--checkpoint.every", "2"),
        ("--config", "ppo", "--model.actor_optimizer.lrr", "2"),
        ("--config", "ppo", "--data.bach_size", "2"),
        ("--config", "ppo", "--model", "PolicyGradiant"),
        ("--config", "ppo", "--model.advantages", "GEA"),
        ("--config", "ppo", "--model.advantages", "lit_rlhf.GEA"),
        ("--config", "ppo", "--model.advantages.class_path", "GEA"),
        ("--config", "ppo", "--model.engine.class_path", "w" * 300),  # too long for the name of a file
        ("--config", "ppo", "--model.rewards=[{class_path: RewardFunktion}]"),
        ("--config", "wrong.yaml"),
    ],
)
def test_the_message_is_that_of_the_parser(folder, capsys, words):
    config = yaml.safe_load(recipes.find_recipe("ppo").read_text())
    config["model"]["init_args"]["actor_optimizer"]["init_args"]["lrr"] = 3
    (folder / "wrong.yaml").write_text(yaml.safe_dump(config))
    early = mistake_in(["fit", *words])
    assert early
    with pytest.raises(SystemExit) as exit_:
        run(["fit", *words])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err.strip().split("; there are:")[0] == f"lit-rlhf: error: {early}".split("; there are:")[0]
    )


def with_imports(words):
    """Run a command that exits, in a process that ends its output with the status and the heavy imports."""
    program = (
        "import sys; from lit_rlhf.cli import main\n"
        f"try: main({words})\n"
        "except SystemExit as exit_: print(exit_.code, {'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_torch_is_not_imported(cache, command):
    done = with_imports([command, "--config", "ppo", "--model.itreations", "3"])
    assert done.stdout == "2 set()\n"
    assert "did you mean 'model.iterations'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "--help"], ""),
        (["quickstart", "--stage", "ppoo"], "argument --stage: invalid choice: 'ppoo'"),
        (["quickstart", "--ppo-iterations", "-1"], "lit-rlhf: error: ppo-iterations must be 1 or more, not -1\n"),
        (["quickstart", "--sft-iterations=1", "--lora"], "error: sft-iterations must be 2 or more, not 1\n"),
        (["export"], "the following arguments are required: run"),
        (["schema", "--help"], ""),
        (["exprot"], "there is no command 'exprot', did you mean 'export'?"),
        (["qickstart"], "there is no command 'qickstart', did you mean 'quickstart'?"),
    ],
)
def test_the_options_of_other_commands_are_read_before_torch_is_imported(words, message):
    done = with_imports(words)
    assert done.stdout.endswith("set()\n")
    assert message in done.stderr


@pytest.mark.parametrize("recipe", recipes.names())
def test_recipes_have_no_mistake(recipe):
    assert mistake_in(["fit", "--config", "ppo", "--config", recipe]) == ""


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "trpo", "a3c"])
def test_a_configuration_with_every_option_has_no_mistake(folder, capsys, recipe):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", recipe, "--print_config"])
    assert exit_.value.code in (0, None)
    (folder / "whole.yaml").write_text(capsys.readouterr().out)
    assert mistake_in(["fit", "--config", "whole.yaml"]) == ""


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "PolicyGradient", "--model.init_args.sampling.max_tokens=4"),
        ("--model.actor.config.hidden_size", "8"),
        ("--model.advantages", "NStep", "--model.advantages.n", "2"),
        ("--model.advantages.lam", "0.5"),
        ("--model.rewards+=ExactAnswer", "--model.rewards.weight", "2"),
        ("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"),
        ("--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '1'}}]"),
        ("--trainer.logger=WandbLogger", "--trainer.logger.entity", "x"),  # passed on by **kwargs
        ("--trainer.logger", "[CSVLogger, {class_path: WandbLogger, init_args: {save_dir: x, group: y}}]"),
        ("--trainer.strategy", "fsdp2"),
        ("--trainer.strategy.class_path=DDPStrategy", "--trainer.strategy.find_unused_parameters", "true"),
        ("--trainer.limit_train_batches", "-1", "--seed_everything", "1", "--ckpt_path=last"),
        ("--trainer.callbacks", "null", "--print_config=comments"),
        ("--gpu", "h100", "--gpus", "8", "--prompt_tokens=9"),
        ("--model.actor_optimizer", "Adafactor", "--model.actor_optimizer.lr", "1"),  # from transformers
        ("--model.correction", "TIS"),  # the parser names the options
        ("--model", "OnPolicy"),  # an imported class
        ("--model", "config_of_the_model"),
        ("--model", "my_parts.Mine", "--model.wings", "2"),
        ("--model.rewards=[{class_path: my_parts.Mine, init_args: {wings: 2}}]", "--model.advantages=AlsoMine"),
        ("--model.init_args={advantages: AlsoMine, rewards: [{class_path: my_parts.Mine}]}",),  # read as a whole
        ("--model.advantages.lamm.help",),
        ("--model.help=Mine", "--model.wings"),
        ("--model", "{unclosed"),
        ("stray", "-3", "--", "word"),
        ("--data.train", "2026-99-99"),
        ("--model.rewards.0.weight", "2"),
        ("--model", '{"class_path": "SFT", "init_args": {"update.epochs": 3}}'),
    ],
)
def test_what_may_be_right_is_left_to_the_parser(folder, words):
    (folder / "config_of_the_model").write_text("class_path: SFT")
    assert mistake_in(["fit", "--config", "ppo", *words]) == ""


def test_another_state_of_the_package_or_its_libraries(monkeypatch):
    found = json.loads(early_check._path().read_text())
    assert found["key"] == early_check._key()
    monkeypatch.setattr(early_check, "version", lambda name: "9.9")
    assert early_check.stored() is None
    assert mistake_in(["fit", "--config", "ppo", "--model.updat.epochs", "3"]) == ""


def test_a_cache_that_cannot_be_written_or_read(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    early_check.store({"definitions": {}}, [])
    assert early_check.stored() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    early_check.store({}, [])
    early_check._path().write_text("{")
    assert early_check.stored() is None


def test_it_is_quick():
    start = time.process_time()
    for _ in range(5):
        assert mistake_in(["fit", "--config", "ppo", "--model.updat.epochs", "3"])
    assert time.process_time() - start < 2.5
