"""What W&B (offline), TensorBoard, CSV files and MLflow get of a run that is killed and resumed, and what it prints.

wandb has no Python reader for its run files, so this test extracts the records from the file (a LevelDB log: blocks of
32 KiB that contain fragments, each with a header of checksum, length and type) and parses them with wandb's protocol
classes.
"""

import csv
import json
import re
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import preloaded
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from wandb.proto import wandb_internal_pb2

from lit_rlhf import LogDetails
from lit_rlhf.callbacks.details import Detail
from lit_rlhf.callbacks.logged_rows import continue_logs, keep_csv
from lit_rlhf.callbacks.logged_runs import note_logged
from lit_rlhf.callbacks.loggers import BINS, histogram
from lit_rlhf.callbacks.wandb_files import files, rows

BLOCK, FILE_HEADER, FRAGMENT_HEADER = 32768, 7, 7
REWARD = """
import os, signal
calls = 0

def reward(responses):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT_CALL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(r) / 10 for r in responses]
"""
ITERATIONS = 6


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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_model, prompt_file):
    """Return the folder of a run that was killed in iteration 6 and resumed after iteration 4, and its second output.

    The reward is called once per iteration, and in the first validation, after iteration 3, twice.
    """
    folder = tmp_path_factory.mktemp("logged")
    (folder / "reward.py").write_text(REWARD)
    loggers = [{"class_path": "WandbLogger"}, {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "run"}}]
    loggers += [{"class_path": "CSVLogger", "init_args": {"save_dir": "run"}}]
    try:
        import mlflow  # noqa: F401

        loggers.append({"class_path": "MLFlowLogger", "init_args": {"save_dir": "ml"}})
    except ImportError:
        pass
    (folder / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    command = [
        *("-m", "lit_rlhf.cli", "fit", "--config", "loggers.yaml", "--model", "PolicyGradient"),
        *("--model.actor", str(tiny_model("llama")), "--model.iterations", str(ITERATIONS)),
        '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
        *("--model.sampling.max_tokens", "6", "--data", "Prompts", "--data.train", str(prompt_file)),
        *("--data.validation", str(prompt_file), "--data.batch_size", "24", "--trainer.accelerator", "cpu"),
        *("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"),
        *("--trainer.default_root_dir", "run", "--checkpoint.every_n", "2", "--details.every_n", "2"),
        *("--details.model", "true", "--ckpt_path", "last"),
        *("--model.update.epochs", "1", "--model.update.minibatches", "2"),
    ]
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    killed = preloaded.run(*command, cwd=folder, **environment, KILL_AT_CALL="8")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = preloaded.run(*command, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_wandb_gets_everything_once_in_one_run_with_the_iteration_as_the_axis(resumed):
    """The second part has what the first one has not written before it was killed."""
    folder, _ = resumed
    first, second = sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name  # the same id
    read = [*records(first), *records(second)]
    axes = [r.metric.step_metric for r in read if r.WhichOneof("record_type") == "metric" and r.metric.glob_name == "*"]
    assert axes[-1] == "progress/iteration"
    rows = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item} for r in read]

    def at(name: str) -> list[int]:
        return [row["progress/iteration"] for row in rows if any(key.startswith(name) for key in row)]

    assert at("objective/score") == [1, 2, 3, 4, 5, 6]
    assert at("val/score") == at("samples/val") == [3, 6]
    for name in ("samples/train", *(f"histograms/{x}" for x in ("scores", "lengths", "advantages", "actor_to_engine"))):
        assert at(name) == [1, 2, 4, 6], name
    assert all(row["trainer/global_step"] == row["progress/iteration"] for row in rows if "objective/score" in row)
    assert {sum(row["histograms/lengths/values"]) for row in rows if "histograms/lengths/values" in row} == {24}
    config = {}
    for r in read:
        for update in (*r.run.config.update, *r.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    assert "PolicyGradient" in json.dumps(config)
    assert json.dumps(config).count("reward.py:reward") == 1
    files = second.parent.glob("files/media/table/samples/train_*.table.json")
    table = max((json.loads(file.read_text()) for file in files), key=lambda table: table["data"][0][0])
    assert table["columns"][:4] == ["iteration", "stage", "prompt", "response"]
    assert table["columns"][5:] == ["score", "rewards/reward", "kl_to_ref"]
    lines = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    wanted = [line["response"] for line in lines if line["iteration"] == 6 and line["stage"] == "train"]
    assert [row[3] for row in table["data"]] == wanted
    artifacts = {r.artifact.type: r.artifact for r in read if r.WhichOneof("record_type") == "artifact"}
    files = [entry.path for entry in artifacts["model"].manifest.contents]
    assert "config.json" in files
    assert "model.safetensors" in files


def test_tensorboard_continues_its_version_without_doubled_steps(resumed):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = resumed
    limits = {"scalars": 0, "histograms": 0, "tensors": 0}
    read = accumulator.EventAccumulator(str(folder / "run" / "lightning_logs" / "version_0"), limits)
    read.Reload()
    scores = [(event.step, event.value) for event in read.Scalars("objective/score")]
    assert [step for step, _ in scores] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in read.Scalars("val/score")] == [3, 6]
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()
    assert "step" not in rows[0].split(",")
    column = rows[0].split(",").index("objective/score")
    assert [score for _, score in scores] == pytest.approx([float(x) for r in rows[1:] if (x := r.split(",")[column])])
    for name in ("scores", "lengths", "advantages", "actor_to_engine"):
        drawn = read.Histograms(f"histograms/{name}")
        assert [event.step for event in drawn] == [1, 2, 4, 6]
        assert drawn[0].histogram_value.num == sum(drawn[0].histogram_value.bucket)
    texts = read.Tensors("samples/val/text_summary")
    assert [event.step for event in texts] == [3, 6]
    assert b"| rewards/reward | kl_to_ref |" in texts[0].tensor_proto.string_val[0]


