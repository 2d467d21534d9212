"""Recipes are found by name in any folder, listed and printed, without the import of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rlhf import __version__, recipes
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError


def test_a_recipe_is_found_by_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ppo", "ppo.yaml", "configs/ppo.yaml"):
        assert recipes.find(name) == recipes.folder() / "ppo.yaml"
    assert recipes.find("engine/vllm") == recipes.folder() / "engine" / "vllm.yaml"


@pytest.mark.parametrize("own", ["ppo", "ppo.yaml"])
def test_a_file_in_the_working_folder_takes_precedence(tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    Path(own).write_text("model: {}\n")
    assert recipes.find("ppo") == Path(own)
    assert recipes.find("./ppo") == Path(own)


def test_a_folder_of_that_name_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ppo").mkdir()
    assert recipes.find("ppo") == recipes.folder() / "ppo.yaml"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("ppoo", "ppo"), ("fsdp2", "strategy/fsdp2"), ("strategy/fsdp3", "strategy/fsdp"), ("sft-lora.yaml", "sft_lora")],
)
def test_the_error_names_the_nearest_recipe(tmp_path, monkeypatch, name, nearest):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no file {name} and no recipe .*did you mean '{nearest}"):
        recipes.find(name)
    with pytest.raises(UserError, match="lit-rlhf recipes lists"):
        recipes.find("zzzzzzzz")


def test_the_list_has_every_recipe_once_and_the_command_is_fast(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == recipes.names()
    assert len(listed) == len(set(listed)) == len(list(recipes.folder().rglob("*.yaml"))) - 1  # the starter's
    program = "import sys; from lit_rlhf.cli import main; main(['recipes', 'ppo']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (recipes.folder() / "ppo.yaml").read_text()


def test_an_unknown_recipe_is_not_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["recipes", "ppoo"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.endswith("did you mean 'ppo'?\n")


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lit-rlhf {__version__}\n"


@pytest.mark.parametrize(
    ("words", "unbuffered"), [("recipes", "1"), ("--help", ""), ("fit --config ppo --print_config", "1")]
)
def test_a_reader_that_ends_early_causes_no_traceback(words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lit_rlhf.cli", *words.split()]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False
    )
    os.close(writing)
    message = b"lit-rlhf: error: the program that reads this output has ended\n" if words.startswith("fit") else b""
    found = [(1, message)] if unbuffered else [(0, b""), (1, message)]  # what is buffered may be dropped at the end
    assert (done.returncode, done.stderr) in found


def test_without_an_output():
    command = f"{sys.executable} -m lit_rlhf.cli --version >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_is_said_even_if_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from lit_rlhf import cli; print('so far'); cli.main(['foo'])"
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith(b"lit-rlhf: error: there is no command 'foo'")
