"""A callback that measures each phase's tokens per second, and how much of the devices' peak rate each phase uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import lightning
import torch
from torch import Tensor

from lit_rlhf.callbacks.plan import run_setting
from lit_rlhf.errors import UserError
from lit_rlhf.modules.hooks import OnPolicyCallback
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.planning.hardware import Device, this_gpu
from lit_rlhf.planning.setting import Setting
from lit_rlhf.planning.speed import work
from lit_rlhf.types import Experience, Rollout


class Throughput(OnPolicyCallback):
    """A callback that logs the tokens per second and the utilisation of each phase of an iteration.

    The phases are ``generate``, ``judge`` and ``update``; their seconds are the metrics ``time/*``. Two metrics of each
    phase are logged, for example ``perf/update_tokens_per_second`` and ``perf/update_utilisation``:

    - The tokens of the iteration, divided by the seconds of the phase. In ``generate``, these are the tokens of the
      responses; in the other phases, each token of the prompts and responses counts once, however often it is read.
      In ``update``, only the responses count that the update learns from.
    - The utilisation: the FLOPs of the phase, divided by the FLOPs that all devices could do in the same time at the
      peak rate. The phase's FLOPs are those that ``lit-rlhf plan`` computes, here for the mean lengths of the
      iteration's prompts and responses. They include the recomputation of activations, and assume that no target KL
      ends the update early.

    The utilisation is logged only if the peak rate is known and the run can be planned, and for ``generate`` only if
    the training processes generate the responses. The tokens and responses per second of whole iterations are metrics
    of every run: ``perf/tokens_per_second`` and ``perf/responses_per_second``.

    Args:
        peak_tflops: The peak rate of one device in the precision of the run, in 10¹² FLOPs per second; None for the
            rate that ``lit-rlhf plan`` knows for the GPU.

    Raises:
        ValueError: if ``peak_tflops`` is not positive.

    >>> Throughput(peak_tflops=989.0).peak_tflops
    989.0
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"Throughput.peak_tflops must be positive or null, not {peak_tflops}")
        self.peak_tflops = peak_tflops
        self._setting: Setting | None = None
        self._peak: float | None = None  # FLOPs per second of all devices
        self._drawn = self._learned = _counts()  # of this process, in this iteration

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the peak rate and, if the rate is known, the setting of the run, from which the FLOPs are computed."""
        device = this_gpu() if trainer.strategy.root_device.type == "cuda" else Device("cpu", 0.0, None, None, None)
        known = device.half if str(trainer.precision).startswith("bf16") else device.single
        peak = known if self.peak_tflops is None else self.peak_tflops * 1e12
        self._peak = None if peak is None else peak * trainer.world_size
        if self._peak is not None:
            try:
                self._setting = run_setting(trainer, pl_module, Device(device.name, 0.0, None, None, None))
            except UserError as error:
                self._peak = None
                if trainer.is_global_zero:
                    print(f"Throughput: no utilisation ({error})")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Forget the counts of the iteration before."""
        self._drawn = _counts()

    def on_rollout_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, rollout: Rollout
    ) -> None:
        """Count the responses of a draw."""
        self._drawn = self._drawn.to(rollout.tokens.device) + _counts(rollout)

    def on_advantages(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, experience: Experience
    ) -> None:
        """Count the responses that the update learns from."""
        self._learned = _counts(experience.rollout, experience.rollout.response_mask.any(1))

    def on_update_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, metrics: Mapping[str, float]
    ) -> None:
        """Log the tokens per second and the utilisation of each phase."""
        assert isinstance(pl_module, AlignmentModule)
        counts = torch.stack([self._drawn.to(pl_module.device), self._learned.to(pl_module.device)])
        drawn, learned = pl_module.sum_over_ranks(counts).tolist()
        tokens = {"generate": drawn[2], "judge": drawn[1] + drawn[2], "update": learned[1] + learned[2]}
        seconds = {phase: metrics[f"time/{phase}"] for phase in tokens}
        logged = {f"perf/{phase}_tokens_per_second": tokens[phase] / seconds[phase] for phase in tokens}
        if self._setting is not None and self._peak is not None:
            flops = phase_flops(self._setting, *_means(drawn))
            flops["update"] = (flops if drawn == learned else phase_flops(self._setting, *_means(learned)))["update"]
            logged |= {f"perf/{phase}_utilisation": flops[phase] / (seconds[phase] * self._peak) for phase in flops}
        pl_module.log_dict(logged, batch_size=1)


def _counts(rollout: Rollout | None = None, rows: Tensor | None = None) -> Tensor:
    """Return the number of responses, of the tokens in their prompts, and of the tokens in them, [3] float64.

    Args:
        rollout: The responses, B rows; None for no responses.
        rows: The rows to count, [B] bool; None for all.
    """
    if rollout is None:
        return torch.zeros(3, dtype=torch.float64)
    lengths = torch.stack([torch.ones_like(rollout.prompt_lengths), rollout.prompt_lengths, rollout.response_lengths])
    return (lengths if rows is None else lengths * rows).sum(1, dtype=torch.float64)


def _means(counts: Sequence[float]) -> tuple[int, float, float]:
    """Return the number of responses, and the mean numbers of tokens in their prompts and in them."""
    rows, prompts, responses = counts
    return round(rows), prompts / rows, responses / rows


def phase_flops(setting: Setting, rows: int, prompt_tokens: float, response_tokens: float) -> dict[str, float]:
    """Return the FLOPs of each phase of an iteration over all processes, by the phase's name.

    Args:
        setting: The setting of the run; its lengths and its number of rows are replaced by the other arguments.
        rows: The number of responses.
        prompt_tokens: The mean number of tokens in a prompt, which is rounded here.
        response_tokens: The mean number of tokens in a response, which is rounded here.

    Raises:
        UserError: if a model cannot be run without the values of its tensors.
    """
    prompt, response = max(1, round(prompt_tokens)), max(1, round(response_tokens))
    generation = setting.generation and replace(setting.generation, prompt_tokens=prompt)
    actual = replace(setting, rows=rows, length=prompt + response, scored=response, generation=generation)
    names = {"decode": "generate"}
    return {names.get(part.phase, part.phase): part.flops for part in work(actual)}
