"""What all modules share: a model to train, its tokenizer, a count of iterations, and means over held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, cast

import lightning
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource, load_tokenizer
from lit_rlhf.models.scoring import under
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.update import clip_gradients
from lit_rlhf.strategies import FSDP, FSDP2

OptimizerFactories: TypeAlias = dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]]
"""By name, what makes an optimizer from parameters, and a learning-rate schedule from an optimizer."""


class AlignmentModule(lightning.LightningModule):
    """A LightningModule that trains one model, and counts its iterations, one a training step.

    Args:
        source: The model to train: a folder or hub id, or a configuration for random weights.
        iterations: Stop after so many; None: the Trainer's limits decide.

    Raises:
        UserError: if the model is not named.
    """

    role: ClassVar[str] = "actor"
    """The trained model's name: of the module's attribute, from configure_model on, and of its option."""

    batch_type: ClassVar[type]
    """What it learns from."""

    actor: Actor
    iteration: Tensor  # [], int64, in the checkpoint

    def __init__(self, source: ModelSource, iterations: int | None, optimizers: OptimizerFactories) -> None:
        super().__init__()
        if not source:
            raise UserError(
                f"model.{self.role} is not set: a model folder, a hub id, or a configuration for random weights"
            )
        if iterations is not None and iterations < 1:
            raise UserError(f"model.iterations must be 1 or more, or null, not {iterations}")
        self.source = source
        self.iterations = iterations
        self.optimizer_factories = optimizers
        self.held_out = Metrics(self.device)  # of the validation or test under way
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The trained model's."""
        return load_tokenizer(self.source, f"model.{self.role}")

    @property
    def is_configured(self) -> bool:
        """Whether the models are loaded; Lightning calls ``configure_model`` more than once."""
        return self.role in self._modules

    def trained_model(self, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """What a run is for, as transformers saves it: a model, and the weights to save.

        Args:
            weights: The trained model's whole ``state_dict``.
        """
        return self.actor.model, under("model.", weights)

    def train(self, mode: bool = True) -> Self:
        """Set this module's mode, but the models stay in eval mode: dropout is off in every stage."""
        super().train(mode)
        for child in self.children():
            child.eval()
        return self

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by the names of their optimizers."""
        (name,) = self.optimizer_factories
        return {name: list(self.get_submodule(self.role).parameters())}

    def configure_optimizers(self) -> Any:
        """Return an optimizer for each entry of ``trained``, with its learning-rate schedule if there is one."""
        configured = []
        for name, parameters in self.trained().items():
            make_optimizer, make_scheduler = self.optimizer_factories[name]
            entry: dict[str, Any] = {"optimizer": make_optimizer(parameters)}
            if make_scheduler is not None:
                entry["lr_scheduler"] = {"scheduler": make_scheduler(entry["optimizer"]), "interval": "step"}
            configured.append(entry)
        return configured

    def optimizers_by_name(self) -> dict[str, Any]:
        """Return the optimizers under the names of ``trained``."""
        optimizers: Any = self.optimizers()
        return dict(zip(self.trained(), optimizers if isinstance(optimizers, list) else [optimizers], strict=True))

    def step_schedulers(self) -> None:
        """Step all learning-rate schedules; manual optimization leaves that to the module."""
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()

    def on_fit_start(self) -> None:
        """With ``iterations`` set, epochs do not limit the run."""
        if self.iterations is not None:
            self.trainer.fit_loop.max_epochs = -1

    def log_iteration(self, metrics: dict[str, float], shown: tuple[str, ...]) -> None:
        """Log an iteration's metrics, some of them on the progress bar."""
        self.log_dict({name: value for name, value in metrics.items() if name not in shown}, batch_size=1)
        self.log_dict({name: metrics[name] for name in shown}, prog_bar=True, batch_size=1)

    def count_iteration(self) -> None:
        """One more; inside ``training_step``, so that it is in this iteration's checkpoint."""
        self.iteration += 1
        if self.iterations is not None and int(self.iteration) >= self.iterations:
            self.trainer.should_stop = True

    def check_batch(self, batch: Any) -> None:
        """Refuse the batches of a data module that is another's.

        Raises:
            UserError: naming the two.
        """
        if not isinstance(batch, self.batch_type):
            made, takes = type(batch).__name__, self.batch_type.__name__
            raise UserError(f"data: {type(self).__name__} takes {takes}es, this data module gives {made}es")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """See that the data are this module's."""
        self.check_batch(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See that the data are this module's."""
        self.check_batch(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See that the data are this module's."""
        self.check_batch(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Nothing, unless a module says otherwise.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self).__name__} predicts nothing: take PolicyGradient with the exported model's folder")

    def is_last_step(self) -> bool:
        """Whether the training step under way is the run's last, as far as iterations, steps and epochs decide."""
        trainer, loop = self.trainer, self.trainer.fit_loop
        if trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            return True
        last_epoch = (
            loop.max_epochs is not None and loop.max_epochs != -1 and trainer.current_epoch + 1 >= loop.max_epochs
        )
        return trainer.is_last_batch and last_epoch

    def on_validation_epoch_start(self) -> None:
        """Start the means."""
        self.held_out = Metrics(self.device)

    def on_test_epoch_start(self) -> None:
        """Start the means."""
        self.held_out = Metrics(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._log_held_out("test")

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the held-out means."""
        return means

    def _log_held_out(self, stage: str) -> None:
        for name, value in self.summary(self.held_out.compute()).items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "score"))

    def shard(self, model: nn.Module) -> Any:
        """The model as the strategy wants it: spread over the processes, or as it is.

        Raises:
            UserError: for a strategy that would have to know how, and does not, and in inference mode.
        """
        strategy = None if self._trainer is None else self._trainer.strategy
        if isinstance(strategy, FSDP2 | FSDP):
            if self.trainer.validate_loop.inference_mode:  # it leaves tensors that cannot be trained on later
                raise UserError("trainer.inference_mode must be false where models are sharded, not true")
            return strategy.shard(model)
        if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(f"trainer.strategy: {type(strategy).__name__} shards nothing here; take fsdp2")
        return model

    def profile(self, phase: str) -> AbstractContextManager[Any]:
        """Measure a phase under its name in ``--trainer.profiler``."""
        return cast(Any, self.trainer).profiler.profile(phase)

    def on_rank(self) -> tuple[int, int]:
        """This process, and how many there are."""
        return self.trainer.global_rank, self.trainer.world_size

    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Under DDP gradients go over the ranks with the last micro-batch, under sharding with each."""
        blocked = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return nullcontext() if last else blocked()

    def clip(self, optimizer: Any, max_norm: float | None) -> Tensor:
        """Clip the gradient norm of an optimizer's parameters, over all ranks, and return what it was, []."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        spread = isinstance(self.trainer.strategy, FSDP)
        return clip_gradients(parameters, max_norm, self.sum_over_ranks if spread else None)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.trainer.strategy.reduce(x, reduce_op="sum") if self.trainer.world_size > 1 else x

    def max_over_ranks(self, *numbers: int) -> list[int]:
        """The largest over all processes, of each."""
        x = torch.tensor(numbers, device=self.device)
        return (self.trainer.strategy.reduce(x, reduce_op="max") if self.trainer.world_size > 1 else x).tolist()


def iteration_of(module: lightning.LightningModule) -> int:
    """How many iterations a module has done; for callbacks, which know it as a LightningModule."""
    assert isinstance(module, AlignmentModule)
    return int(module.iteration)


def keep_out_of_checkpoints(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Leave frozen models out of ``state_dict()``, and do not expect them in ``load_state_dict``.

    The hooks are on the module itself, because every path to a checkpoint (a file, a distributed folder) calls them.

    Args:
        module: The LightningModule.
        prefixes: The names of the frozen submodules, each with a dot at its end.
    """

    def drop(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
        for key in [k for k in state if k.startswith(tuple(prefix + p for p in prefixes))]:
            del state[key]

    def ignore_missing(owner: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(prefixes)]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(ignore_missing)
