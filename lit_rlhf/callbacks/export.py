"""A callback that writes the trained model or adapter as a Hugging Face folder at the end of training."""

from pathlib import Path

import lightning

from lit_rlhf.export import model_card, save_folder
from lit_rlhf.models.adapter_folders import base_of
from lit_rlhf.models.sharding import full_state_dict
from lit_rlhf.modules.incidents import check_weights
from lit_rlhf.modules.module import AlignmentModule


class ExportAtEnd(lightning.Callback):
    """A callback that writes the trained model or adapter to ``export/`` in the run's folder, in Hugging Face's format.

    Transformers and vLLM can load the folder, which gets its name when it is complete. A finished run that is resumed
    writes the folder again. If the weights are averaged, the average is written (see `Averaging`).

    Args:
        name: The name of the folder to write, inside the run's folder.

    >>> ExportAtEnd(name="model").name
    'model'
    """

    def __init__(self, name: str = "export") -> None:
        self.name = name
        self._is_written = False

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the folder from process 0; the other processes contribute their shards.

        Raises:
            UserError: if a trained weight is not finite; the folder is then not written.
        """
        assert isinstance(pl_module, AlignmentModule)
        check_weights(pl_module)
        pl_module.prepare_export()
        self._is_written = True
        with pl_module.with_averaged_weights():
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the folder if Lightning has left out the training of a finished run, with the hook at its end."""
        if not self._is_written and trainer.ckpt_path is not None:
            self.on_train_end(trainer, pl_module)

    def _export(self, trainer: lightning.Trainer, pl_module: AlignmentModule) -> None:
        adapter = pl_module.adapter
        weights = full_state_dict(pl_module.get_submodule(pl_module.role), trained_only=adapter is not None)
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        base = None if adapter is None else base_of(str(pl_module.source))
        card = model_card(run, pl_module.role, int(pl_module.iteration), base)
        if adapter is not None:
            pl_module.trained_adapter(weights).save(pl_module.tokenizer, run / self.name, card)
            return
        model, weights = pl_module.trained_model(weights)
        save_folder(model, pl_module.tokenizer, run / self.name, card, weights)
