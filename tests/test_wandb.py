"""An offline W&B run holds the metrics, the configuration and a table of samples.

wandb has no Python reader for its run files, so this test extracts the records from the file (a LevelDB log: blocks of
32 KiB that contain fragments, each with a header of checksum, length and type) and parses them with wandb's protocol
classes.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, FRAGMENT_HEADER = 32768, 7, 7


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, at, record = path.read_bytes(), FILE_HEADER, b""
    while at + FRAGMENT_HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < FRAGMENT_HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + FRAGMENT_HEADER])
        record += data[at + FRAGMENT_HEADER : at + FRAGMENT_HEADER + length]
        at += FRAGMENT_HEADER + length
        if kind in (1, 4):  # a whole record, or its last fragment
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_offline_run(tiny_model, prompt_file, tmp_path):
    command = [
        *(sys.executable, "-m", "lit_rlhf.cli", "fit", "--model", "PolicyGradient"),
        *("--model.actor", str(tiny_model("llama")), "--model.iterations", "3", "--model.sampling.max_tokens", "6"),
        '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
        *("--data", "Prompts", "--data.train", str(prompt_file), "--data.batch_size", "8"),
        *("--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu", "--trainer.logger", "WandbLogger"),
    ]
    (tmp_path / "reward.py").write_text("def reward(responses):\n    return [len(r) / 10 for r in responses]\n")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    read = list(records(file))
    logged = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item} for r in read]
    scores = [row["objective/score"] for row in logged if "objective/score" in row]
    assert len(scores) == 3
    assert all(score > 0 for score in scores)
    config = {}
    for r in read:
        for update in (*r.run.config.update, *r.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    assert "PolicyGradient" in json.dumps(config)
    assert json.dumps(config).count("reward.py:reward") == 1
    (first, *_) = sorted(file.parent.glob("files/media/table/samples_*.table.json"))
    table = json.loads(first.read_text())
    assert table["columns"][:4] == ["iteration", "stage", "prompt", "response"]
    assert len(table["data"]) == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row[3] for row in table["data"]] == [line["response"] for line in lines[:4]]
