"""Every block, command and option of every page is checked.

Commands of lit-rlhf and of benchmarks/ are parsed by their own parsers, YAML is part of a run of one iteration on a
tiny model, Python is executed, and what is left is listed with its reason.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pages
import pytest
import yaml
from torch.distributed.run import get_args_parser

from lit_rlhf import cli, lightning_cli, plan_cli, starter
from lit_rlhf.command_words import check_config_files, help_words
from lit_rlhf.testing.data import prompts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

pytestmark = pytest.mark.usefixtures("without_plans")
OUTPUTS = {"text": "what a run printed", "mermaid": "a drawing", "json": "records, which tests/data/test_page.py reads"}
OTHER_PROGRAMS = {"ruff", "mypy", "mkdocs", "srun", "apt-get", "wandb"}
"""Programs whose commands are not checked; of srun, the command that it starts is."""
OTHER_MODULES = {"venv", "pytest", "vllm.entrypoints.openai.api_server"}
ELSEWHERE = {
    "docs/python.md": ("test_docs.py", "test_the_code_of_the_python_page_runs"),
    "docs/from-trl.md": ("test_arriving.py", "test_the_script_and_the_command_say_the_same"),  # TRL is not installed
}
"""The tests of the pages whose Python needs more than a few lines around it."""
RUN_IN = {
    **{"quickstart": "test_quickstart.py", "init": "test_starter.py", "recipes": "test_recipes.py"},
    **{"fit": "test_configs.py", "plan": "test_plan_cli.py", "report": "report/test_report.py"},
    **{"validate": "test_resume.py", "test": "test_pages.py", "predict": "test_resume.py"},
    **{"export": "test_export.py", "schema": "test_schema.py"},
}
"""The tests that run each command of lit-rlhf."""
NOT_RUN = {
    "VLLMEngine": "it needs vLLM; tests/generation/test_vllm.py runs it",
    "RemoteReward": "it needs a service; tests/test_docs.py and tests/rewards/test_remote.py start one",
    "Judge": "it needs a service; tests/rewards/test_judge.py starts one",
    "nf4": "it needs bitsandbytes; tests/models/test_quantized.py",
}
"""What keeps the YAML of a page from running here; it is constructed."""
NAMES = ("ckpt_path", "config", "print_config", "gpu", "gpus", "prompt_tokens")
"""Options of the commands themselves, which the text names without a value."""
PPO = ("--config", "ppo")
TINY_REWARD = "[{class_path: RewardFunction, init_args: {function: lit_rlhf.testing.runs:low_words}}]"
HEADERS = {
    f"configs/{path.relative_to(pages.ROOT / 'configs')}": re.findall(r"^#   (lit-rlhf .*)$", path.read_text(), re.M)
    for path in sorted((pages.ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "configs" or path.stem.endswith(("_lora", "gsm8k"))  # test_configs.py runs the others
}
SHELL = [(str(block), words) for block in pages.blocks(*pages.SHELLS) for words in pages.commands_of(block.text)]
INLINE = [
    (span.page, words)
    for span in pages.spans()
    if re.match(r"(lit-rlhf|python|pip|\.venv/bin/\w+|wandb|apt-get) ", span.text)
    for words in pages.commands_of(span.text)
]
IN_CONFIGS = [(page, words) for page in HEADERS for words in pages.commands_of("\n".join(HEADERS[page]))]
COMMANDS = {" ".join(words): (page, words) for page, words in (*SHELL, *INLINE, *IN_CONFIGS)}
OPTIONS = {s.text: s for s in pages.spans() if s.text.startswith("--") and "/from-" not in s.page}


class Parsed(Exception):  # noqa: N818 (it is not an error)
    """An exception that carries a parser or ends a program once its arguments are parsed."""


@pytest.fixture(scope="module")
def parsers():
    """Return the parsers of LightningCLI's commands and of ``plan``."""

    def parser_of(kind):
        class Probe(kind):
            def parse_arguments(self, parser, args):
                raise Parsed(parser)

        with pytest.raises(Parsed) as found:
            lightning_cli.run([], Probe)
        return found.value.args[0]

    return {"fit": parser_of(lightning_cli.CLI), "plan": parser_of(plan_cli.PlanCLI)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """Return a folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(pages.ROOT / "configs" / "starter", folder, dirs_exist_ok=True)
    for name in ("my_ppo.yaml", "runs/ppo/config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pages.ROOT / "configs" / "ppo.yaml", folder / name)
    records = [record | {"answer": "w1", "data_source": "words"} for record in prompts()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(tiny_model(task="score"), folder / "path" / "or" / "hub-id")
    for name, text in modules_of_pages().items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    """Work in the folder of the pages' files."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("JUDGE_TOKEN", "swordfish")
    return folder


def modules_of_pages():
    """Return the texts of the Python files that the pages name: what the pages show, and what they only describe."""
    shown = "\n".join(block.text for block in pages.blocks("python") if "# my_rewards.py" in block.text)
    described = """
def correct(completions, **columns):
    return [float(len(completion)) for completion in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)
"""
    parts = "\n".join(block.text for block in pages.blocks("python", page="docs/design.md"))
    data = next(block.text for block in pages.blocks("python") if "# my_data.py" in block.text)
    judge = "def reward_func(queries, prompts, labels):\n    return [float(len(query)) for query in queries]\n"
    return {"my_rewards.py": shown + described, "my_parts.py": parts, "my_data.py": data, "reward_func.py": judge}


def parse(words, parsers):
    """Parse a command of lit-rlhf, and construct the model and the data that it names."""
    command, *rest = [word.replace("NODE", "0") for word in words if not word.startswith("--print_config")]
    if command in ("--help", "recipes"):
        cli.main(words)
    elif command in cli.COMMANDS and command != "plan":
        parse_only(importlib.import_module(f"lit_rlhf.{cli.COMMANDS[command]}").main, rest)
    else:
        chosen = [] if command == "plan" else [command]
        given = help_words([*chosen, *rest])
        check_config_files(given)
        try:
            config = parsers["plan" if command == "plan" else "fit"].parse_args(given)
        except SystemExit as end:
            if end.code:
                raise
            return
        config = config if command == "plan" else config[command]
        config["trainer"]["logger"] = False  # it may need a package of its own
        parser = parsers["plan"] if command == "plan" else parsers["fit"]._subcommands_action._name_parser_map[command]
        parser.instantiate_classes(config)


def parse_only(program, *arguments):
    """Run a program until argparse has accepted the arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        try:
            with pytest.raises(Parsed):
                program(*arguments)
        except SystemExit as end:
            raise AssertionError(arguments) from end


def parse_script(path, words):
    """Parse the arguments of a script of benchmarks/."""
    script = pages.ROOT / path
    assert script.exists()
    if words:
        assert "argparse" in script.read_text(encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(script.parent))
            patch.setattr(sys, "argv", [str(script), *words])
            patch.setattr(os, "environ", os.environ.copy())
            parse_only(lambda: runpy.run_path(str(script), run_name="__main__"))


def check(words, parsers):
    """Check a command, or raise an error or an exit."""
    program = Path(words[0]).name
    if program == "torchrun":
        place = words.index("-m")
        get_args_parser().parse_args([word.replace("NODE", "0") for word in words])
        words, program = ["lit-rlhf", *words[place + 2 :]], "lit-rlhf"
    elif program == "srun":
        words, program = words[words.index("lit-rlhf") :], "lit-rlhf"
    if program == "lit-rlhf":
        if len(words) > 1 and words[1:] not in (["validate"], ["test"], ["predict"], ["fit"], ["plan"]):
            parse([*words[1:], *(["RUN"] if words[1:] in (["export"], ["report"]) else [])], parsers)
    elif program in ("python", "pip", "pytest"):
        python(program, words[1:])
    else:
        assert program in OTHER_PROGRAMS, words


def python(program, words):
    """Check a command of Python: its scripts exist, take its arguments, and its extras are those of pyproject.toml."""
    if program == "python" and words[0] != "-m":
        parse_script(words[0], words[1:])
        return
    if program == "python":
        assert words[1] in OTHER_MODULES
    assert all((pages.ROOT / word).exists() for word in words if word.startswith("tests/"))
    extras = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for word in words for extra in re.findall(r"^(?:\.|lit-rlhf)\[(\w+)\]$", word)} <= extras.keys()


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {*pages.SHELLS, "python", "yaml", *OUTPUTS}
    assert [f"{block}: {block.kind!r}" for block in pages.blocks() if block.kind not in kinds] == []
    assert {block.page for block in pages.blocks("json")} == {"docs/data.md"}
    bare = [page for page, text in pages.PAGES.items() if re.search(r"(\n|^)\n {4}\S", pages.FENCE.sub("", text))]
    assert bare == [], "indented blocks, which no test reads"


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{page}: {text}") for text, (page, words) in COMMANDS.items()]
)
def test_a_command_is_accepted(words, parsers, inside):
    check(words, parsers)


def test_a_wrong_command_is_not(parsers, inside):
    for text in (
        "lit-rlhf fit --config pppo",
        "lit-rlhf fit --config ppo --model.advantages.lamda 1.0",
        "lit-rlhf fit --config ppo --data.batch_size 0",
        "lit-rlhf export RUN --merged",
        "lit-rlhf plans",
        "python benchmarks/gpu.py --jsn gpu.json",
        'pip install ".[tests]"',
        "docker run lit-rlhf",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(*pages.commands_of(text), parsers)


@pytest.mark.parametrize("span", [pytest.param(span, id=f"{span.page}: {span.text}") for span in OPTIONS.values()])
def test_an_option_in_the_text_is_accepted(span, parsers, inside):
    """By a script of benchmarks/ that is named beside it, or by a command of lit-rlhf."""
    (words,) = pages.commands_of(span.text)
    name = pages.OPTION.match(words[0])
    if len(words) == 1 and "=" not in words[0] and (name or words[0].removeprefix("--") in NAMES):
        assert not name or pages.exists(name[1])
        return
    for command in [["python", f"benchmarks/{script}.py"] for script in span.scripts] + ours(words):
        try:
            check([*command, *words], parsers)
        except (Exception, SystemExit):
            continue
        return
    raise AssertionError(f"nothing has the option {span.text}")


def ours(words):
    """Return the commands of lit-rlhf that may have these options, with what else they need."""
    models = [kind for kind in pages.MODULES[:4] if has(kind, "model", words)]
    data = [kind for kind in pages.MODULES[4:] if has(kind, "data", words)]
    if not pages.OPTION.match(words[0]) or not models or not data:
        commands = (["quickstart"], ["export", "RUN"], ["fit", *PPO], ["plan", *PPO])
        return [["lit-rlhf", *command] for command in commands]
    rewards = ["--model.rewards", "[ExactAnswer]"] if models[0] is pages.MODULES[0] else []
    model = ["--model", models[0].__name__, f"--model.{'reward' if 'Reward' in models[0].__name__ else 'actor'}", "m"]
    return [["lit-rlhf", "fit", *model, *rewards, "--data", data[0].__name__]]


def has(kind, owner, words):
    """Return whether a class has all those of the options that are the model's or the data's."""
    paths = [match[1] for match in map(pages.OPTION.match, words) if match]
    return all(pages.exists(path, (kind,)) for path in paths if path.startswith(f"{owner}."))


@pytest.mark.parametrize("page", [page for page in pages.PAGES if not re.search("/from-|/python", page)])
def test_every_option_that_a_page_names_exists(page):
    found = [match[1] for span in pages.spans() if span.page == page and (match := pages.OPTION.match(span.text))]
    assert [path for path in found if not pages.exists(path)] == []


@pytest.mark.parametrize("block", pages.blocks("python"), ids=str)
def test_python_is_executed(block, tmp_path, monkeypatch):
    if block.page in ELSEWHERE:
        file, test = ELSEWHERE[block.page]
        assert f"def {test}(" in Path(__file__).with_name(file).read_text(encoding="utf-8")
        return
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("is_run", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("block", pages.blocks("yaml"), ids=str)
def test_yaml_is_part_of_a_run(block, is_run, parsers, inside, tiny_model, tmp_path, monkeypatch):
    """As a config after another one, which trains a tiny model; what it describes is at least constructed."""
    part = yaml.safe_load(block.text)
    if part is None:  # the comment with which the configs of `lit-rlhf init` begin
        assert block.text.strip() == f"# yaml-language-server: $schema={starter.SCHEMA}"
        return
    file, run = tmp_path / "part.yaml", tmp_path / "run"
    file.write_text(block.text if part.keys() & {"model", "data", "trainer"} else yaml.safe_dump({"model": part}))
    if "Demonstrations" in block.text:
        words, few = ["--model", "SFT", "--data", "Demonstrations"], []
    else:
        words = ["--model", "PolicyGradient", "--model.rewards", TINY_REWARD, "--data", "Prompts"]
        few = ["--model.sampling.max_tokens", "4", "--model.iterations", "1"]
    words += ["--model.actor", str(tiny_model()), "--data.train", "prompts.jsonl", "--config", str(file), *few]
    if not is_run or any(name in block.text for name in NOT_RUN):
        monkeypatch.setenv("JUDGE_KEY", "key")
        parse(["fit", *words], parsers)
        return
    words += ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(run)]
    words += ["--trainer.enable_progress_bar", "false", "--report.at_end", "false"]
    words += ["--trainer.limit_train_batches", "1"]
    cli.main(["fit", *words, *(["--model.engine.workers", "0"] if "Ahead" in block.text else [])])
    assert len((run / "metrics.csv").read_text().splitlines()) == 2
    if "my_parts" in block.text:  # what a run keeps is in another folder than the user's classes
        parse(["fit", "--config", str(run / "config.yaml")], parsers)


def test_test_measures_a_policy(inside, tiny_model, tmp_path, capsys):
    words = ["--model", "PolicyGradient", "--model.rewards", TINY_REWARD, "--model.actor", str(tiny_model())]
    words += ["--model.sampling.max_tokens", "4", "--data", "Prompts", "--data.test", "prompts.jsonl"]
    cli.main(["test", *words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)])
    assert "test/win_rate" in capsys.readouterr().out


def test_every_command_runs_in_a_test():
    """In a real run on a tiny model, where the command has one."""
    commands = re.findall(r"^  (\w+)  ", cli.HELP, flags=re.MULTILINE)
    assert sorted(commands) == sorted(RUN_IN)
    for command, file in RUN_IN.items():
        text = (pages.ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"\"{command}\"|lit-rlhf {command}|{command}_cli", text), command
