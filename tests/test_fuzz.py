"""A short form of benchmarks/fuzz.py, which tries thousands of random data files and configurations."""

import sys
from pathlib import Path

import pytest

from lit_rlhf.data import prompts, records

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
fuzz = pytest.importorskip("fuzz")


@pytest.fixture(scope="module")
def tokenizer():
    return fuzz.load_tokenizer()


def test_data_files_and_configs(tokenizer):
    tally = fuzz.try_all(fuzz.cases_of(files=200, configs=24, seed=1), tokenizer)
    assert tally.found == []
    assert sum(tally.ends.values()) == 224
    for kind in (*fuzz.GOOD, "config"):
        assert tally.ends[kind, "refused"] > 2
        assert tally.ends[kind, "accepted"] > 2


def test_the_same_seed_makes_the_same_cases():
    one, same, other = (fuzz.cases_of(files=20, configs=5, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_planted_bug_is_found(tokenizer, monkeypatch, tmp_path):
    """Records that are numbers or lists were refused by this check."""
    original = records._check_line
    monkeypatch.setattr(records, "_check_line", lambda line, where: b":" in line or original(line, where))
    tally = fuzz.try_all(fuzz.cases_of(files=150, configs=0, seed=1), tokenizer, keep=tmp_path / "kept")
    assert any("crash of" in found for found in tally.found)
    assert len(list((tmp_path / "kept").iterdir())) == len(tally.found)


@pytest.mark.parametrize("planted", ["import time; time.sleep(9)", "import os; os.abort()"])
def test_a_hang_and_the_end_of_the_process_are_found(tokenizer, monkeypatch, planted):
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    monkeypatch.setattr(prompts.PromptEncoder, "__call__", lambda *arguments: exec(planted))
    cases = [fuzz.Case("Prompts", "good.jsonl", b'{"prompt": "w1"}\n')] * 2
    tally = fuzz.try_all(cases, tokenizer)
    assert tally.ends["Prompts", "hang" if "sleep" in planted else "crash"] == 2
