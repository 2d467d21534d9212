"""The checks for GPUs run in miniature on a CPU, and a check that fails does not stop the others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu, gpu_exact, gpu_runs = (pytest.importorskip(name) for name in ("gpu", "gpu_exact", "gpu_runs"))


@pytest.fixture
def setting(tmp_path):
    return gpu_runs.Setting("cpu", small=True, folder=tmp_path)


def test_a_bound_holds_or_is_broken():
    number = gpu_runs.Number("share", 0.5, at_most=1.0, at_least=0.2)
    assert number.holds
    for value, holds in ((1.1, False), (0.1, False), (float("nan"), False), (None, None), ("2.13", None)):
        assert gpu_runs.Number("share", value, at_most=1.0, at_least=0.2).holds is holds
    assert gpu_runs.Number("share", 0.5).holds is None
    assert gpu.Result("speed", numbers=[number]).holds
    assert not gpu.Result("speed", numbers=[number, gpu_runs.Number("ratio", 2.0, at_most=1.0)]).holds
    assert not gpu.Result("speed", error="out of memory", numbers=[number]).holds


def test_the_first_iteration_in_miniature(setting):
    numbers = {number.name: number for number in gpu_exact.first_iteration(setting)}
    assert {name for name, number in numbers.items() if number.holds is not True} == {
        "responses that differ from the CPU's, 32-true"
    }
    assert abs(numbers["ratio_max − 1, 32-true"].value) < 1e-5


def test_given_responses_in_miniature(setting):
    numbers = {number.name: number for number in gpu_exact.logprobs(setting)}
    assert len(numbers) == 11
    assert {name for name, number in numbers.items() if number.holds is not True} == set()


def test_a_step_too_many_breaks_the_bound_on_the_ratio(setting, monkeypatch):
    """The weights change before the second minibatch, whose ratios are then not 1."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: sgd(parameters, lr=1.0))
    number = next(n for n in gpu_exact.first_iteration(setting) if n.name == "ratio_max − 1, bf16-mixed")
    assert number.holds is False


def test_a_check_that_fails_or_takes_too_long_is_recorded(setting):
    failed = gpu.measure("nothing of this name", setting, 300)
    assert failed.error.startswith("ValueError: ")
    assert "Traceback" in failed.messages
    assert gpu.measure("device", setting, 0.1).error == "stopped after 0 s"


def test_the_other_checks_run_and_the_file_is_complete(setting, tmp_path, monkeypatch):
    answers = {"wrong": gpu.Result("wrong", error="RuntimeError: [8]"), "right": gpu.Result("right", seconds=2.0)}
    monkeypatch.setattr(gpu, "measure", lambda name, *_: answers[name])
    chosen = [gpu.Check(name, print, 60) for name in answers]
    results = gpu.run_all(setting, chosen, 60.0, tmp_path / "gpu.json")
    records = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [(record["check"], record["holds"]) for record in records] == [("wrong", False), ("right", True)]
    console = Console(width=120, record=True)
    console.print(gpu.table(results))
    assert "RuntimeError: [8]" in console.export_text()
    late = gpu.run_all(setting, chosen, 0.0, None)
    assert [result.error for result in late] == ["not run: the time is used up"] * 2


@pytest.mark.long
def test_all_checks_in_miniature(tmp_path):
    """This is how the command is tried where there is no GPU: everything runs, and the numbers of a GPU are missing."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small"]
    done = subprocess.run([*command, "--json", str(tmp_path / "gpu.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [result["check"] for result in results] == [check.name for check in gpu.checks(small=True)]
    numbers = [number for result in results for number in result["numbers"]]
    assert sum(number["holds"] is True for number in numbers) > 15
    assert {number["value"] for number in numbers if re.search("MFU|bandwidth|peak", number["name"])} == {None}
    assert "FAILED" not in done.stdout
    assert "BROKEN" not in done.stdout
