"""Every recipe is accepted without changes, is short, and says how to run it."""

from pathlib import Path

import pytest
import yaml

from lit_rlhf.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted((CONFIGS / "strategy").glob("*.yaml"))
PRINT = "--print_config"
ENGINES = sorted((CONFIGS / "engine").glob("*.yaml"))
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - set(OVERLAYS) - set(ENGINES))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert exit_.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(recipe.read_text())
    assert whole["model"]["class_path"].endswith(given["model"]["class_path"])
    assert whole["trainer"]["default_root_dir"] == given["trainer"]["default_root_dir"]
    lines = recipe.read_text().splitlines()
    assert 15 <= len(lines) <= 40
    assert any(line.startswith("#   lit-rlhf fit --config") for line in lines[:4])


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
    assert any(str(overlay.relative_to(CONFIGS.parent)) in line for line in overlay.read_text().splitlines()[:3])


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
    assert any(str(overlay.relative_to(CONFIGS.parent)) in line for line in overlay.read_text().splitlines()[:3])


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
