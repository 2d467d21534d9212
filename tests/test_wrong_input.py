"""A user's mistake is reported in one line that names the field, what was found and what would be right."""

import importlib.util
import json
import re

import preloaded
import pytest
import torch

from lit_rlhf import recipes
from lit_rlhf.cli import main

pytestmark = pytest.mark.usefixtures("without_plans")
REWARDS = """\
def fine(responses): return [0.0 for _ in responses]
def divides(responses): return [1 / 0]  # line 2
def few(responses): return [1.0]
def nan(responses): return [float("nan")] * len(responses)
def many_lines(responses): raise RuntimeError("first\\nsecond")
"""
CONFIG = """\
model:
  class_path: PolicyGradient
  init_args:
    actor: MODEL
    rewards:
      - {class_path: RewardFunction, init_args: {function: "rewards.py:fine"}}
    sampling: {max_tokens: 4}
    iterations: 1
data:
  class_path: Prompts
  init_args: {train: prompts.jsonl, batch_size: 4}
trainer: {default_root_dir: run, accelerator: cpu}
"""


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """Return a working folder with prompts, rewards, a config file, a model, and a model without its tokenizer."""
    monkeypatch.chdir(tmp_path)
    for model, kept in (("model", "*"), ("no_tokenizer", "[!t]*")):
        (tmp_path / model).mkdir()
        for file in tiny_model("llama").glob(kept):
            (tmp_path / model / file.name).symlink_to(file)
    prompts = [{"prompt": f"w{i} w2", "answer": "w3"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1"}\n{"prompt": w2}\n')
    (tmp_path / "list.jsonl").write_text('["w1"]\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "prompts.csv").write_text("question,answer\n" + "w1 w2,w3\n" * 8)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("MODEL", "./model"))
    return tmp_path


def fit(**changes) -> list[str]:
    """Return the words of a valid run with these options changed (``__`` means a dot; None leaves an option out)."""
    options = {
        "model": "PolicyGradient",
        "model.actor": "./model",
        "model.rewards": reward("rewards.py:fine"),
        "model.sampling.max_tokens": 4,
        "model.iterations": 1,
        "data": "Prompts",
        "data.train": "prompts.jsonl",
        "data.batch_size": 4,
        "trainer.default_root_dir": "run",
        "trainer.accelerator": "cpu",
    }
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    return ["fit", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def reward(function, class_path="RewardFunction", option="function") -> str:
    return f"[{{class_path: {class_path}, init_args: {{{option}: '{function}'}}}}]"


def refusal(capsys, words) -> str:
    """Return the error message of the command, which must be a single line at the end of stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    lines = capsys.readouterr().err.strip().splitlines()
    reported = [line for line in lines if line.startswith("lit-rlhf: error: ")]
    assert exit_.value.code not in (0, None)
    assert reported == lines[-1:], "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)
    assert "<class" not in reported[0]
    assert "Namespace(" not in reported[0]
    assert "  " not in reported[0]
    return reported[0].removeprefix("lit-rlhf: error: ")


def check(message, *patterns):
    assert all(re.search(pattern, message) for pattern in patterns), message


def meant(name) -> str:
    return rf"did you mean '(--)?([\w.]+\.)?{re.escape(name)}'"


def test_the_run_is_valid_without_changes(folder):
    main(fit())
    assert (folder / "run" / "metrics.csv").exists()


def test_a_csv_file_is_read_as_data_not_as_configuration(folder):
    main(fit(data__train="prompts.csv", data__column="question"))
    assert (folder / "run" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"model__actor": "./nowhere"}, [r"model\.actor", r"\./nowhere", "does not exist"]),
        ({"model__actor": "./prompts.jsonl"}, [r"model\.actor", "is a file"]),
        ({"model__actor": "./no_tokenizer"}, [r"model\.actor", r"\./no_tokenizer", "tokenizer"]),
        ({"model__reference": "./nowhere"}, [r"model\.reference", r"\./nowhere"]),
        ({"model__critic": "./nowhere"}, [r"model\.critic", r"\./nowhere"]),
        ({"model__critic": "reward"}, [r"model\.critic", "'reward'", "RewardModel"]),
        ({"model__critic": "shard"}, [r"^model\.critic: there is no folder 'shard', did you mean 'shared'\?$"]),
        ({"model__actor": None}, [r"model\.actor is not set", "folder"]),
        ({"model__rewards": None}, [r"model\.rewards", "at least one"]),
        ({"model__rewards": "[]"}, [r"model\.rewards", "at least one"]),
        ({"data__train": None}, [r"data\.train is not set", "file"]),
    ],
)
def test_models_and_required_options(folder, capsys, changes, patterns):
    check(refusal(capsys, fit(**changes)), *patterns)


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"data__train": "bad.jsonl"}, [r"data\.train", r"bad\.jsonl, line 2", "JSON"]),
        ({"data__train": "list.jsonl"}, [r"data\.train", r"list\.jsonl, line 1", "object", "list"]),
        ({"data__train": "empty.jsonl"}, [r"data\.train", r"empty\.jsonl", "is empty"]),
        ({"data__train": "nowhere.jsonl"}, [r"data\.train", r"no file nowhere\.jsonl"]),
        ({"data__validation": "nowhere.csv"}, [r"data\.validation", r"no file nowhere\.csv"]),
        ({"data__column": "question"}, [r"data\.train", r"prompts\.jsonl", "'question'", "answer, prompt"]),
        ({"data__max_tokens": 1}, ["all 8 prompts", r"prompts\.jsonl", r"data\.max_tokens=1"]),
        ({"data__batch_size": 9}, [r"data\.batch_size is 9", "8 records"]),
        ({"data__batch_size": 0}, [r"batch_size", "1 or more", "0"]),
        ({"data__chat": "true"}, ["chat template"]),
        ({"ckpt_path": "nowhere.ckpt"}, ["ckpt_path", r"nowhere\.ckpt"]),
        ({"ckpt_path": "best"}, ["ckpt_path", r"no best\.ckpt in .*checkpoints"]),
    ],
)
def test_data(folder, capsys, changes, patterns):
    check(refusal(capsys, fit(**changes)), *patterns)


@pytest.mark.parametrize(
    ("rewards", "patterns"),
    [
        (reward("rewards.py:divides"), [r"rewards\.py:divides", "ZeroDivisionError", r"rewards\.py, line 2"]),
        (reward("rewards.py:many_lines"), [r"rewards\.py:many_lines", "RuntimeError", "first second"]),
        (reward("rewards.py:few"), [r"rewards\.py:few", "4 numbers", "1"]),
        (reward("rewards.py:nan"), [r"rewards/nan is nan in 4 of 4 responses", r"run/incident-1\.json"]),
        (reward("rewards.py:fin"), [r"rewards\.py", "'fin'", "fine, divides"]),
        (reward("nowhere.py:fine"), [r"no file nowhere\.py"]),
        (reward("answers", "ExactAnswer", "column"), ["'answers'", "prompt, answer"]),
        (reward("./nowhere", "RewardModel", "model"), [r"rewards\.model", r"\./nowhere", "does not exist"]),
    ],
)
def test_rewards(folder, capsys, rewards, patterns):
    check(refusal(capsys, fit(model__rewards=rewards)), *patterns)


@pytest.mark.parametrize(
    ("changes", "name", "patterns"),
    [
        ({"modle.actor": "m"}, "model.actor", [r"modle\.actor", "^(?!.*modle has)"]),
        ({"dta": "Prompts"}, "data", ["'dta'"]),
        ({"trainer__max_epoch": 3}, "max_epochs", [r"trainer\.max_epoch"]),
        ({"checkpoint__every": 3}, "every_n", [r"checkpoint\.every'", "keep_every_n"]),
        ({"model__itreations": 3}, "iterations", ["itreations", "PolicyGradient|model"]),
        ({"model__update__epoch": 3}, "epochs", [r"update\.epoch'", "minibatches"]),
        ({"model__updat__epochs": 3}, "epochs", [r"updat\.epochs'", r"did you mean 'model\.update\.epochs'"]),
        ({"model__sampling__temprature": 1}, "temperature", [r"sampling\.temprature", "max_tokens"]),
        ({"model__advantages": "GAE", "model__advantages__lamm": 0.9}, "lam", ["lamm", "GAE|advantages", "gamma"]),
        ({"model__advantages__lamm": 0.9}, "lam", ["lamm", "GAE|advantages", "gamma"]),
        (
            {"model__rewards": reward("f", option="funtion")},
            "function",
            ["funtion", "RewardFunction|rewards", "weight"],
        ),
        (
            {"model__actor_optimizer": "AdamW", "model__actor_optimizer__lrr": 1},
            "lr",
            ["lrr", "actor_optimizer|AdamW", "^(?!.*params)"],
        ),
        ({"data__bach_size": 4}, "batch_size", ["bach_size", "Prompts|data", "max_tokens"]),
    ],
)
def test_the_error_for_a_misspelt_option_names_the_nearest(folder, capsys, changes, name, patterns):
    check(refusal(capsys, fit(**changes)), "no option", meant(name), *patterns)


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("trainer: {", "trianer: {", "trainer.default_root_dir|trainer"),
        ("accelerator", "acelerator", "accelerator"),
        ("iterations", "itreations", "iterations"),
        ("max_tokens", "max_token", "max_tokens"),
        ("{function", "{weigth: 2, function", "weight"),
        ("iterations: 1", "update: {epoch: 1}", "epochs"),
        ("iterations: 1", "advantages: {class_path: GAE, init_args: {lamm: 0.9}}", "lam"),
        ("batch_size", "bach_size", "batch_size"),
    ],
)
def test_a_misspelt_option_in_a_file(folder, capsys, right, wrong, name):
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(right, wrong, 1))
    message = refusal(capsys, ["fit", "--config=config.yaml"])
    mistake = re.search(r"\w*(trianer|acelerator|itreations|max_token|weigth|epoch|lamm|bach_size)", wrong)[0]
    check(message, "no option", mistake, "|".join(meant(n) for n in name.split("|")))


def callback(class_path, options="{}") -> str:
    return f"[{{class_path: {class_path}, init_args: {options}}}]"


MODULES = "DPO, PolicyGradient, RewardModeling, SFT, TRPO"
DATA = "Demonstrations, Preferences, Prompts"


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"model": "PolicyGradent"}, ["model", meant("PolicyGradient"), MODULES]),
        ({"data": "Promts"}, ["data", meant("Prompts"), DATA]),
        ({"model__advantages": "GEA"}, ["advantages", meant("GAE")]),
        ({"model__objective": "Clipp"}, ["objective", meant("Clip")]),
        ({"model__kl": "FixdKL"}, ["kl", meant("FixedKL")]),
        ({"model__rewards": reward("f", "RewardFuncton")}, ["rewards", meant("RewardFunction"), "ExactAnswer"]),
        ({"model__actor_optimizer": "AdmW"}, ["actor_optimizer", meant("AdamW")]),
        ({"model": None}, ["model", MODULES]),
        ({"data": None, "data__train": None, "data__batch_size": None}, ["data", DATA]),
        ({"model__rewards": "[{function: 'rewards.py:fine'}]"}, ["rewards", "class_path", "ExactAnswer"]),
    ],
)
def test_the_error_for_an_unknown_class_names_the_existing_ones(folder, capsys, changes, patterns):
    message = refusal(capsys, fit(**changes))
    check(message, *patterns)
    assert "AlignmentModule" not in message  # a base class, which users cannot choose


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"model__advantages": "GAE", "model__advantages__lam": 2}, ["lam", r"\[0, 1\]", "2"]),
        ({"model__update__epochs": 0}, ["update|Update", "epochs", "1 or more", "0"]),
        ({"model__correction__mask_above": 3}, [r"correction\.mask_above", "mask_level", "null"]),
        ({"model__update__minibatches": 5}, ["minibatches", "4", "5"]),
        ({"model__sampling__max_tokens": 0}, ["sampling|Sampling", "max_tokens", "1 or more", "0"]),
        ({"model__sampling__temperature": 0}, [r"sampling\.temperature", "positive"]),
        ({"model__scores__clip": -1}, ["scores|ScoreShaping", "clip", "positive", "-1"]),
        ({"model__value_grad_scale": -5, "model__critic": "shared"}, [r"value_grad_scale must be 0 or more, not -5"]),
        ({"model__value_grad_scale": 0.5}, [r"value_grad_scale is 0\.5, but no critic is on the .*critic to shared$"]),
        ({"model__iterations": 0}, [r"model\.iterations", "1 or more", "0"]),
        ({"checkpoint__every_n": 0}, ["checkpoint|Checkpoint", "every_n", "1 or more", "0"]),
        ({"trainer__precision": "bf16-true"}, [r"trainer\.precision", "32-true or bf16-mixed", "'bf16-true'"]),
        ({"trainer__precision": "16-mixed", "trainer__strategy": "fsdp2"}, [r"trainer\.precision", "'16-mixed'"]),
        ({"trainer__precision": "transformer-engine"}, [r"trainer\.precision", "'transformer-engine'"]),
        ({"trainer__gradient_clip_val": 1}, [r"trainer\.gradient_clip_val", r"by model\.update\.clip_grad_norm$"]),
        ({"trainer__accumulate_grad_batches": 2}, [r"trainer\.accumulate_grad_batches", "micro-batches", "batch_size"]),
        (
            {"trainer__callbacks": callback("GradientAccumulationScheduler", "{scheduling: {0: 2}}")},
            [r"trainer\.callbacks must not", "GradientAccumulationScheduler"],
        ),
        ({"trainer__callbacks": callback("WeightAveraging")}, [r"not contain WeightAveraging: .* model\.averaging"]),
        ({"trainer__callbacks": callback("EMAWeightAveraging")}, ["not contain EMAWeightAveraging: "]),
        ({"trainer__callbacks": callback("StochasticWeightAveraging", "{swa_lrs: 0.1}")}, ["StochasticWeightAv.*: w"]),
        ({"trainer__callbacks": callback("LearningRateFinder")}, ["not contain LearningRateFinder: .* iterations"]),
    ],
)
def test_values_out_of_range(folder, capsys, changes, patterns):
    check(refusal(capsys, fit(**changes)), *patterns)


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"model__iterations": "many"}, ["model.iterations", "'many'", "whole number"]),
        ({"model__iterations": "1.5"}, ["model.iterations", "1.5", "whole number"]),
        ({"model__update__epochs": "many"}, ["model.update.epochs", "'many'", "whole number"]),
        ({"model__advantages__lam": "high"}, ["advantages.lam", "'high'", "number"]),
        ({"model__bootstrap_truncated": "maybe"}, ["model.bootstrap_truncated", "'maybe'", "true or false"]),
        ({"model__correction__level": "tokens"}, ["model.correction.level", "'tokens'", "token, sequence, geometric"]),
        ({"model__correction": "TIS"}, ["model.correction", "'TIS'", "null or have options .*truncate_above"]),
        ({"model__rewards": "RewardFunction"}, ["model.rewards", "'RewardFunction'", "list"]),
        (
            {"model__actor_optimizer": "AdamW", "model__actor_optimizer__lr": "fast"},
            ["optimizer.lr", "'fast'", "number"],
        ),
        ({"data__too_long": "cut"}, ["data.too_long", "'cut'", "drop, cut_left, cut_right"]),
        ({"trainer__max_epochs": "many"}, ["trainer.max_epochs", "'many'", "whole number"]),
    ],
)
def test_values_of_the_wrong_type(folder, capsys, changes, patterns):
    check(refusal(capsys, fit(**changes)), *patterns)


def test_an_interval_between_validations_longer_than_an_epoch(folder, capsys):
    message = refusal(capsys, fit(data__validation="prompts.jsonl", trainer__val_check_interval=5))
    check(message, r"trainer\.val_check_interval", r"\(5\)", r"\(2\)", r"check_val_every_n_epoch: null")
    assert not (folder / "run").exists()  # a run without an iteration leaves nothing that counts as an older run


@pytest.mark.parametrize(
    ("logger", "patterns"),
    [
        ("CSVLogger", [r"^trainer\.logger\.save_dir is not set; CSVLogger needs it$"]),
        ("[TensorBoardLogger]", [r"^trainer\.logger\.save_dir is not set; TensorBoardLogger needs it$"]),
        ("TensorBordLogger", [r"^trainer\.logger: ", meant("TensorBoardLogger")]),
        ("CometLogger", [r"^trainer\.logger: CometLogger needs a package", "pip install 'comet-ml"]),
    ],
)
def test_loggers(folder, capsys, logger, patterns):
    if logger == "CometLogger" and importlib.util.find_spec("comet_ml"):
        pytest.skip("the package is installed")
    check(refusal(capsys, fit(trainer__logger=logger)), *patterns)


def test_wandb_without_a_login(folder, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    message = refusal(capsys, fit(trainer__logger="WandbLogger"))
    check(message, r"^trainer\.logger: W&B has no API key", "`wandb login`", "WANDB_MODE=offline")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("prompts.jsonl", "'prompts.jsonl' is not an option"),
        ("ppo", "'ppo' is not an option, did you mean '--config ppo'?"),
        ("run.yaml", "'run.yaml' is not an option, did you mean '--config run.yaml'?"),
        ("model.actor=x", "'model.actor=x' is not an option, did you mean '--model.actor=x'?"),
        ("model.actor", "'model.actor' is not an option, did you mean '--model.actor'?"),
    ],
)
def test_a_word_that_belongs_to_no_option(folder, capsys, word, message):
    assert refusal(capsys, [*fit(), word]) == message


@pytest.mark.parametrize("option", ["model.iterations", "data.train", "trainer.max_epochs"])
def test_an_option_without_its_value(folder, capsys, option):
    assert refusal(capsys, [*fit(), f"--{option}", "--model.kl.coef=1"]) == f"{option} needs a value"
    assert refusal(capsys, [*fit(), f"--{option}"]) == f"{option} needs a value"


@pytest.mark.parametrize(
    ("recipe", "option", "nearest"),
    [
        ("dpo", "model.update.max_tokens", "model.max_tokens"),  # the option of another module
        ("dpo", "model.optimzer.lr", "model.optimizer.lr"),
        ("reward", "model.actor", "model.reward"),
        ("ppo", "model.reward", "model.rewards"),
        ("ppo", "model.lam", "model.advantages.lam"),
        ("ppo", "model.adaptr.rank", "model.adapter.rank"),
        ("ppo", "trianer.max_epoch", "trainer.max_epochs"),
        ("ppo", "learning_rate", "model.actor_optimizer.lr"),  # the options of other trainers
        ("dpo", "model.learning_rate", "model.optimizer.lr"),
        ("ppo", "model.update.kl_coef", "model.kl.coef"),
        ("grpo", "trainer.num_train_epochs", "trainer.max_epochs"),
        ("sft", "model.optimiser.lr", "model.optimizer.lr"),
        ("reward", "model.update.clip_grad_norm", "model.clip_grad_norm"),
        ("ppo", "model.clip_grad_norm", "model.update.clip_grad_norm"),
        ("ppo", "model.responses", "model.guard.responses' or 'model.sampling.responses"),
        ("ppo", "model.optimizer", "model.actor_optimizer"),
    ],
)
def test_the_nearest_option_is_among_all_of_a_module(capsys, recipe, option, nearest):
    message = refusal(capsys, ["fit", "--config", recipe, f"--{option}", "3"])
    check(message, rf"'{re.escape(option)}'", f"did you mean '{re.escape(nearest)}'\\?")
    assert "optimizer" in message or recipe != "dpo"  # in the list of DPO's options


@pytest.mark.parametrize(
    ("recipe", "right", "wrong", "message"),
    [
        ("dpo", "    optimizer:", "    optimzer:", "no option 'model.optimzer', did you mean 'model.optimizer'?"),
        ("ppo", "    actor_optimizer:", "    optimizer:", "'model.optimizer', did you mean 'model.actor_optimizer'?"),
        ("dpo", "    actor:", "    update: {max_tokens: 9}\n    actor:", "did you mean 'model.max_tokens'?"),
        ("ppo", "  init_args:", "  seeds: 3\n  init_args:", "model.seeds should be inside model.init_args"),
        (
            "ppo",
            "class_path: GAE",
            "class_path: lit_rlhf.GEA",
            "there is no class 'lit_rlhf.GEA'; it should be BestOfN, GAE, ",
        ),
        ("ppo", "class_path: Clip", "class_path: lit_rlhf.Clop", "did you mean 'Clip'?"),
        ("ppo", "class_path: AdamW", "class_path: torch.optim.AdmW", "did you mean 'AdamW'?"),
        (
            "ppo",
            "class_path: GAE",
            "class_path: nowhere.Mine",
            "advantages: there is no module 'nowhere'; it should be",
        ),
        (
            "ppo",
            "class_path: PolicyGradient",
            "class_path: nowhere.Mine",
            "model: there is no module 'nowhere'; it should",
        ),
    ],
)
def test_a_mistake_in_a_recipe(tmp_path, capsys, recipe, right, wrong, message):
    text = recipes.find_recipe(recipe).read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong, 1))
    assert message in refusal(capsys, ["fit", "--config", str(tmp_path / "wrong.yaml")])


def test_all_options_with_the_last_name_are_suggested(capsys):
    message = refusal(capsys, ["fit", "--config", "ppo", "--model.max_tokens", "3"])
    suggested = message.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert suggested[0] == "'model.update.max_tokens'"  # the same in the other modules
    assert "'model.sampling.max_tokens'" in suggested


def test_a_misspelt_recipe(capsys):
    check(refusal(capsys, ["fit", "--config", "strategy/fsd2"]), "strategy/fsd2", meant("strategy/fsdp2"))


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--model", "SFT", "--model.adapter.help"),
        ("fit", "--model=SFT", "--data", "Prompts", "--model.adapter.help"),
        ("fit", "--config", "ppo", "--model.adapter.help"),
        ("plan", "--config=ppo", "--model.adapter.help"),
        ("fit", "--model.help", "SFT", "--model.adapter.help"),
    ],
)
def test_help_of_an_option_that_has_options(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 0
    assert "The rank r of B A" in capsys.readouterr().out


def test_help_of_an_option_of_no_class(capsys):
    check(refusal(capsys, ["fit", "--model.adapter.help"]), "name the class", "--model CLASS --model.adapter.help")


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        (["--model.help", "Nope"], ["^model: there is no class 'Nope'", MODULES]),
        (["--config=ppo", "--model.engine.help", "Aead"], [r"^model\.engine: ", meant("Ahead")]),
        (["--trainer.logger.help", "TensorBordLogger"], [r"^trainer\.logger: ", meant("TensorBoardLogger")]),
        (["--trainer.callbacks.help", "ErlyStopping"], [r"^trainer\.callbacks: ", meant("EarlyStopping")]),
    ],
)
def test_help_of_a_class_that_does_not_exist(capsys, words, patterns):
    check(refusal(capsys, ["fit", *words]), *patterns)


def test_an_unknown_command(capsys):
    check(refusal(capsys, ["fti"]), "'fti'", meant("fit"), "validate, test, predict")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_accelerator_that_is_not_available(folder, capsys):
    check(refusal(capsys, fit(trainer__accelerator="gpu")), "gpu")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        (None, [r"no file .*broken\.yaml|broken\.yaml does not exist"]),
        ("model: {class_path: SFT\ndata: 1\n", [r"broken\.yaml", "line 2", "YAML"]),
        ("", [r"broken\.yaml", "empty|mapping"]),
        ("- model\n", [r"broken\.yaml", "mapping"]),
    ],
)
def test_config_files(folder, capsys, text, patterns):
    if text is not None:
        (folder / "broken.yaml").write_text(text)
    check(refusal(capsys, ["fit", "--config=broken.yaml"]), *patterns)


@pytest.mark.parametrize(
    ("changes", "status", "patterns"),
    [
        ({"model__update__epoch": 3}, 2, [meant("epochs")]),
        ({"model__rewards": reward("rewards.py:divides")}, 1, ["ZeroDivisionError", "line 2"]),
    ],
)
def test_the_command_itself(folder, changes, status, patterns):
    done = preloaded.run("-m", "lit_rlhf.cli", *fit(**changes))
    lines = done.stderr.strip().splitlines()
    reported = [line for line in lines if line.startswith("lit-rlhf: error: ")]
    assert done.returncode == status
    assert reported == lines[-1:], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    check(reported[0], *patterns)


@pytest.fixture
def adapters(folder, tiny_adapter, tiny_model):
    """Return the working folder with adapters of the tiny Llama and of a GPT-2, and with a whole reward model."""
    score = tiny_model("llama", task="score")
    targets = {
        "sft": tiny_adapter(),
        "judge": tiny_adapter(task="score"),
        "other": tiny_adapter("gpt2"),
        "score": score,
    }
    targets |= {
        "other_judge": tiny_adapter("gpt2", task="score"),
        "base": tiny_model(),
        "dora": tiny_adapter(use_dora=True),
    }
    for name, target in targets.items():
        (folder / name).symlink_to(target)
    for name, base in (("lost", "./nowhere"), ("broken", None)):
        (folder / name).mkdir()
        text = "{" if base is None else json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
        (folder / name / "adapter_config.json").write_text(text)
    return folder


JUDGE = reward("judge", "RewardModel", "model")


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"adapter__rank": 0}, [r"model\.adapter\.rank must be 1 or more, not 0"]),
        ({"adapter__alpha": 0}, [r"model\.adapter\.alpha must be positive, not 0"]),
        ({"adapter__alpha": "high"}, [r"model\.adapter", "'high'", "number"]),
        ({"adapter__rnak": 4}, ["no option", "rnak", meant("rank")]),
        ({"adapter__chained": "added"}, [r"model\.adapter", "'added'", "stacked, merged"]),
        ({"adapter__target_modules": "[q_proj, c_attn]"}, [r"target_modules: c_attn is not a linear", "gate_proj"]),
        ({"reference": "other"}, [r"model\.reference: the base of the adapter other is", "merge"]),
        ({"critic": "other_judge"}, [r"model\.critic: the base of the adapter other_judge is", "merge"]),
        ({"rewards": reward("other_judge", "RewardModel", "model")}, [r"rewards\.model: the base", "other_judge"]),
        ({"critic": "reward"}, [r"model\.critic is 'reward', but no reward is a RewardModel"]),
        (
            {"critic": "reward", "rewards": reward("score", "RewardModel", "model")},
            [r"model\.critic is 'reward', but the reward model is not an adapter of the actor's base"],
        ),
        ({"critic": "score"}, [r"model\.critic must be .*an adapter of the actor's base, not 'score'"]),
        ({"critic": "sft"}, [r"model\.critic: the adapter sft has no head"]),
        ({"rewards": reward("sft", "RewardModel", "model")}, [r"rewards\.model: the adapter sft has no head"]),
        ({"actor": "lost"}, [r"model\.actor", r"\./nowhere does not exist"]),
        ({"actor": "lost", "adapter__rank": None}, [r"model\.actor", r"\./nowhere does not exist"]),
        ({"actor": "broken"}, [r"broken: adapter_config\.json names no base model"]),
        ({"actor": "broken", "adapter__rank": None}, [r"broken: adapter_config\.json names no base model"]),
        ({"reference": "lost"}, [r"model\.reference", "lost"]),
        ({"actor": "dora"}, [r"model\.actor: DoRA cannot be combined with another adapter"]),
        ({"actor": "sft", "adapter__dora": "true"}, [r"model\.actor: DoRA cannot be combined", "sft"]),
        (
            {"actor": "sft", "adapter__chained": "merged", "rewards": JUDGE},
            [r"rewards\.model: the base of the adapter judge is .*sft merged into it"],
        ),
        (
            {"actor": "{config: {model_type: llama, hidden_size: 32}, tokenizer: ./model}"},
            [r"model\.actor: an adapter needs a base with weights"],
        ),
    ],
)
def test_adapters(adapters, capsys, changes, patterns):
    options = {"actor": "base", "adapter__rank": 2} | changes
    check(refusal(capsys, fit(**{f"model__{name}": value for name, value in options.items()})), *patterns)


@pytest.mark.parametrize("module", ["RewardModeling", "DPO"])
@pytest.mark.parametrize(
    ("record", "patterns"),
    [
        ({"prompt": "w1", "chosen": " w2", "rejected": " w2"}, ["record 2", "equal"]),
        ({"prompt": "w1", "responses": [" w2"]}, ["record 2", "2 responses or more", "it ranks 1"]),
        ({"prompt": "w1", "responses": [" w2", [" w3", " w4"]]}, ["record 2", "tie"]),
        ({"prompt": "w1", "chosen": " w2"}, ["record 2", "'rejected'", "chosen, prompt"]),
    ],
)
def test_preferences(tmp_path, tiny_model, capsys, module, record, patterns):
    right = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(right)}\n{json.dumps(record)}\n")
    role = "reward" if module == "RewardModeling" else "actor"
    words = ["fit", "--model", module, f"--model.{role}", str(tiny_model("llama")), "--data", "Preferences"]
    words += ["--data.train", str(path), "--data.batch_size", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    check(refusal(capsys, [*words, "--trainer.accelerator", "cpu"]), r"data\.train", *patterns)


@pytest.mark.parametrize(("module", "role"), [("SFT", "actor"), ("RewardModeling", "reward"), ("DPO", "actor")])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gradient_clip_val=1.0", r"trainer\.gradient_clip_val must be null: .* by model\.clip_grad_norm$"),
        ("accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches must be 1: .*data\.batch_size"),
    ],
)
def test_options_of_automatic_optimization(folder, capsys, module, role, option, message):
    words = ["fit", "--model", module, f"--model.{role}=./model", "--data=Preferences", "--data.train=prompts.jsonl"]
    check(refusal(capsys, [*words, f"--trainer.{option}", "--trainer.accelerator=cpu"]), message)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        (["--model", "RewardModeling"], [r"model\.reward is not set"]),
        (["--model", "DPO"], [r"model\.actor is not set"]),
        (["--model", "DPO", "--model.actor", "x", "--model.beta", "0"], [r"model\.beta must be positive"]),
        (["--model", "DPO", "--model.actor", "x", "--model.label_smoothing", "0.5"], [r"label_smoothing", "0.5"]),
        (["--model", "TRPO", "--model.actor", "x", "--model.critic", "shared"], ["critic", "region"]),
        (["--model", "TRPO", "--model.actor", "x", "--model.region.max_kl", "0"], [r"region\.max_kl"]),
        (
            ["--model", "PolicyGradient", "--model.actor", "x", '--model.rewards=[{"class_path": "RemoteReward"}]'],
            [r"model\.rewards\.url is not set; RemoteReward needs it"],
        ),
    ],
)
def test_options_of_the_other_modules(capsys, words, patterns):
    check(refusal(capsys, ["fit", *words, "--data", "Preferences", "--data.train", "x.jsonl"]), *patterns)


@pytest.mark.parametrize(
    ("module", "data", "option"),
    [("DPO", "Prompts", "actor"), ("RewardModeling", "Demonstrations", "reward"), ("SFT", "Preferences", "actor")],
)
def test_data_for_another_module(tmp_path, tiny_model, capsys, module, data, option):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "w1", "text": "w2", "chosen": " w2", "rejected": " w3"}) + "\n")
    words = ["fit", "--model", module, f"--model.{option}", str(tiny_model("llama")), "--data", data]
    words += ["--data.train", str(path), "--data.batch_size", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    check(refusal(capsys, [*words, "--trainer.accelerator", "cpu"]), f"data: {module} takes", "this data module gives")


@pytest.mark.parametrize(("module", "data"), [("SFT", "Demonstrations"), ("DPO", "Preferences"), ("SFT", "Prompts")])
@pytest.mark.parametrize("source", ["validation", "train"])
def test_predict_with_a_module_that_writes_no_responses(folder, capsys, module, data, source):
    words = ["predict", f"--model={module}", "--model.actor=./model", f"--data={data}"]
    message = refusal(capsys, [*words, f"--data.{source}=prompts.jsonl", "--trainer.accelerator=cpu"])
    check(message, f"^predict: {module} writes no responses; .* --config ppo --model.actor EXPORT")
