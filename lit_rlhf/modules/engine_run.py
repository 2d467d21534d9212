"""The callback that starts the engine of a run, and closes it at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import lightning

from lit_rlhf.generation import Engine
from lit_rlhf.generation.engine import EngineContext
from lit_rlhf.models.actor import Actor
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.strategies import FSDP, FSDP2


class EngineRun(lightning.Callback):
    """Starts an engine at the beginning of a run, and closes it at the end, also if an error ends the run.

    Args:
        engine: The engine that generates the responses.
        load_actor: A picklable function that loads a copy of the run's actor with the initial weights.
    """

    def __init__(self, engine: Engine, load_actor: Callable[[], Actor]) -> None:
        self.engine = engine
        self.load_actor = load_actor

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Start the engine."""
        module = cast(AlignmentModule, pl_module)
        context = EngineContext(
            load_actor=self.load_actor,
            tokenizer=module.tokenizer,
            adapter=module.adapter,
            source=str(module.source),
            device=module.device,
            device_ids=tuple(trainer.device_ids),
            process=trainer.local_rank,
            precision=str(trainer.precision),
            rounds_all_weights=isinstance(trainer.strategy, FSDP2 | FSDP) and module.shards_actor,
        )
        self.engine.start(context)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the engine at the end of a run."""
        self.engine.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the engine when an error or Ctrl-C ends the run."""
        self.engine.close()
