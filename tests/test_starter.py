"""What ``lit-rlhf init`` writes runs as it is, and its test notices a broken reward."""

import json
from pathlib import Path

import jsonschema
import preloaded
import pytest
import yaml

from lit_rlhf import recipes, starter
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError

pytestmark = pytest.mark.usefixtures("without_plans")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STARTER = recipes.folder() / "starter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder that the command writes, in an empty folder outside the project."""
    outside = tmp_path_factory.mktemp("outside")
    done = preloaded.run("-m", "lit_rlhf.cli", "init", "my_project", cwd=outside, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "my_project is ready" in done.stdout
    return outside / "my_project"


def run_tests(folder, *more):
    return preloaded.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *more, cwd=folder, **OFFLINE)


def test_the_files(folder):
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "reward.py", "test_reward.py", "prompts.jsonl", "README.md", "lit-rlhf.schema.json")
    }
    assert (folder / "README.md").read_text().startswith("# my_project\n")
    config = (folder / "config.yaml").read_text()
    assert config.startswith("# yaml-language-server: $schema=lit-rlhf.schema.json\n")
    schema = json.loads((folder / "lit-rlhf.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(config), schema)


def test_the_config_has_the_options_of_the_recipe():
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (STARTER / "config.yaml", recipes.find_recipe("ppo")))
    assert ours["model"]["init_args"].keys() == theirs["model"]["init_args"].keys()
    for option in ("sampling", "kl", "advantages", "objective", "update"):
        assert ours["model"]["init_args"][option].keys() == theirs["model"]["init_args"][option].keys()


def test_the_commands_of_the_readme_run(folder):
    """In a real process each; fit with fewer iterations."""
    text = (folder / "README.md").read_text()
    lines = text[text.index("```bash\n") + 8 :].partition("```")[0].splitlines()
    test, fit, predict = (line.partition("#")[0].split() for line in lines)
    assert (test, fit[:2], predict[:2]) == (["python", "-m", "pytest"], ["lit-rlhf", "fit"], ["lit-rlhf", "predict"])
    done = run_tests(folder)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    for words in ([*fit[1:], "--model.iterations", "2"], predict[1:]):
        done = preloaded.run("-m", "lit_rlhf.cli", *words, cwd=folder, **OFFLINE)
        assert done.returncode == 0, done.stderr
    written = (folder / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(written) == len((folder / "prompts.jsonl").read_text().splitlines()) == 256


@pytest.mark.parametrize(
    ("tests", "count"), [(["-k", "by_hand"], 1), pytest.param([], 2, marks=pytest.mark.long)], ids=["by hand", "all"]
)
def test_the_test_fails_when_the_reward_is_broken(folder, tests, count):
    reward = folder / "reward.py"
    right = reward.read_text()
    broken = right.replace("GOOD & set", "GOOD - set")  # the fewer words of praise, the better
    assert broken != right
    reward.write_text(broken)
    try:
        done = run_tests(folder, *tests)
    finally:
        reward.write_text(right)
    assert done.returncode == 1
    assert f"{count} failed" in done.stdout


def test_a_folder_inside_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").touch()
    with pytest.raises(SystemExit):
        main(["init", "prompts.jsonl/x"])
    assert capsys.readouterr().err == (
        "lit-rlhf: error: init: the folder prompts.jsonl/x cannot be written: Not a directory\n"
    )


def test_a_folder_with_files_is_left_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "reward.py").write_text("mine")
    with pytest.raises(SystemExit) as exit_:
        main(["init", "mine"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (
        "lit-rlhf: error: init: the folder mine is not empty; give the name of a new folder\n"
    )
    assert [path.read_text() for path in Path("mine").iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"mine/reward\.py is a file"):
        starter.write(Path("mine/reward.py"))
