import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

TEST = """
import sys


def test_nothing_heavy_is_imported():
    assert not {"torch", "lightning", "transformers"} & set(sys.modules)


def test_the_fixtures_are_there(tiny_model):
    from lit_rlhf.testing import Recorder, make_tiny_model

    assert (tiny_model("gpt2") / "config.json").exists()
    assert Recorder().metrics == []


def test_the_data_and_their_tokenizer(tiny_prompts, tiny_preferences, tiny_demonstrations, tiny_tokenizer):
    import json

    for file, column in ((tiny_prompts, "prompt"), (tiny_preferences, "chosen"), (tiny_demonstrations, "text")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) >= 32
        assert tiny_tokenizer.unk_token_id not in tiny_tokenizer([record[column] for record in records]).input_ids[0]
"""


def test_the_plugin_imports_nothing_heavy_into_other_projects_tests(tmp_path):
    (plugin,) = entry_points(group="pytest11", name="lit-rlhf")
    (tmp_path / "test_other.py").write_text(TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin.value, "test_other.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # other plugins do not belong to this project
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_wrong_name():
    with pytest.raises(ImportError, match="Recoder"):
        from lit_rlhf.testing import Recoder  # noqa: F401
