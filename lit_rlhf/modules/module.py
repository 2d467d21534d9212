"""The base class of all modules: the trained model, tokenizer, optimizers, iteration count and held-out metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import lightning
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from lit_rlhf.checkpoints import check_belongs, identity
from lit_rlhf.compat import hide_inapplicable_warnings, strategy_of
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource, load_tokenizer
from lit_rlhf.models.precision import check_precision, store_in_bfloat16
from lit_rlhf.models.quantization import check_package, has_quantized_layers, is_quantized
from lit_rlhf.models.scoring import strip_prefix
from lit_rlhf.models.trained_adapter import TrainedAdapter, weights_of
from lit_rlhf.models.weights import unread_weights
from lit_rlhf.modules.averaging import AveragedWeights
from lit_rlhf.modules.frozen import keep_out_of_checkpoints
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.optimizer_options import OptimizerOptions, make_optimizer, make_scheduler
from lit_rlhf.strategies import FSDP, FSDP2

ModuleType = TypeVar("ModuleType", bound=nn.Module)
OptimizerFactories: TypeAlias = dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]]
"""For each optimizer's name, the functions that make the optimizer and its schedule (None for no schedule)."""


class AlignmentModule(lightning.LightningModule):
    """A LightningModule that trains a model and counts its iterations; each training step is one iteration.

    Args:
        source: The model to train: a folder, a hub id, or a configuration for random weights.
        iterations: The number of iterations; None to leave the limit to the Trainer.
        optimizers: The functions that make the optimizers and their learning-rate schedules, by optimizer name.
        adapter: The options of a low-rank adapter to train instead of the whole model; None to train the whole model.

    Raises:
        UserError: if the model is not named, or if iterations is less than 1.
    """

    role: ClassVar[str] = "actor"
    """The name of the trained model, which is also the name of its option and of the attribute that holds it."""

    batch_type: ClassVar[type]
    """The type of the batches that the module accepts."""

    max_tokens_option: ClassVar[str] = "model.max_tokens"
    """The name of the option that sets ``max_tokens``."""

    shards_actor: ClassVar[bool] = True  # whether a strategy that shards models may shard the actor
    actor: Actor
    max_tokens: int  # the maximum number of tokens in a micro-batch; halved if memory runs out
    iteration: Tensor  # [] int64, saved in the checkpoint

    def __init__(
        self,
        source: ModelSource,
        iterations: int | None,
        optimizers: OptimizerFactories,
        adapter: LoRA | None = None,
    ) -> None:
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
        self.adapter = adapter
        if adapter is not None:
            keep_out_of_checkpoints(self, ())
        self.averaged: AveragedWeights | None = None  # set by configure_model, if the weights are averaged
        self._options: dict[str, OptimizerOptions] = {}  # by the optimizers' names
        self._saved_options: dict[str, Any] = {}  # those of the checkpoint
        self.metrics = Metrics(self.device)  # of the current iteration
        self.held_out = Metrics(self.device)  # of the current validation or test
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the trained model.

        Raises:
            UserError: if the tokenizer cannot be loaded, or has no end-of-sequence token.
        """
        return load_tokenizer(self.source, f"model.{self.role}")

    @property
    def is_configured(self) -> bool:
        """Whether the models are loaded, so that later calls to ``configure_model`` have nothing to do."""
        return hasattr(self, self.role)

    def setup(self, stage: str) -> None:
        """Check the settings before the models are loaded; Lightning calls this method at the start of every run.

        The method also hides Lightning's warnings that do not apply to these modules.

        Raises:
            UserError: if ``trainer.precision`` is not supported, if an adapter is to be trained with FSDP1, or if the
                package that quantizes the base is missing.
        """
        hide_inapplicable_warnings()
        check_precision(self.trainer.precision)
        if self.adapter is not None and isinstance(self.trainer.strategy, FSDP):
            raise UserError("trainer.strategy: fsdp cannot train an adapter (model.adapter); use fsdp2")
        if self.adapter is not None and self.adapter.quantization is not None:
            check_package(self.adapter.quantization)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The names of the tensors that DDP does not send to the other processes.

        These are quantized weights, which DDP cannot send, and averaged weights, which are the same on all processes.
        DDP reads their names from an attribute with the name of this property.
        """
        averaged = [name for name, _ in self.named_buffers() if name.startswith("averaged.")]
        return averaged + [f"{name}.weight" for name, layer in self.named_modules() if is_quantized(layer)]

    def with_averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the trained model has its averaged weights; without averaging, nothing changes."""
        return nullcontext() if self.averaged is None else self.averaged.in_use()

    def prepare_export(self) -> bool:
        """Measure what the exported model still needs besides its weights; return whether that was anything."""
        return False

    def trained_model(self, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the trained model as transformers saves it, and the weights to save.

        Args:
            weights: The full ``state_dict`` of the trained model.
        """
        return self.actor.model, strip_prefix("model.", weights)

    def trained_adapter(self, weights: dict[str, Tensor]) -> TrainedAdapter:
        """Return the trained adapter for export.

        Args:
            weights: The trained part of the full ``state_dict`` of the trained model.
        """
        assert self.adapter is not None
        own = weights_of(strip_prefix("model.", weights), "actor")
        return TrainedAdapter(source=str(self.source), lora=self.adapter, name="actor", weights=own)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the models in it stay in eval mode, because dropout is off in every stage."""
        super().train(mode)
        for child in self.children():
            child.eval()
        return self

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters, keyed by the name of their optimizer."""
        (name,) = self.optimizer_factories
        return {name: list(getattr(self, self.role).own_parameters().values())}

    def configure_optimizers(self) -> Any:
        """Return an optimizer for each entry of ``trained_parameters``, with the optimizer's schedule if it has one.

        Raises:
            UserError: if an optimizer or a schedule cannot be made, or cannot be used.
        """
        configured = []
        for name, parameters in self.trained_parameters().items():
            make, schedule = self.optimizer_factories[name]
            optimizer = make_optimizer(make, parameters, name)
            entry: dict[str, Any] = {"optimizer": optimizer}
            scheduler = None if schedule is None else make_scheduler(schedule, optimizer, name, self.iterations)
            if scheduler is not None:
                entry["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}
            self._options[name] = OptimizerOptions(optimizer, scheduler)
            configured.append(entry)
        return configured

    @cached_property
    def _optimizer_names(self) -> tuple[str, ...]:  # to find the parameters in every step would take time
        return tuple(self.trained_parameters())

    def optimizers_by_name(self) -> dict[str, Any]:
        """Return the optimizers, keyed by the names that ``trained_parameters`` uses."""
        found: Any = self.optimizers()
        return dict(zip(self._optimizer_names, found if isinstance(found, list) else [found], strict=True))

    def step_schedulers(self) -> None:
        """Step all learning-rate schedules; with manual optimization, Lightning leaves this to the module."""
        for name, options in self._options.items():
            options.step_scheduler(name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the checkpoint belongs to, and the options with which the optimizers and schedules were made."""
        checkpoint["lit_rlhf"] = identity(self)
        checkpoint["optimizer_options"] = {name: options.state() for name, options in self._options.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this module; keep the options of its optimizers for ``on_train_start``.

        Raises:
            UserError: if it belongs to another module, or to models with other shapes.
        """
        weights = checkpoint.get("state_dict", {})  # the strategy has already loaded those of a folder
        if weights and not isinstance(self.trainer.strategy, FSDP):  # whose shards here are not named and shaped so
            shapes = {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)}
            check_belongs(self, checkpoint, shapes, self.trainer.ckpt_path)
        self._saved_options = checkpoint.get("optimizer_options", {})

    def on_train_start(self) -> None:
        """Use this run's options of the optimizers if the run is resumed, and end it if its checkpoint is the last.

        Raises:
            UserError: if an optimizer is of another class than the checkpoint's.
        """
        if self.trainer.ckpt_path is None:
            return
        for name in self._options.keys() & self._saved_options.keys():
            self._options[name].use(self._saved_options[name], name, int(self.iteration))
        if self.iterations is not None and int(self.iteration) >= self.iterations:
            self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        """Remove the limit on epochs if ``iterations`` is set."""
        if self.iterations is not None:
            self.trainer.fit_loop.max_epochs = -1

    def log_iteration(self, metrics: dict[str, float], shown: tuple[str, ...]) -> None:
        """Log the metrics of an iteration; the metrics named in ``shown`` also appear on the progress bar."""
        self.log_dict({name: value for name, value in metrics.items() if name not in shown}, batch_size=1)
        self.log_dict({name: metrics[name] for name in shown}, prog_bar=True, batch_size=1)
        self.log_step()

    def log_step(self) -> None:
        """Make the loggers use the iteration as the step; Lightning's own step would be the number of batches."""
        if self.trainer.loggers:  # Lightning takes the metric of this name for the step, and does not log it
            self.log("step", float(self.iteration), batch_size=1)

    def count_iteration(self) -> None:
        """Count an iteration, update any averaged weights, and stop the Trainer if this was the last iteration.

        Each ``training_step`` calls this method, so that the checkpoint of the iteration holds the new state.
        """
        self.iteration += 1
        if self.averaged is not None:
            self.averaged.update()
        if self.iterations is not None and int(self.iteration) >= self.iterations:
            self.trainer.should_stop = True

    def check_batch(self, batch: Any) -> None:
        """Check that a batch does not come from a data module for another kind of training.

        Raises:
            UserError: if the batch has the wrong type; the message names both types.
        """
        if not isinstance(batch, self.batch_type):
            given, expected = type(batch).__name__, self.batch_type.__name__
            raise UserError(f"data: {type(self).__name__} takes {expected}es, but this data module gives {given}es")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the batch with `check_batch`, which raises a `UserError` if the batch cannot be used."""
        self.check_batch(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the batch with `check_batch`, which raises a `UserError` if the batch cannot be used."""
        self.check_batch(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the batch with `check_batch`, which raises a `UserError` if the batch cannot be used."""
        self.check_batch(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Refuse to predict; on-policy modules override this method.

        Raises:
            UserError: always.
        """
        raise UserError(f"{type(self).__name__} predicts nothing: use PolicyGradient with the exported model's folder")

    def is_last_step(self) -> bool:
        """Return whether the limits on iterations, steps and epochs make the current training step the last one."""
        trainer = self.trainer
        if trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            return True
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs  # -1 for no limit
        return trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1

    def on_validation_epoch_start(self) -> None:
        """Reset the held-out metrics."""
        self.held_out.clear(self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the held-out metrics."""
        self.held_out.clear(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out metrics with the prefix ``val/``."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the held-out metrics with the prefix ``test/``."""
        self._log_held_out("test")

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the held-out metrics to log: the means, and the numbers that derived classes compute from them."""
        return means

    def _log_held_out(self, stage: str) -> None:
        for name, value in self.summary(self.held_out.compute()).items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "score"))
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log_step()

    def place(self, build: Callable[[], ModuleType], sharded: bool = True) -> ModuleType:
        """Build a model, shard it as the strategy requires, and return it on this process's device.

        A model that is sharded or goes to a GPU is never held whole in host memory: each process reads only its own
        part of the model from the files. There are two exceptions, in which each process loads the whole model first:
        FSDP1, and weights that cannot be read later (see `unread_weights`). Each process places its models one after
        the other, so it holds at most one such whole model at a time.

        Args:
            build: A function that loads the model with `load_model`.
            sharded: Whether a strategy that shards models may shard this one.

        Raises:
            UserError: if the model cannot be loaded, or the strategy cannot be used (see `shard`).
        """
        strategy = strategy_of(self)
        shard: Callable[[Any], Any] = self.shard if sharded else lambda model: model
        if strategy is None or isinstance(strategy, FSDP):
            return shard(build())
        device = torch.device("cpu") if isinstance(strategy, FSDP2) and strategy.cpu_offload else strategy.root_device
        if device.type == "cpu" and not isinstance(strategy, FSDP2):
            return shard(build())
        with unread_weights() as unread:
            model = build()
        model = shard(model)
        unread.read(model, device)
        return model

    def shard(self, model: nn.Module) -> Any:
        """Return a model sharded as the strategy requires, or unsharded if the strategy does not shard models.

        With ``bf16-mixed``, frozen weights are stored in bfloat16 where this does not change the model's output.

        Raises:
            UserError: if a strategy that shards models is not supported, is used with inference mode, or would have to
                shard quantized weights.
        """
        strategy = strategy_of(self)
        if strategy is not None and strategy.precision_plugin.precision == "bf16-mixed":
            store_in_bfloat16(model, all_weights=isinstance(strategy, FSDP2 | FSDP))
        if isinstance(strategy, FSDP2 | FSDP):
            if self.trainer.validate_loop.inference_mode:  # tensors made in inference mode cannot be trained later
                raise UserError("trainer.inference_mode must be false with a strategy that shards models, not true")
            if has_quantized_layers(model):
                raise UserError("trainer.strategy must be ddp for quantized weights, which FSDP cannot shard")
            return strategy.shard(model)
        if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(f"trainer.strategy: {type(strategy).__name__} is not supported; use fsdp2")
        return model

    def profile(self, phase: str) -> AbstractContextManager[Any]:
        """Return a context in which the Trainer's profiler measures a phase under the given name."""
        return cast(Any, self.trainer).profiler.profile(phase)

    def on_rank(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return self.trainer.global_rank, self.trainer.world_size

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Return the sum over all processes of ``x``, which has the same shape on each; ``x`` may be overwritten."""
        return self.trainer.strategy.reduce(x, reduce_op="sum") if self.trainer.world_size > 1 else x

    def max_over_ranks(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over all processes."""
        x = torch.tensor(numbers, device=self.device)
        return (self.trainer.strategy.reduce(x, reduce_op="max") if self.trainer.world_size > 1 else x).tolist()


def iteration_of(module: lightning.LightningModule) -> int:
    """Return the number of iterations that a module has done; for callbacks, which receive a LightningModule."""
    assert isinstance(module, AlignmentModule)
    return int(module.iteration)
