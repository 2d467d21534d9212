"""Runs of lit-rlhf and of TRL for against_trl.py, each in a process of its own, and what is measured of them."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
WARMUP = 2  # steps that are not counted; the last one is not counted either


class Measured(NamedTuple):
    """What was measured of one run."""

    step: float  # the median seconds of a step
    peak: float  # GiB
    process: float  # seconds
    losses: list[float]  # of each step
    tokens: float  # the mean of a step, as TRL counts them; 0 if not counted


def our_config(job: dict[str, Any], run: Path, max_tokens: int) -> dict[str, Any]:
    """Return the configuration of ``lit-rlhf fit``.

    Args:
        job: The description of the run that against_trl_files.py wrote.
        run: The folder of the run.
        max_tokens: The largest number of tokens in a micro-batch, with padding.
    """
    data = {"train": job["ours"], "batch_size": job["batch"], "max_tokens": job["max_tokens"]}
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": job["rate"], "weight_decay": 0.0, "fused": True},
    }
    common = {"iterations": job["steps"], "optimizer": optimizer, "clip_grad_norm": 1.0, "max_tokens": max_tokens}
    model: dict[str, Any]
    if job["method"] == "dpo":  # TRL's default is to compute the reference in every step, too
        model = {"class_path": "DPO", "init_args": {"actor": job["model"], "cache_reference": False, **common}}
        chosen = "Preferences"
    elif job["method"] == "reward":
        model = {"class_path": "RewardModeling", "init_args": {"reward": job["model"], **common}}
        chosen = "Preferences"
    elif job["method"] == "sft":
        model = {"class_path": "SFT", "init_args": {"actor": job["model"], **common}}
        chosen, data = "Demonstrations", data | {"packing": True}
    else:
        model = _our_grpo(job, optimizer, max_tokens)
        chosen, data = "Prompts", data | {"batch_size": job["batch"] // job["group"]}
    clock = {"class_path": "step_clock.StepClock", "init_args": {"file": str(run / "steps.json")}}
    return {
        "seed_everything": 42,
        "model": model,
        "data": {"class_path": chosen, "init_args": data},
        "trainer": {
            "default_root_dir": str(run / "run"),
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "enable_progress_bar": False,
            "callbacks": [clock],
        },
        "checkpoint": {"every_n": 10**6},
        "samples": {"count": 0},
        "report": {"at_end": False},
        "summary": {"next": False},
        "plan": {"checkpointing": False},
    }


def _our_grpo(job: dict[str, Any], optimizer: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Return the options of GRPO with one optimizer step in an iteration and the KL to the reference in the loss."""
    reward = {"class_path": "RewardFunction", "init_args": {"function": f"{HERE / 'trl_steps.py'}:score"}}
    length = job["response"]
    return {
        "class_path": "PolicyGradient",
        "init_args": {
            "actor": job["model"],
            "critic": None,
            "rewards": [reward],
            "sampling": {"max_tokens": length, "min_tokens": length, "responses": job["group"]},
            "kl": {"class_path": "FixedKL", "init_args": {"coef": job["kl_coef"]}},
            "reference_kl": {"where": "loss", "estimator": "k3"},
            "advantages": {"class_path": "GroupNormalized"},
            "objective": {"class_path": "Clip", "init_args": {"eps": 0.2}},
            "update": {
                "epochs": 1,
                "minibatches": 1,
                "aggregation": "sequence",
                "whiten_advantages": False,
                "max_tokens": max_tokens,
            },
            "iterations": job["steps"],
            "actor_optimizer": optimizer,
        },
    }


def measure(job: dict[str, Any], side: str, options: argparse.Namespace, run: Path) -> Measured:
    """Run lit-rlhf ("ours") or TRL ("trl") in a process, and return what was measured.

    Raises:
        SystemExit: if the process fails.
    """
    run.mkdir(parents=True)
    command: list[Any]
    if side == "ours":
        (run / "config.yaml").write_text(json.dumps(our_config(job, run, options.max_tokens)))  # JSON is YAML
        command = [sys.executable, "-m", "lit_rlhf.cli", "fit", "--config", run / "config.yaml"]
    else:
        micro_batch = min(options.trl_micro_batch or job["trl_micro_batch"], job["trl_batch"])
        batch = job["trl_batch"] // micro_batch * micro_batch
        changes = {"output": str(run), "trl_micro_batch": micro_batch, "trl_batch": batch}
        (run / "job.json").write_text(json.dumps(job | changes))
        command = [options.trl_python.absolute(), HERE / "trl_steps.py", run / "job.json"]
    began = time.perf_counter()
    with (run / "log.txt").open("w") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=run, env=environment(options, run, ours=side == "ours")
        )
        _, status, usage = os.wait4(child.pid, 0)  # of this process alone, unlike RUSAGE_CHILDREN
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{side} failed in {job['method']}:\n{(run / 'log.txt').read_text()[-3000:]}")
    steps = json.loads((run / "steps.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    tokens = statistics.mean(steps["tokens"]) if steps["tokens"] else 0.0
    return Measured(
        statistics.median(steps["seconds"][WARMUP:-1]), usage.ru_maxrss * unit / 2**30, seconds, steps["losses"], tokens
    )


def environment(options: argparse.Namespace, folder: Path, ours: bool = True) -> dict[str, str]:
    """Return the environment of a process: its threads, no caches of earlier runs, no network."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    chosen = {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | chosen | ({"PYTHONPATH": path} if ours else {})
