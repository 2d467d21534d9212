"""The code that the pages of docs/ quote exists, and their examples run."""

import importlib
import re
import runpy
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from lit_rlhf import _PUBLIC, Correction
from lit_rlhf import __all__ as names
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.foreign_options import OPTIONS
from lit_rlhf.generation import Sampling
from lit_rlhf.progress import listen, stop_listening
from lit_rlhf.rewards import RemoteReward, make_reward_inputs
from lit_rlhf.testing import Recorder

pytestmark = pytest.mark.usefixtures("without_plans")
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lit_rlhf").rglob("*.py"))


def test_quoted_lines_of_code_exist():
    prose = re.sub(r"\s+", " ", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    quoted = [code for code in re.findall(r"`([^`]+)`", prose) if re.search(r" [=+*] |\(.*\)", code)]
    assert len(quoted) > 20
    flat = re.sub(r"\s+", " ", SOURCES)
    assert [code for code in quoted if code not in flat] == []


def test_named_classes_exist():
    found = set(re.findall(r"`([A-Z][A-Za-z0-9]+)`", PAGE))
    assert {"GAE", "TD0", "KLPenalty", "GroupNormalized", "AdaptiveKL"} <= found
    assert found <= set(names)


def test_the_corrections_of_the_page_are_those_of_the_docstring():
    """Each option is also valid, or the class would refuse it."""
    page = re.findall(r"`correction: ({.*?})`", PAGE)
    docstring = re.findall(r"``({.*?})``", re.sub(r"\s+", " ", Correction.__doc__))
    assert {Correction(**yaml.safe_load(x)) for x in page} == {Correction(**yaml.safe_load(x)) for x in docstring}
    assert len(docstring) == 6


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()] == []


def test_the_recipes_are_the_ones_in_configs():
    named = re.findall(r"\]\(\.\./configs/(\w+)\.yaml\)", PAGE)
    for name in named:
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]"))
        estimator = re.search(r"`(\w+)`", row.split("|")[2]).group(1)
        assert re.search(rf"advantages: .*{estimator}", text)
    assert len(named) == 10


DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", DESIGN, flags=re.DOTALL)


def test_the_examples_of_the_design_page_train(fit, make_module, tmp_path, monkeypatch, capsys):
    """All of them at once, from a file of the user's, in a real fit."""
    assert len(EXAMPLES) == 5
    assert max(sum(bool(line.strip()) for line in example.splitlines()) for example in EXAMPLES) < 20
    (tmp_path / "my_parts.py").write_text("\n".join(EXAMPLES))
    monkeypatch.syspath_prepend(tmp_path)
    parts = importlib.import_module("my_parts")
    engine, best, recorder = parts.TransformersEngine(), parts.PrintBest(), Recorder()
    module = make_module(
        advantages=parts.LengthNormalizedReturn(gamma=0.99),
        objective=parts.ChiSquarePenalty(beta=0.5),
        rewards=[parts.WordReward("w3")],
        engine=engine,
        critic=None,
        sampling=Sampling(max_tokens=8, responses=2),
        iterations=2,
    )
    fit(module, [best, recorder])
    assert len([line for line in capsys.readouterr().out.splitlines() if re.match(r"\d\.00 ", line)]) == 2
    assert recorder.metrics[0]["policy/kl_to_old"] == pytest.approx(0.0, abs=0.1)
    pairs = zip(module.actor.parameters(), module.reference.parameters(), strict=True)
    assert not all(torch.equal(trained, frozen) for trained, frozen in pairs)


def test_the_service_of_the_rewards_page_scores(tmp_path, monkeypatch):
    """With the options of the page's YAML, except for the address."""
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    page = page[page.index("## Rewards on other machines") : page.index("## A language model as a judge")]
    (example,), (text,) = (re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL) for kind in ("python", "yaml"))
    assert sum(bool(line.strip()) for line in example.splitlines()) < 20
    (tmp_path / "service_of_the_page.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JUDGE_TOKEN", "swordfish")
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.log_message", lambda *words: None)
    handler = importlib.import_module("service_of_the_page").Service
    (reward,) = yaml.safe_load(text)["rewards"]
    assert reward["class_path"] == "RemoteReward"
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        remote = RemoteReward(**reward["init_args"] | {"url": f"http://127.0.0.1:{server.server_port}/brevity"})
        remote.prepare(tokenizer=None)
        scores = remote(make_reward_inputs(["word " * length for length in range(40)]))
        with pytest.raises(UserError, match="401"):
            RemoteReward(remote.url)(make_reward_inputs(["no token"]))
        server.shutdown()
    assert scores.tolist() == pytest.approx([-length / 100 for length in range(40)])
    assert remote.name == "brevity"


LOGGERS = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")


def test_the_part_of_the_page_on_loggers_tells_its_progress():
    names, heard = {}, []
    exec(re.search(r"```python\n(.*?)```", LOGGERS, flags=re.DOTALL).group(1), names)
    listen(heard.append)
    assert names["slow_scores"](["a", "bc"]) == [1, 2]
    stop_listening(heard.append)
    assert [(progress.done, progress.total) for progress in heard] == [(0, 2), (1, 2), (2, 2)]