def test_the_csv_logger_continues_its_file(resumed):
    (file,) = (resumed[0] / "run" / "lightning_logs").glob("version_*/metrics.csv")
    rows, own = (list(csv.DictReader(path.open())) for path in (file, resumed[0] / "run" / "metrics.csv"))
    for name, expected in (("objective/score", [1, 2, 3, 4, 5, 6]), ("val/score", [3, 6])):
        assert [int(row["step"]) for row in rows if row[name]] == expected
        values = [[float(row[name]) for row in table if row[name]] for table in (rows, own)]
        assert values[0] == pytest.approx(values[1])


def test_mlflow_continues_its_run(resumed):
    tracking = pytest.importorskip("mlflow.tracking")
    folder, _ = resumed
    (run,) = [path.name for path in (folder / "ml").glob("[0-9]*/*") if (path / "metrics").exists()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{folder / 'ml'}")  # MLflow 3.1 looks for artifacts only here
        client = tracking.MlflowClient()
        history = client.get_metric_history(run, "objective/score")
        assert sorted(metric.step for metric in history) == [1, 2, 3, 4, 5, 6]  # 5 was done twice
        assert client.get_run(run).data.params["model/class_path"].endswith("PolicyGradient")
        assert [f.path for f in client.list_artifacts(run, "samples/val")] == [
            f"samples/val/iteration-00000{number}.md" for number in (3, 6)
        ]


def test_config_names_no_run_of_a_logger(resumed):
    """So that it can be used for a new run."""
    loggers = yaml.safe_load((resumed[0] / "run" / "config.yaml").read_text())["trainer"]["logger"]
    assert [x["init_args"].get(key) for x in loggers for key in ("id", "version", "run_id")] == [None] * 3 * len(
        loggers
    )


def test_what_a_run_without_a_terminal_prints(resumed):
    out = resumed[1]
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out[out.index("plan: It fits") :].splitlines()[1:]
    five = re.compile(r"iteration 5/6  score [\d.]+  KL -?[\d.e-]+  [\d,]+ tokens/s  [\d.]+ s/iteration  0:\d\d left")
    assert five.fullmatch(lines[0]), lines[0]
    assert lines[1].startswith("iteration 6/6  score ")
    assert re.match(r"iteration 6/6  validation: score [\d.]+  reference score [\d.]+  win rate [\d.]+  KL ", lines[2])
    assert lines.pop(3) == "report: run/report.html"
    labels = [line.split()[0] for line in lines[3:]]
    assert labels == ["done", "score", "KL", "length", "win", "model", "files", "next", "next"]
    assert re.fullmatch(r"done      PolicyGradient, 6 iterations in 0:\d\d \(after iteration 4\)", lines[3])
    scores = [row["objective/score"] for row in csv.DictReader((resumed[0] / "run" / "metrics.csv").open())]
    first, last = (f"{float(score):.3g}" for score in (scores[0], [x for x in scores if x][-1]))
    assert lines[4].startswith(f"score     {first} → {last}, ")  # the first one is from before the interruption
    assert lines[4].endswith(" held out")
    assert lines[8] == "model     run/export"
    assert lines[9] == "files     run: metrics.csv, samples.jsonl, report.html, config.yaml, checkpoints"
    assert lines[10].endswith("--ckpt_path run/checkpoints/last.ckpt --data.predict prompts.jsonl")


def test_wandb_gets_nothing_twice_and_what_it_lacks(tmp_path, monkeypatch):
    """Three parts: the second one repeats iteration 3, and the third one continues after 6, though 5 and 6 are lost."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path, logger = tmp_path / "loggers.json", WandbLogger(save_dir=str(tmp_path))
    name = logger.experiment.id
    assert note_logged(path, [logger]) == []
    history = [{"progress/iteration": step, "loss": step / 2} for step in range(8)]
    for first, last, lacking in ((1, 3, ()), (3, 4, ()), (7, 7, (2, 3, 6))):
        if first > 1:
            time.sleep(1.0)  # W&B names the folder of a part by the second in which the part starts
            logger = WandbLogger(save_dir=str(tmp_path), id=name)
            _ = logger.experiment
            assert note_logged(path, [logger]) == [logger]
            details = [Detail("table", "samples/train", ["step"], [[step]], step) for step in lacking]
            continue_logs([logger], history[1:first], details, first - 1)
        for step in range(first, last + 1):
            logger.log_metrics(history[step], step)
            Detail("table", "samples/train", ["step"], [[step]], step).log(logger)
        logger.experiment.finish()
    parts, deadline = files(tmp_path / "wandb", name), time.monotonic() + 10
    while not any(row.get("loss") == 3.5 for row in rows(parts[-1])) and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process may still be writing
    logged = [list(rows(file)) for file in parts]
    losses = [[row["loss"] for row in part if "loss" in row] for part in logged]
    assert losses == [[0.5, 1.0, 1.5], [2.0], [2.5, 3.0, 3.5]]
    tables = [[row["trainer/global_step"] for row in part if "samples/train" in row] for part in logged]
    assert tables == [[1, 2, 3], [4], [6, 7]]
    whole = parts[0].read_bytes()
    parts[0].write_bytes(whole[: len(whole) // 2])  # as if the process had been killed while it wrote
    assert len(list(rows(parts[0]))) < len(logged[0])


def test_a_changed_set_of_loggers(tmp_path):
    """A logger that was left out for a time continues its run; a new one has nothing to continue."""
    csvs, boards = CSVLogger(tmp_path, version=3), TensorBoardLogger(str(tmp_path), version=4)
    assert note_logged(tmp_path / "loggers.json", [csvs]) == []
    assert note_logged(tmp_path / "loggers.json", [boards]) == []
    assert note_logged(tmp_path / "loggers.json", [boards, csvs]) == [boards, csvs]
    assert note_logged(tmp_path / "loggers.json", [CSVLogger(tmp_path, version=5)]) == []


@pytest.mark.parametrize("moment", ["before", "while the file is aside"])
def test_the_rows_of_a_csv_logger_are_kept(tmp_path, moment):
    logger = CSVLogger(tmp_path, version=0)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": step / 2} | ({"val/loss": 1.0} if step > 1 else {}), step)
        logger.save()
    file = Path(logger.log_dir, "metrics.csv")
    if moment != "before":
        file.rename(file.with_name(".metrics.csv.kept"))
    logger = CSVLogger(tmp_path, version=0)
    keep_csv([logger])
    rows = [{"progress/iteration": step, "loss": step / 2} for step in (1, 2, 3, 4)]
    continue_logs([logger], rows[:3], [], 2)
    logger.log_metrics({"loss": 1.5, "lr": 0.1}, 3)
    logger.save()
    found = list(csv.DictReader(file.open()))
    assert [(r["step"], r["loss"], r["val/loss"], r["lr"]) for r in found] == [
        ("1", "0.5", "", ""),
        ("2", "1.0", "1.0", ""),
        ("3", "1.5", "", "0.1"),
    ]


def test_histogram_counts_every_value():
    class OneProcess:
        def reduce(self, x, reduce_op):
            return x

    values = torch.tensor([-1.0, 0.0, 0.5, 3.0])
    counts, edges = histogram(values, OneProcess())
    assert (edges[0], edges[-1], len(edges)) == (-1.0, 3.0, BINS + 1)
    wanted, _ = torch.histogram(values, BINS, range=(-1.0, 3.0))
    assert counts == wanted.tolist()
    same, edges = histogram(torch.full((5,), 2.0), OneProcess())
    assert (sum(same), edges[0], edges[-1]) == (5.0, 1.5, 2.5)
    assert sum(histogram(torch.zeros(0), OneProcess())[0]) == 0


def test_wrong_interval():
    with pytest.raises(ValueError, match=r"details.every_n must be 1 or more, or 0 for nothing, not -1"):
        LogDetails(every_n=-1)
