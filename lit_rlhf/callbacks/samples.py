"""Callbacks that write responses to files: ``samples.jsonl`` in training, ``predictions.jsonl`` in ``predict``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_rlhf.algorithms.kl import k1
from lit_rlhf.algorithms.masked import masked_sum
from lit_rlhf.callbacks.files import LinesFile
from lit_rlhf.modules.decoding import token_texts
from lit_rlhf.modules.hooks import OnPolicyCallback, call_hook
from lit_rlhf.modules.module import AlignmentModule, iteration_of
from lit_rlhf.types import Experience, RewardInputs, ScoredRollout


class Samples(OnPolicyCallback):
    """A callback that writes process 0's first responses of each iteration and of each validation, with their scores.

    Each line has the iteration, the stage (``train`` or ``val``), the prompt, the response, whether a stop token ended
    the response, the score, the rewards, and the KL to the reference in nats. The entry ``tokens`` has the ``text`` of
    each token of the response and, rounded to four decimals, the token's ``kl_to_ref`` (k1). In training, this entry
    also has the token's ``advantage`` as the update uses it and, with a critic, the ``value`` of the text before the
    token. In a validation's line, the entry ``reference`` has the reference's ``response`` to the prompt, and the
    ``score`` of that response. Without a reference, there is neither a KL nor the entry ``reference``. A score or a
    reward is null if the reward failed.

    When a run is resumed, the file is first truncated to the checkpoint's lines. Any callback with a method
    ``on_samples`` gets the same records. In training, only process 0 calls this method; in a validation, every process
    does, with the records of its own responses. `LogDetails` passes the records to the loggers.

    Args:
        count: The maximum number of responses to write per iteration and per validation; process 0's first batch may
            have fewer.
        name: The name of the file in the run's folder.

    Raises:
        ValueError: if ``count`` is negative.

    >>> Samples(count=2).count
    2
    """

    def __init__(self, count: int = 4, name: str = "samples.jsonl") -> None:
        if count < 0:
            raise ValueError(f"samples.count must be 0 or more, not {count}")
        self.count = count
        self.name = name
        self.file: LinesFile | None = None
        self._restored = 0
        self._advantages = torch.zeros(0, 0)  # [count, T], of the current iteration

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the file, and keep only the checkpoint's lines, or no lines if the run is new."""
        self.file = LinesFile(Path(trainer.default_root_dir) / self.name)
        if trainer.is_global_zero:
            self.file.restore(self._restored)

    def on_advantages(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, experience: Experience
    ) -> None:
        """Keep the advantages of the iteration's first responses until they are written."""
        self._advantages = experience.advantages[: self.count]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the iteration's first responses, and pass them to the callbacks with a method ``on_samples``."""
        scored = outputs.get("scored_rollout") if isinstance(outputs, dict) else None
        if not trainer.is_global_zero or not isinstance(scored, ScoredRollout):
            return
        kl = None if scored.ref_logprobs is None else k1(scored.old_logprobs, scored.ref_logprobs)
        records = self._records(
            pl_module,
            "train",
            reward_inputs=scored.reward_inputs,
            scores=scored.scores,
            rewards=scored.rewards,
            kl_to_ref=None if kl is None else masked_sum(kl, scored.rollout.response_mask, 1),
            kl_of_tokens=kl,
            advantage=self._advantages,
            value=scored.values,
        )
        self._write(trainer, records)
        call_hook(pl_module, "on_samples", records)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first responses of the validation, and pass them to the callbacks with a method ``on_samples``."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and batch_idx == 0 and isinstance(outputs, dict) and "reward_inputs" in outputs:
            records = self._records(pl_module, "val", **outputs)
            self._write(trainer, records)
            call_hook(pl_module, "on_samples", records)

    def state_dict(self) -> dict[str, Any]:
        """Return the file's size in bytes."""
        return {"size": self.file.size if self.file else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the size in bytes to which the file is truncated when training starts."""
        self._restored = state_dict["size"]

    def _records(
        self,
        module: lightning.LightningModule,
        stage: str,
        *,
        reward_inputs: RewardInputs,
        scores: Tensor,
        rewards: Mapping[str, Tensor],
        kl_to_ref: Tensor | None = None,
        kl_of_tokens: Tensor | None = None,
        reference: tuple[Sequence[str], Tensor] | None = None,
        **of_tokens: Tensor | None,
    ) -> list[dict[str, Any]]:
        """Return a record for each of the first ``count`` responses of a batch of B responses.

        The keyword arguments ``of_tokens`` are further numbers for each token, [B, T]; None leaves a number out.
        """
        assert isinstance(module, AlignmentModule)
        given = {"kl_to_ref": kl_of_tokens} | of_tokens
        numbers = {name: x for name, x in given.items() if x is not None}
        rollout, records = reward_inputs.rollout, []
        for i in range(min(self.count, len(reward_inputs.responses))):
            start, length = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
            tokens = rollout.tokens[i, start : start + length].tolist()
            record = {
                "iteration": iteration_of(module),
                "stage": stage,
                "prompt": reward_inputs.prompts[i],
                "response": reward_inputs.responses[i],
                "terminated": bool(rollout.terminated[i]),
                "score": _number(scores[i]),
                "rewards": {name: _number(value[i]) for name, value in rewards.items()},
                **({} if kl_to_ref is None else {"kl_to_ref": float(kl_to_ref[i])}),
                "tokens": {"text": token_texts(module.tokenizer, tokens)}
                | {name: [round(value, 4) for value in x[i, :length].tolist()] for name, x in numbers.items()},
            }
            if reference is not None:
                record["reference"] = {"response": reference[0][i], "score": _number(reference[1][i])}
            records.append(record)
        return records

    def _write(self, trainer: lightning.Trainer, records: list[dict[str, Any]]) -> None:
        if trainer.is_global_zero and self.file is not None:
            self.file.append(records)


def _number(value: Tensor) -> float | None:
    """Return a score or a reward, or None if it is NaN, because the reward failed."""
    return None if value.isnan() else float(value)


class Predictions(lightning.Callback):
    """A callback that writes each response of ``predict`` to a file, as one line of JSON.

    Args:
        name: The name of the file in the run's folder.

    >>> Predictions(name="answers.jsonl").name
    'answers.jsonl'
    """

    def __init__(self, name: str = "predictions.jsonl") -> None:
        self.name = name
        self.file: LinesFile | None = None

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the file, and remove the lines of an earlier ``predict``."""
        self.file = LinesFile(Path(trainer.default_root_dir) / self.name)
        if trainer.is_global_zero:
            self.file.restore(0)

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's responses from all processes, in the order of the prompts."""
        shares = [outputs]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, outputs)
        if trainer.is_global_zero and self.file is not None:
            self.file.append([record for share in shares for record in share])

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the file's path."""
        if trainer.is_global_zero and self.file is not None:
            print(f"predictions: {self.file.path}")