TESTS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(3), ids=["reward", "estimator", "objective"])
def test_the_tests_of_the_testing_page_pass(number, tmp_path, monkeypatch):
    assert len(TESTS) == 3
    assert sum(bool(line.strip()) for line in TESTS[number].splitlines()) < 20
    (tmp_path / f"parts_{number}_of_the_page.py").write_text(TESTS[number])
    monkeypatch.syspath_prepend(tmp_path)
    parts = vars(importlib.import_module(f"parts_{number}_of_the_page"))
    tests = [part for name, part in parts.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_options_of_other_trainers_have_the_names_of_the_tables():
    named = {}
    for page in (ROOT / "docs").glob("from-*.md"):
        for row in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            theirs, ours = (re.findall(r"`([^`]+)`", cell) for cell in row)
            for name in theirs:
                named.setdefault(name.lstrip("-").rpartition(".")[2], set()).update(ours)
    wrong = {name: ours for name, ours in OPTIONS.items() if not set(ours) <= named.get(name, set())}
    assert wrong == {}


def test_the_callbacks_of_the_page_are_in_its_table():
    page = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    found = [callback["class_path"] for callback in yaml.safe_load(text)["trainer"]["callbacks"]]
    assert found == ["KLGuard", "GradientShares", "Throughput", "EarlyStopping"]
    assert all(f"| `{name}`" in page for name in found)


def test_the_commands_of_the_configs_page(tmp_path, monkeypatch, capsys):
    """Those that would train print their configuration instead."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)).splitlines()
    assert len(lines) == 4
    for line in lines:
        if "runs/ppo/config.yaml" in line:  # of a run that was started with whole.yaml
            Path("runs/ppo").mkdir(parents=True)
            Path("whole.yaml").rename("runs/ppo/config.yaml")
        command, _, file = line.removeprefix("lit-rlhf ").partition(" > ")
        words = command.split()
        if words[0] == "recipes":
            main(words)
        else:
            with pytest.raises(SystemExit) as exit_:
                main(words if file else [*words, "--print_config"])
            assert not exit_.value.code
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["model"]["class_path"].endswith("PolicyGradient")
        if file:
            Path(file).write_text(printed)
    assert {path.name for path in tmp_path.iterdir()} == {"my_ppo.yaml", "runs"}


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: lit_rlhf\.(\S+)\n    options:\n      members: \[(.*?)\]$", page, flags=re.DOTALL | re.M)
    assert page.count(":::") == len(found)
    assert {part: set(re.split(r",\s+", members)) for part, members in found} == {
        part: set(members) for part, members in _PUBLIC.items()
    }


def test_every_page_is_in_the_sites_menu():
    menu = re.search(r"^nav:\n((?: .*\n)+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M).group(1)
    assert sorted(re.findall(r": (\S+\.md)$", menu, flags=re.M)) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_the_code_of_the_python_page_runs(tiny_model, tiny_prompts, tmp_path, monkeypatch, capsys):
    """From the first cell to the last, with a tiny model in place of the page's."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    cells = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    for name, value in {"MODEL": tiny_model(), "PROMPTS": tiny_prompts, "FOLDER": tmp_path / "run"}.items():
        cells, replaced = re.subn(rf'^{name} = ".*?"', f'{name} = "{value}"', cells, flags=re.MULTILINE)
        assert replaced == 1
    names = {"__name__": "notebook"}
    exec(compile(cells, "python.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "tensor([1.0000, 0.6667])" in printed
    assert printed[-1] == str(tmp_path / "run" / "report.html")
    assert [float(row["progress/iteration"]) for row in names["rows"] if row["val/score"]] == [5.0, 10.0]
    assert {sample["stage"] for sample in names["samples"]} == {"train", "val"}
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert len(names["tokens"][0]) > len(names["prompt"].input_ids[0])
    assert 0 <= names["held_out"]["val/win_rate"] <= 1


def test_the_metrics_page_names_what_a_run_logs(fit, make_module):
    """And its pictures are those that the script draws, which runs here for two iterations."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:objective|response|policy|value|engine)/\w+)`", page))
    recorder = Recorder()
    fit(make_module(iterations=1, sampling=Sampling(max_tokens=4, responses=2)), [recorder])
    assert len(named) > 10
    assert named <= set(recorder.metrics[0])


def test_the_script_of_the_sick_runs(tmp_path, capsys):
    run = runpy.run_path(str(ROOT / "benchmarks" / "sick_runs.py"))
    pictures = {f"{name}.png" for name in (*run["CASES"], "healthy")}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(images/(.*?)\)", page)) == pictures
    assert max((ROOT / "docs" / "images" / name).stat().st_size for name in pictures) < 60_000
    run["main"](2, tmp_path, ["stale_engine", "dead_reward"])
    assert {path.stem for path in tmp_path.iterdir()} == {"healthy", "stale_engine", "dead_reward"}
    printed = capsys.readouterr().out
    assert "dead_reward: " in printed
    (guard,) = re.findall(r"```text\n(model.engine.*?)```", page, flags=re.DOTALL)
    said, quoted = (
        re.sub(r"\d\.\d{3} nats", "", " ".join(text.split())) for text in (printed.split("guard: ")[1], guard)
    )
    assert said == quoted


def test_the_command_of_the_first_run_is_accepted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    words = re.search(r"```bash\nlit-rlhf (.*?)\n```", page).group(1).split()
    stages = []
    monkeypatch.setattr("lit_rlhf.quickstart.run_stage", lambda stage, folder, *counts, lora: stages.append(counts))
    monkeypatch.setattr("lit_rlhf.quickstart.report_iterations", lambda *inputs: None)
    monkeypatch.setattr("lit_rlhf.quickstart.report", lambda *inputs: None)
    main(words)
    assert stages == [(60, 5)] * 3
