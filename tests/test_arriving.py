"""The pages for those who come from other trainers: every option that they name exists, and what they show works."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import preloaded
import pytest
import yaml
from pages import exists

import lit_rlhf
from lit_rlhf import DPO, Correction, PolicyGradient, RewardModeling
from lit_rlhf.data import Preferences, Prompts

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"from-{name}.md").read_text(encoding="utf-8") for name in ("trl", "openrlhf", "verl")}
FIELDS = {"PPOConfig": 33, "GRPOConfig": 79, "DPOConfig": 26, "RewardConfig": 12}  # of TRL 1.16.0; PPOConfig: 1.12.0
MODULES = {
    "PPOConfig": (PolicyGradient, Prompts),
    "GRPOConfig": (PolicyGradient, Prompts),
    "DPOConfig": (DPO, Preferences),
    "RewardConfig": (RewardModeling, Preferences),
}
PATH = re.compile(r"`((?:model|data|trainer|checkpoint|samples|plan)(?!\.jsonl)(?:\.\w+)+)(?::[^`]*)?`")


def table(page, heading):
    """Return the rows of the table under a heading: the name there, what is here, and the notes."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 for row in rows)
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("heading", FIELDS)
def test_every_option_of_a_config_has_a_row(heading):
    rows = table(PAGES["trl"], heading)
    assert len(rows) == FIELDS[heading]
    for name, (here, *_) in rows.items():
        paths = PATH.findall(here)
        assert paths or here == "–", name
        assert [path for path in paths if not exists(path, MODULES[heading])] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_option_that_a_page_names_exists(name):
    ours = PAGES[name]
    if name == "verl":  # verl has options with such names, too
        ours = re.sub(r"^\| `[^`]+`", "|", ours, flags=re.MULTILINE).replace("`data.train_batch_size`", "")
    paths = set(PATH.findall(ours))
    assert len(paths) > 30
    assert sorted(path for path in paths if not exists(path)) == []


def test_what_does_not_exist_is_found():
    assert exists("model.update.epochs")
    assert exists("model.actor_optimizer.lr")
    wrong = ["model.update.epoch", "model.advantages.lamda", "data.batchsize", "trainer.devices.lr", "model.epochs"]
    assert [path for path in wrong if exists(path)] == []
    assert not exists("model.beta", MODULES["PPOConfig"])


@pytest.mark.parametrize("name", PAGES)
def test_named_classes_exist(name):
    theirs = {"PPOTrainer", "GRPOTrainer", "DPOTrainer", "TrainingArguments", "LoraConfig", *FIELDS}
    lightnings = {"WandbLogger", "TensorBoardLogger", "LinearLR"}
    found = set(re.findall(r"`([A-Z][a-z]*[A-Z][A-Za-z]+|GAE|CISPO|Clip|Ahead)`", PAGES[name]))
    assert found
    assert found - theirs - lightnings <= {*lit_rlhf.__all__, "DPO", "SFT"}


@pytest.mark.parametrize("name", PAGES)
def test_corrections_are_valid(name):
    """As options that `Correction` accepts."""
    found = re.findall(r"`({(?:level|truncate_above)[^}]*})`", PAGES[name])
    assert bool(found) == (name != "verl")
    assert all(Correction(**yaml.safe_load(text)) for text in found)


@pytest.mark.parametrize("name", PAGES)
def test_rewards_of_the_pages(name):
    for text in re.findall(r"```yaml\n(rewards:.*?)```", PAGES[name], flags=re.DOTALL):
        (reward,) = yaml.safe_load(text)["rewards"]
        assert getattr(lit_rlhf, reward["class_path"])(**reward["init_args"]).weight == 1.0


def test_the_script_and_the_command_say_the_same():
    """The command is parsed with all its options; the numbers are those of the script."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGES["trl"], flags=re.DOTALL)
    assert len(script.splitlines()) <= 40
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    (config,) = [call for call in calls if getattr(call.func, "id", None) == "PPOConfig"]
    there = {option.arg: ast.literal_eval(option.value) for option in config.keywords}
    arguments = table(PAGES["trl"], "PPOConfig") | table(PAGES["trl"], "TrainingArguments")
    assert there.keys() <= arguments.keys()
    (command,) = re.findall(r"```bash\nlit-rlhf (.*?)```", PAGES["trl"], flags=re.DOTALL)
    more = ["--seed_everything", "7", "--ckpt_path", "null", "--print_config"]
    run = preloaded.run("-m", "lit_rlhf.cli", *shlex.split(command.replace("\\\n", " ")), *more, cwd=DOCS.parent)
    assert run.returncode == 0, run.stderr
    config = yaml.safe_load(run.stdout)
    here, data = config["model"]["init_args"], config["data"]["init_args"]
    batch = there["per_device_train_batch_size"] * there["gradient_accumulation_steps"]
    assert data["batch_size"] == batch
    assert here["iterations"] == there["total_episodes"] / batch
    assert here["sampling"]["max_tokens"] == there["response_length"]
    assert here["sampling"]["temperature"] == there["temperature"]
    assert here["kl"]["init_args"]["coef"] == there["kl_coef"]
    assert here["scores"]["truncation_penalty"] == there["missing_eos_penalty"]
    assert here["update"]["value_coef"] == there["vf_coef"]
    assert here["update"]["epochs"] == there["num_ppo_epochs"]
    assert here["update"]["minibatches"] == there["num_mini_batches"]
    for role in ("actor", "critic"):
        assert here[f"{role}_optimizer"]["init_args"]["lr"] == there["learning_rate"]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("heading", FIELDS)
def test_the_fields_are_those_of_the_installed_trl(heading):
    (root,) = importlib.util.find_spec("trl").submodule_search_locations
    paths = [*Path(root).glob("trainer/*_config.py"), *Path(root).glob("experimental/ppo/*_config.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    found = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == heading]
    if not found:
        pytest.skip(f"the installed TRL has no {heading}")
    fields = {item.target.id for item in found[0].body if isinstance(item, ast.AnnAssign)}
    assert fields == table(PAGES["trl"], heading).keys()
