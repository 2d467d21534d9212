"""The checks of gpu.py that compare numbers: the GPU's with the CPU's, one run's with another's."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_runs import STOP, VOCABULARY, Number, Setting, fit_exact, write_models, write_prompts
from models import PAD, WORDS
from same_numbers import largest_difference, weights
from torch import Tensor

from lit_rlhf import Engine, Guard, PromptBatch, Rollout, Sampling, ScoredRollout, Update
from lit_rlhf.generation.engine import join_responses
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testing import Recorder

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"log-probabilities": "old_logprobs", "values": "values", "scores": "scores"}
"""The names of what is compared, with those of the fields of `ScoredRollout`."""
GRADIENTS = {"norm of the actor's gradient": "policy/grad_norm", "norm of the critic's gradient": "value/grad_norm"}
"""The names of what is compared, with those of the metrics."""
REWARD = """
import os, signal
calls = 0

def reward(responses):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT_CALL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response.split())) / 10 for response in responses]
"""


class Replay(Engine):
    """An engine that returns the same random responses in every run, so that runs can be compared token by token.

    Args:
        longest: The number of tokens of the longest response.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def generate(
        self, actor: Any, prompts: PromptBatch, sampling: Any, special_tokens: Any, *, stream: Any, iteration: int
    ) -> Rollout:
        """Return random responses to each prompt."""
        count, device = len(prompts.tokens) * sampling.responses, prompts.tokens.device
        drawn = torch.Generator().manual_seed(2)
        tokens = torch.randint(WORDS, VOCABULARY, (count, self.longest), generator=drawn)
        lengths = torch.randint(1, self.longest + 1, (count,), generator=drawn)
        lengths[0] = self.longest
        zeros = torch.zeros(count, self.longest, device=device)
        return join_responses(
            prompts,
            sampling,
            PAD,
            tokens=tokens.to(device),
            logprobs=zeros,
            entropy=zeros,
            lengths=lengths.to(device),
            terminated=torch.ones(count, dtype=torch.bool, device=device),
        )


def logprobs(setting: Setting) -> Iterator[Number]:
    """Compare an iteration on given responses: on the CPU, on the device, in bf16, and with one text at a time.

    Each prompt has two responses and is computed once for both, except with one text at a time.
    """
    torch.set_float32_matmul_precision("highest")
    cpu, single = _replayed(setting, device="cpu"), _replayed(setting)
    half = _replayed(setting, precision="bf16-mixed")
    alone = _replayed(setting, precision="bf16-mixed", max_tokens=1)
    for name in ("log-probabilities", "values", "scores"):
        yield Number(f"{name}, fp32: largest difference from the CPU", _apart(cpu, single, name)[0], 1e-4)
    for name in GRADIENTS:
        yield Number(f"{name}, fp32: relative difference from the CPU", _relative(cpu, single, name), 1e-3)
    for name in ("log-probabilities", "values"):
        yield Number(f"{name}, bf16: mean difference from fp32", _apart(single, half, name)[1], 0.02)
    for name in GRADIENTS:
        yield Number(f"{name}, bf16: relative difference from fp32", _relative(single, half, name), 0.05)
    for name in ("log-probabilities", "values"):
        yield Number(f"{name}, bf16: mean difference with one text at a time", _apart(half, alone, name)[1], 0.01)


def _replayed(
    setting: Setting, device: str | None = None, precision: str = "32-true", max_tokens: int = 8192
) -> Recorder:
    recorder, models, longest = Recorder(), write_models(setting, setting.exact), 24 if setting.small else 64
    options = {
        "engine": Replay(longest),
        "guard": Guard(responses=0),
        "sampling": Sampling(max_tokens=longest, stop=STOP, responses=2),
        "rewards": [RewardModel(f"{models}/reward")],
        "update": Update(epochs=1, minibatches=1, max_tokens=max_tokens),
    }
    fit_exact(setting, [recorder], options=options, device=device, precision=precision)
    return recorder


def _apart(one: Recorder, other: Recorder, name: str) -> tuple[float, float]:
    """Return the largest and the mean absolute difference of a field of the first iterations' `ScoredRollout`."""
    fields: list[Tensor] = []
    for recorder in (one, other):
        scored: ScoredRollout = recorder.outputs[0]["scored_rollout"]
        field, mask = getattr(scored, FIELDS[name]), scored.rollout.response_mask
        fields.append((field if field.ndim == 1 else field[mask]).double().cpu())
    difference = (fields[0] - fields[1]).abs()
    return float(difference.max()), float(difference.mean())


def _relative(one: Recorder, other: Recorder, name: str) -> float:
    return abs(other.metrics[0][GRADIENTS[name]] / one.metrics[0][GRADIENTS[name]] - 1.0)


