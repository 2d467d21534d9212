"""The comparison with TRL, without TRL: its options, files and table, and lit-rlhf's runs in miniature."""

import argparse
import json
import math
import random
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lit_rlhf import cli
from lit_rlhf.data import Preferences
from lit_rlhf.models.loading import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
names = "against_trl", "against_trl_files", "against_trl_runs", "trl_steps"
against_trl, files, runs, trl_steps = (pytest.importorskip(name) for name in names)
STEPS = 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return a file of 8 pairs of random words."""
    draw = random.Random(0)

    def text(count):
        return " ".join(draw.choices(("rain", "sun", "cloud", "wind"), k=count))

    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = [{"prompt": f"Human: {text(i + 1)}?", "chosen": text(9 - i), "rejected": text(i + 2)} for i in range(8)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def models(pairs, tmp_path_factory):
    """Return the folders of the models, here tiny ones."""
    texts = [text for pair in files.read_pairs(pairs) for text in pair.values()]
    shape = {"hidden": 32, "layers": 1, "vocabulary": 300}
    return {"7.2M": files.write_llama(tmp_path_factory.mktemp("llama"), texts, **shape)}


@pytest.fixture
def job(pairs, models, tmp_path):
    """Return a function that writes the records of a task in miniature, and returns the description of its run."""

    def write(name):
        sizes = {"batch": 4, "group": 2, "model": "7.2M", "micro_batch": None}
        sizes |= {"prompt": 5, "response": 3} if name.startswith("grpo") else {}
        task = replace(against_trl.TASKS[name], **sizes)
        return files.write_job(tmp_path / name, task, STEPS, models, files.read_pairs(pairs))

    return write


def options(trl_python=None):
    return argparse.Namespace(threads=1, max_tokens=64, trl_python=trl_python, trl_micro_batch=None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "grpo"], "--stories is missing: grpo needs it"),
        (["--tasks", "dpo", "--steps", "3"], "--steps must be 4 or more, not 3"),
        (["--tasks", "dpo", "--trl-python", "nowhere/python"], "--trl-python: there is no nowhere/python"),
        (["--tasks", "kto"], "invalid choice: 'kto'"),
    ],
)
def test_a_mistake_in_the_options_is_named(pairs, capsys, words, message):
    with pytest.raises(SystemExit):
        against_trl.parse(["--trl-python", sys.executable, "--pairs", str(pairs), *words])
    assert message in capsys.readouterr().err


def test_trls_file_has_the_order_of_our_loader(job, models, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", files.SEED)
    described = job("dpo")
    data = Preferences(train=described["ours"], batch_size=4)
    monkeypatch.setattr(Preferences, "tokenizer", load_tokenizer(described["model"]))
    data.setup("fit")
    drawn = list(data.train_dataloader())
    lines = [json.loads(line) for line in Path(described["trl"]).read_text().splitlines()]
    assert len(drawn) == STEPS
    tokenizer = load_tokenizer(described["model"])
    for number, batch in enumerate(drawn):
        expected = [
            [*tokenizer(line["prompt"] + line[name])["input_ids"], tokenizer.eos_token_id]
            for line in lines[4 * number : 4 * number + 4]
            for name in ("chosen", "rejected")
        ]
        rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        assert [row[:length] for row, length in rows] == expected
    counts = [sum(batch.lengths.tolist()) for batch in drawn]
    prompts = [sum(batch.prompt_lengths.tolist()) / 2 for batch in drawn]
    assert described["tokens"] == statistics.mean(counts)
    assert described["once"] == statistics.mean(counts) - statistics.mean(prompts)


def test_prompts_have_the_exact_number_of_tokens(job):
    described = job("grpo_large")
    tokenizer = load_tokenizer(described["model"])
    lines = [json.loads(line)["prompt"] for line in Path(described["ours"]).read_text().splitlines()]
    assert [len(tokenizer(line)["input_ids"]) for line in lines] == [5] * (STEPS * 2)
    assert (described["tokens"], described["once"]) == (4 * (5 + 3), 2 * 5 + 4 * 3)


@pytest.mark.parametrize(("name", "loss"), [("dpo", math.log(2)), ("reward", math.log(2)), ("grpo_large", None)])
def test_our_configurations_train(name, loss, job, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(runs.our_config(job(name), tmp_path, max_tokens=64)))
    cli.main(["fit", "--config", str(config)])
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert len(steps["seconds"]) == STEPS
    assert steps["losses"] == ([] if loss is None else pytest.approx([loss] * STEPS, abs=0.1))


def test_our_side_in_miniature(job, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WARMUP", 0)
    measured = runs.measure(job("sft"), "ours", options(), tmp_path / "run")
    assert 0 < measured.step < measured.process
    assert 0.1 < measured.peak < 8
    assert measured.tokens == 0
    assert measured.losses == pytest.approx([math.log(300)] * STEPS, abs=0.5)


def test_a_run_that_fails_ends_the_benchmark(job, tmp_path):
    with pytest.raises(SystemExit, match="trl failed in sft"):
        runs.measure(job("sft"), "trl", options(trl_python=Path(shutil.which("false"))), tmp_path / "run")


def test_the_table_has_medians_of_the_ratios_of_the_repeats():
    def pair(ours, trl, tokens):
        return runs.Measured(ours, 1.0, 10.0, [], 0.0), runs.Measured(trl, 2.0, 5.0, [], tokens)

    repeats = [(1.0, 2.0), (4.0, 2.0), (2.0, 6.0)]  # 2, ½ and 3 times
    measured = {name: [pair(*seconds, tokens=50.0) for seconds in repeats] for name in ("dpo", "sft")}
    lines = against_trl.table({key: {"tokens": 100.0, "once": 60.0} for key in measured}, measured).splitlines()
    dpo, sft = ([cell.strip() for cell in line.split("|")[3:-1]] for line in lines[2:])
    assert dpo == ["100", "60", "50", *("2.000", "2.000", "2.00"), *("1.00", "2.00", "2.00"), *("10.0", "5.0", "0.50")]
    assert sft[5] == "4.00"  # TRL's step has half of the tokens


@pytest.mark.parametrize(
    ("trl", "same"), [([0.5, 0.25], True), ([0.5, 0.2501], False), ([0.5], False), ([0.5, math.nan], False)]
)
def test_losses_are_the_same_or_not(trl, same, capsys):
    assert against_trl.same_losses("dpo", [0.5, 0.25], trl) is same
    assert ("DIFFERENT" in capsys.readouterr().out) is not same


def test_the_benchmark_fails_if_losses_differ(pairs, monkeypatch, tmp_path):
    """What the two sides measured is given here; the rest is the command."""
    found = {"ours": [0.5, 0.4], "trl": [0.5, 0.4]}
    monkeypatch.setattr(against_trl, "prepare", lambda *_: {"dpo check": {}})
    monkeypatch.setattr(against_trl, "measure", lambda job, side, *_: runs.Measured(1.0, 1.0, 1.0, found[side], 1.0))
    words = ["--trl-python", sys.executable, "--pairs", str(pairs), "--tasks", "dpo", "--repeats", "0"]
    against_trl.main([*words, "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["losses"] == {"dpo check": [[0.5, 0.4], [0.5, 0.4]]}
    found["trl"] = [0.5, 0.41]
    with pytest.raises(SystemExit, match="1"):
        against_trl.main(words)


def test_the_reward_of_both_sides():
    assert trl_steps.score(["b", "", "bd"], prompts=["", "", ""]) == pytest.approx([0.98, 0.0, 0.99])


def test_the_steps_of_trl_add_up_micro_batches(tmp_path):
    torch = pytest.importorskip("torch")
    steps = trl_steps.Steps()
    steps.ends.append(0.0)
    for loss in (1.0, 3.0):
        steps.add({"input_ids": torch.zeros(2, 3)}, torch.tensor(loss))
    steps.end()
    steps.add({"prompt_ids": torch.zeros(2, 3), "completion_ids": torch.zeros(2, 1)}, torch.tensor(4.0))
    steps.end()
    steps.write(tmp_path / "steps.json")
    written = json.loads((tmp_path / "steps.json").read_text())
    assert (written["losses"], written["tokens"], len(written["seconds"])) == ([2.0, 4.0], [12, 8], 2)
