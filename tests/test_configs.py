"""Every recipe runs, is short, and says how to run it; tests/test_pages.py parses the commands that they name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import load_model

pytestmark = pytest.mark.usefixtures("without_plans")
CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted((CONFIGS / "strategy").glob("*.yaml"))
PRINT = "--print_config"
ENGINES = sorted((CONFIGS / "engine").glob("*.yaml"))
STARTER = CONFIGS / "starter" / "config.yaml"
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - {*OVERLAYS, *ENGINES, STARTER})
QUICKSTART = sorted((CONFIGS / "quickstart").glob("*.yaml"))
GSM8K = CONFIGS / "ppo_gsm8k.yaml"
ADAPTERS = [path for path in RECIPES if path.stem.endswith("_lora")]


def commands(recipe: Path) -> list[str]:
    """Return the commands in the comments at the top of a recipe."""
    return re.findall(r"^#   (lit-rlhf .*)$", recipe.read_text(), flags=re.MULTILINE)


def name_of(recipe: Path) -> str:
    """Return the name by which ``--config`` finds a recipe."""
    return recipe.relative_to(CONFIGS).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the files that the recipes name."""
    folder = tmp_path_factory.mktemp("recipes")
    records = {
        "demonstrations": {"prompt": "w1 w2", "response": " w3 w4"},
        "pairs": {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"},
        "held_out": {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"},
        "rankings": {"prompt": "w1 w2", "responses": [" w3 w4", " w5", " w6"]},
        "prompts": {"prompt": "w1 w2"},
    }
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 64)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_is_short_and_says_how_to_run_it(recipe):
    lines = recipe.read_text().splitlines()
    assert 15 <= len(lines) <= 40
    assert commands(recipe)[0].startswith(f"lit-rlhf fit --config {name_of(recipe)}")


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - {*ADAPTERS, *QUICKSTART, GSM8K}), ids=name_of)
def test_recipe_runs_one_iteration(recipe, folder, tiny_model, tmp_path, monkeypatch):
    """By the command at its top, with a tiny model and sizes to match; the others run below and in the quickstart."""
    monkeypatch.chdir(folder)
    options = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    program, *words = commands(recipe)[0].split()
    assert program == "lit-rlhf"
    words += [f"--model.{'reward' if 'reward' in options else 'actor'}", str(tiny_model()), "--data.batch_size", "4"]
    words = [word.lower() if word.endswith(".jsonl") else word for word in words]
    if "sampling" in options:
        words += ["--model.sampling.max_tokens", "4", "--model.iterations", "1"]
    if options.get("engine"):
        words += ["--model.engine.workers", "0"]
    quiet = ["--trainer.enable_progress_bar", "false", "--report.at_end", "false", "--trainer.limit_train_batches", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path)]
    main([*words, *quiet])
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) > 1
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_strategy(overlay, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(CONFIGS / "ppo.yaml"), "--config", str(overlay), "--print_config"])
    assert exit_.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    strategy = yaml.safe_load(overlay.read_text())["trainer"]["strategy"]
    if isinstance(strategy, dict):
        assert strategy["init_args"].items() <= whole["trainer"]["strategy"]["init_args"].items()
    else:
        assert whole["trainer"]["strategy"] == strategy
    assert whole["trainer"]["default_root_dir"] == "runs/ppo"
    assert any(f"--config {name_of(overlay)}" in line for line in overlay.read_text().splitlines()[:3])


@pytest.mark.parametrize("overlay", ENGINES, ids=lambda path: path.stem)
def test_engine(overlay, capsys):
    strategy = CONFIGS / "strategy" / "ddp.yaml"
    with pytest.raises(SystemExit) as exit_:
        main(
            ["fit", *(word for c in (CONFIGS / "ppo.yaml", strategy, overlay) for word in ("--config", str(c))), PRINT]
        )
    assert exit_.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(overlay.read_text())
    engine, used = given["model"]["init_args"]["engine"], whole["model"]["init_args"]["engine"]
    assert used["class_path"].endswith(engine["class_path"])
    assert engine["init_args"].items() <= used["init_args"].items()
    assert whole["trainer"]["devices"] == given["trainer"]["devices"]
    assert not set(engine["init_args"]["devices"]) & set(given["trainer"]["devices"])
    assert any(f"--config {name_of(overlay)}" in line for line in overlay.read_text().splitlines()[:3])


def test_gsm8k_recipe_runs_with_a_tiny_model_and_a_local_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"question": "w1 w2?", "answer": "w3 #### 7"}\n' * 8)
    main(
        [
            *("fit", "--config", str(CONFIGS / "ppo_gsm8k.yaml"), "--model.actor", str(tiny_model("qwen2", chat=True))),
            *("--data.train", "train.jsonl", "--data.validation", "train.jsonl", "--data.batch_size", "8"),
            *("--model.sampling.max_tokens", "8", "--model.iterations", "2", "--trainer.accelerator", "cpu"),
        ]
    )
    rows = Path("runs/ppo_gsm8k/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2  # the rows of an iteration and a validation in each epoch


def test_recipes_with_adapters_run_one_after_the_other_on_one_base(folder, tiny_model, tmp_path, monkeypatch):
    """Each reads what the one before has written, under the names that they have; only the sizes are changed."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    base = str(tiny_model())
    few = ("--model.sampling.max_tokens", "4", "--model.iterations", "2", "--data.batch_size", "4")
    options = {"sft_lora": ("--model.actor", base), "reward_lora": (), "ppo_lora": few, "dpo_lora": ()}
    for recipe, changed in options.items():
        main(["fit", "--config", str(CONFIGS / f"{recipe}.yaml"), "--trainer.accelerator", "cpu", *changed])
        config = json.loads(Path("runs", recipe, "export", "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
        assert config["r"] == (16 if recipe == "sft_lora" else 32)  # with that of the SFT adapter
    main(["export", "runs/ppo_lora", "--merge"])
    assert not Path("runs/ppo_lora/export_merged/adapter_config.json").exists()  # or it would count as an adapter
    assert not Path("runs/ppo_lora/export/model.safetensors").exists()
    assert load_model("runs/ppo_lora/export_merged").num_parameters() == load_model(base).num_parameters()


@pytest.mark.parametrize("recipe", ADAPTERS, ids=lambda path: path.stem)
def test_recipes_with_adapters_have_ten_times_the_learning_rates_of_their_siblings(recipe):
    sibling = recipe.with_stem(recipe.stem.removesuffix("_lora"))
    ours, theirs = (yaml.safe_load(path.read_text())["model"]["init_args"] for path in (recipe, sibling))
    optimizers = [name for name in ours if name.endswith("optimizer")]
    assert optimizers
    for name in optimizers:
        assert ours[name]["init_args"]["lr"] == pytest.approx(10 * theirs[name]["init_args"]["lr"])
    assert LoRA(**ours["adapter"]).scaling == 2
