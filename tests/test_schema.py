"""The JSON schema accepts every configuration that comes with the package, and refuses mistakes."""

import copy
import json

import jsonschema
import pytest
import yaml

from lit_rlhf import recipes
from lit_rlhf.cli import main
from lit_rlhf.whole_schema import schema_text

CONFIGS = sorted(recipes.folder().rglob("*.yaml"))
PPO = yaml.safe_load(recipes.find_recipe("ppo").read_text())
PRINTED = ("ppo", "--config", "strategy/fsdp2", "--model.adapter.rank", "4", "--model.engine", "Ahead")


@pytest.fixture(scope="module")
def schema():
    return json.loads(schema_text())


@pytest.fixture(scope="module")
def valid(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema).is_valid


def test_the_command_prints_the_schema(monkeypatch, capsys):
    monkeypatch.setattr("lit_rlhf.whole_schema.schema_text", lambda: "{}\n")
    main(["schema"])
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(recipes.folder()).as_posix())
def test_every_configuration_of_the_package_is_valid(valid, path):
    assert valid(yaml.safe_load(path.read_text()))


def changed(option, value):
    """Return PPO's recipe with an option, named by its path, set to another value."""
    config = copy.deepcopy(PPO)
    *path, last = option.split(".")
    target = config
    for part in path:
        target = target[int(part) if part.isdigit() else part]
    target[last] = value
    return config


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("modle", None, {}),  # a misspelt option is wrong with any value
        ("model.init_args.itreations", None, 3),
        ("trainer.max_epoch", None, 3),
        ("model.init_args.advantages.init_args.lamm", None, 0.9),
        ("model.init_args.update.epoch", None, 3),
        ("model.init_args.rewards.0.init_args.wieght", None, 1.0),
        ("model.init_args.actor_optimizer.init_args.lrr", None, 1.0),
        ("model.clas_path", None, "PolicyGradient"),
        ("model.class_path", "lit_rlhf.PolicyGradient", "PolicyGradent"),
        ("model.class_path", "my_parts.MyPPO", "lit_rlhf.PolicyGradent"),
        ("model.init_args.advantages", "TD0", "TD1"),
        ("model.init_args.advantages", {"class_path": "my_parts.Mine", "init_args": {"n": 1}}, {"class_path": "Mine"}),
        ("model.init_args.kl.class_path", "FixedKL", "AdaptiveKl"),
        ("model.init_args.engine", "NativeEngine", "VLLM"),
        ("model.init_args.iterations", None, "many"),
        ("model.init_args.iterations", 3, 1.5),
        ("model.init_args.actor", {"config": {"model_type": "gpt2"}, "tokenizer": "t"}, {"confg": {}}),
        ("model.init_args.adapter", {"rank": 4, "quantization": "nf4"}, {"rank": 4, "quantization": "nf5"}),
        ("model.init_args.rewards", [], "RewardFunction"),
        ("model.init_args.actor_scheduler", {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 3}}, "Cosine"),
        ("trainer.devices", [0, 1], {"all": True}),
        ("trainer.callbacks", ["CompileLayers", "my_parts.PrintBest"], ["CompileLayer"]),
        ("trainer.logger", {"class_path": "WandbLogger", "init_args": {"project": "p"}}, "Wandb"),
        ("trainer.logger", {"class_path": "WandbLogger", "init_args": {"entity": "me"}}, {"class_path": "WandB"}),
        ("data.init_args.batch_size", 4, "4"),
        ("checkpoint.mode", "min", "least"),
    ],
)
def test_a_mistake_is_not_valid(valid, option, right, wrong):
    if right is not None:
        assert valid(changed(option, right))
    assert not valid(changed(option, wrong))


def test_the_schema_has_descriptions_and_defaults(schema):
    gae = schema["definitions"]["lit_rlhf.algorithms.advantages.GAE"]
    assert gae["properties"]["lam"]["default"] == 0.95
    assert gae["properties"]["lam"]["description"].startswith("The λ of the advantages")
    names = schema["definitions"]["choice.AdvantageEstimator"]["anyOf"][0]["enum"]
    assert {"GAE", "lit_rlhf.GAE", "lit_rlhf.algorithms.advantages.GAE", "VTrace"} <= set(names)
    own = [name for name in schema["definitions"] if name.startswith("lit_rlhf.")]
    undescribed = [
        f"{name}.{option}"
        for name in own
        for option, described in schema["definitions"][name]["properties"].items()
        if "description" not in described
    ]
    assert undescribed == []


def printed(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", *words])
    assert exit_.value.code in (0, None)
    return capsys.readouterr().out


def test_a_printed_configuration_is_read_back(valid, capsys, tmp_path, monkeypatch):
    """With and without comments, a recipe with options becomes the same configuration again."""
    monkeypatch.chdir(tmp_path)
    plain = printed(capsys, *PRINTED, "--print_config")
    assert valid(yaml.safe_load(plain))
    (tmp_path / "plain.yaml").write_text(plain)
    commented = printed(capsys, *PRINTED, "--print_config=comments")
    (tmp_path / "commented.yaml").write_text(commented)
    for file in ("plain.yaml", "commented.yaml"):
        assert printed(capsys, file, "--print_config") == plain
    assert yaml.safe_load(commented) == yaml.safe_load(plain)
    lines = [line.strip() for line in commented.splitlines()]
    assert lines[lines.index("rank: 4") - 1] == "# The rank r of B A (r in peft)."
    assert lines[lines.index("seed_everything: 42") - 1].startswith("# The seed")
    assert any("Choices: BestOfN, GAE, GroupNormalized" in line for line in lines)
    assert max(map(len, commented.splitlines())) <= 130


def test_later_options_take_precedence(capsys, tmp_path, monkeypatch):
    """As docs/configs.md says, also for the options of a class that replaces another one."""
    monkeypatch.chdir(tmp_path)
    gae = {"class_path": "GAE", "init_args": {"gamma": 0.7, "lam": 0.5}}
    first = {"iterations": 3, "advantages": gae, "sampling": {"max_tokens": 7}}
    (tmp_path / "first.yaml").write_text(json.dumps({"model": {"init_args": first}}))
    (tmp_path / "last.yaml").write_text(json.dumps({"model": {"init_args": {"advantages": "NStep", "iterations": 9}}}))
    words = ("first.yaml", "--model.iterations=5", "--model.sampling.max_tokens=8", "--config", "last.yaml")
    options = yaml.safe_load(printed(capsys, "ppo", "--config", *words, "--print_config"))["model"]["init_args"]
    assert options["iterations"] == 9
    assert options["sampling"]["max_tokens"] == 8
    assert options["advantages"] == {"class_path": "lit_rlhf.NStep", "init_args": {"n": 8, "gamma": 0.7}}
    assert options["rewards"][0]["class_path"] == "lit_rlhf.RewardFunction"


def test_a_mistake_is_reported_when_comments_are_asked_for(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "ppo", "--model.itreations", "3", "--print_config=comments"])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean 'model.iterations'" in captured.err