def first_iteration(setting: Setting) -> Iterator[Number]:
    """Check an iteration that begins with the reference's weights: ratios of 1, no KL, and samples that the seed gives.

    With a learning rate of 0, all four minibatches compute what the first one does, each in other micro-batches than
    those in which the old log-probabilities were computed.
    """
    torch.set_float32_matmul_precision("highest")
    still = {"update": Update(epochs=1, minibatches=4), "actor_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    for precision, ratio, kl in (("bf16-mixed", 0.1, 1e-2), ("32-true", 1e-5, 1e-3)):
        first, second = (_sampled(setting, still, precision=precision) for _ in range(2))
        metrics = first.metrics[0]
        yield Number(f"ratio_max − 1, {precision}", metrics["policy/ratio_max"] - 1.0, ratio)
        yield Number(f"KL to the old policy, {precision}", metrics["policy/kl_to_old"], ratio**2, unit="nats a token")
        to_ref = abs(metrics["objective/kl_to_ref"])
        yield Number(f"|KL to the reference|, {precision}", to_ref, kl, unit="nats a response")
        yield Number(f"responses that differ, same seed, {precision}", _differing(first, second), 0, unit="of 16")
    cpu = _sampled(setting, still, device="cpu", precision="32-true")
    yield Number("responses that differ from the CPU's, 32-true", _differing(first, cpu), unit="of 16")


def _sampled(setting: Setting, options: dict[str, Any], **trainer_options: Any) -> Recorder:
    """Train for an iteration of one step, unless the options of `PolicyGradient` say otherwise."""
    recorder, models = Recorder(), write_models(setting, setting.exact)
    defaults = {"rewards": [RewardModel(f"{models}/reward")], "update": Update(epochs=1, minibatches=1)}
    fit_exact(setting, [recorder], options=defaults | options, **trainer_options)
    return recorder


def _differing(one: Recorder, other: Recorder) -> float:
    texts = [recorder.outputs[0]["scored_rollout"].reward_inputs.responses for recorder in (one, other)]
    return float(sum(a != b for a, b in zip(*texts, strict=True)))


def fsdp2(setting: Setting) -> Iterator[Number]:
    """Compare an iteration of four minibatches under fsdp2, on one process, with one without a strategy."""
    torch.set_float32_matmul_precision("highest")
    options: dict[str, Any] = {"update": Update(epochs=2, minibatches=2)}
    for name in ("actor_optimizer", "critic_optimizer"):
        options[name] = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True)
    single, sharded = (
        _sampled(setting, options, strategy=strategy, precision="32-true") for strategy in ("auto", "fsdp2")
    )
    difference = largest_difference(single.weights, sharded.weights)
    yield Number("weights after an iteration, fp32: fsdp2 and one device", difference, 1e-5)
    yield Number("responses that differ, fsdp2 and one device", _differing(single, sharded), 0, unit="of 16")
    torch.distributed.destroy_process_group()


def resume(setting: Setting) -> Iterator[Number]:
    """Kill a run in its third iteration, resume it, and compare its weights with those of an uninterrupted run.

    All runs are deterministic except the last one, which repeats the second half of the uninterrupted run.
    """
    folder = setting.folder / "resume"
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    _command(setting, folder, "whole")
    _command(setting, folder, "killed", KILL_AT_CALL="3")
    _command(setting, folder, "killed", checkpoint="last")
    difference = largest_difference(weights(folder / "whole"), weights(folder / "killed"))
    yield Number("weights, resumed and not: largest difference", difference, 0)
    middle = "whole/checkpoints/iteration-000002.ckpt"
    _command(setting, folder, "free", checkpoint=middle, deterministic="false")
    difference = largest_difference(weights(folder / "whole"), weights(folder / "free"))
    yield Number("weights, second half not deterministic: largest difference", difference)


def _command(
    setting: Setting,
    folder: Path,
    name: str,
    checkpoint: str | None = None,
    deterministic: str = "true",
    **environment: str,
) -> None:
    """Run ``lit-rlhf fit`` for four iterations, or from a checkpoint to the end of the fourth."""
    words = ["fit", "--model", "PolicyGradient", "--model.actor", f"{write_models(setting, setting.exact)}/policy"]
    words += ['--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]']
    words += ["--model.critic", "actor", "--model.iterations", "4", "--model.sampling.max_tokens", "24"]
    words += [f"--model.sampling.stop=[{', '.join(STOP)}]"]
    words += ["--model.actor_optimizer", "AdamW", "--model.actor_optimizer.lr", "0.001"]
    words += ["--data", "Prompts", "--data.train", write_prompts(setting, 64, 1, 24), "--data.batch_size", "16"]
    words += ["--trainer.accelerator", "gpu" if setting.device == "cuda" else "cpu", "--trainer.devices", "1"]
    words += ["--trainer.precision", "bf16-mixed", "--trainer.deterministic", deterministic]
    words += ["--trainer.default_root_dir", name, "--trainer.enable_progress_bar", "false"]
    words += ["--checkpoint.every_n", "2", "--checkpoint.keep_every_n", "2"]
    words += [] if checkpoint is None else ["--ckpt_path", checkpoint]
    done = subprocess.run(
        [sys.executable, "-m", "lit_rlhf.cli", *words],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != (-signal.SIGKILL if environment else 0):
        raise RuntimeError(f"lit-rlhf fit in {name} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def nccl(setting: Setting) -> Iterator[Number]:
    """Run the test that NCCL reports a lost process in the words that lit-rlhf expects."""
    words = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-m", "", "-k", "nccl"]
    done = subprocess.run([sys.executable, *words, "tests/test_compat.py"], cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    passed = re.search(r"(\d+) passed", last)
    if passed is None and "skipped" not in last:
        raise RuntimeError(f"pytest: {last}")
    yield Number("tests of NCCL's messages that pass", passed and float(passed[1]), at_least=1)
