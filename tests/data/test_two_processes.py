"""With two processes, one fills the cache and both read it."""

import json
from pathlib import Path

import preloaded


def test_each_record_is_encoded_once_and_returned_once(tiny_model, prompt_file, tmp_path, cache):
    script = Path(__file__).with_name("prompts_on_ranks.py")
    for encoded in (48, 0):  # the second run, in new processes, finds everything in the cache
        done = preloaded.torchrun(2, *map(str, (script, tiny_model("llama"), prompt_file, tmp_path, cache)))
        assert [one.returncode for one in done] == [0, 0], [one.stderr[-3000:] for one in done]
        assert sum(one.stdout.count("data: 48 train prompts") for one in done) == 1
        ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert [rank["encoded"] for rank in ranks] == [encoded, 0]
        numbers = [number for rank in ranks for batch in rank["given"] for number in batch]
        assert sorted(numbers) == list(range(48))


def test_a_bad_record_ends_both_processes_with_a_one_line_error(tiny_model, prompt_file, tmp_path, cache):
    path = tmp_path / "bad.jsonl"
    path.write_text(prompt_file.read_text() + '{"text": "w2"}\n')
    words = ["fit", "--model", "SFT", "--model.actor", tiny_model("llama"), "--data", "Prompts", "--data.train", path]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words += ["--trainer.default_root_dir", tmp_path / "run"]
    done = preloaded.run("-m", "lit_rlhf.cli", *map(str, words), HF_DATASETS_CACHE=str(cache))
    assert done.returncode == 1
    assert f"\nlit-rlhf: error: data.train: record 49 of {path} has no column 'prompt'" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
