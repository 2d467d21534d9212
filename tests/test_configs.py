"""Every recipe is accepted without changes, is short, and says how to run it."""

import json
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
ADAPTERS = [path for path in RECIPES if path.stem.endswith("_lora")]


def name_of(recipe: Path) -> str:
    """Return the name by which ``--config`` finds a recipe."""
    return recipe.relative_to(CONFIGS).with_suffix("").as_posix()


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", name_of(recipe), "--print_config"])
    assert exit_.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(recipe.read_text())
    assert whole["model"]["class_path"].endswith(given["model"]["class_path"])
    assert whole["trainer"]["default_root_dir"] == given["trainer"]["default_root_dir"]
    lines = recipe.read_text().splitlines()
    assert 15 <= len(lines) <= 40
    assert any(line.startswith(f"#   lit-rlhf fit --config {name_of(recipe)}") for line in lines[:4])


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


def test_recipes_with_adapters_run_one_after_the_other_on_one_base(tiny_model, tmp_path, monkeypatch):
    """Each reads what the one before has written, under the names that they have; only the sizes are changed."""
    monkeypatch.chdir(tmp_path)
    files = {
        "demonstrations": '{"prompt": "w1 w2", "response": " w3 w4"}',
        "pairs": '{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}',
        "prompts": '{"prompt": "w1 w2"}',
    }
    for name, line in files.items():
        Path(f"{name}.jsonl").write_text(f"{line}\n" * 64)
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
