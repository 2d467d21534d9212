"""An offline W&B run holds the metrics, the configuration and a table of samples.

wandb has no reader of its run files in Python: records are cut out of the file here (a LevelDB log: blocks of 32 KiB,
in them pieces with a header of checksum, length and type), and parsed by wandb's own protocol classes.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, PIECE_HEADER = 32768, 7, 7


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, at, whole = path.read_bytes(), FILE_HEADER, b""
    while at + PIECE_HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < PIECE_HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + PIECE_HEADER])
        whole += data[at + PIECE_HEADER : at + PIECE_HEADER + length]
        at += PIECE_HEADER + length
        if kind in (1, 4):  # full, or last of several
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


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
