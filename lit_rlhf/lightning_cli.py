"""``fit``, ``validate``, ``test`` and ``predict`` through LightningCLI."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from transformers.utils import logging as transformers_logging

import lit_rlhf.modules  # noqa: F401 (imported, so that short class names resolve)
from lit_rlhf.callbacks import ExportAtEnd, IterationCheckpoint, MetricsFile, Predictions, ProgressBar, Samples
from lit_rlhf.checkpoints import AnyCheckpoint
from lit_rlhf.config_errors import explain
from lit_rlhf.data import Demonstrations, Preferences, Prompts  # noqa: F401
from lit_rlhf.errors import UserError
from lit_rlhf.lost_processes import together

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/default",
    "logger": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the loaders know their rank
    "inference_mode": False,  # inference tensors cannot be trained on later
    "max_epochs": 1,
    "enable_model_summary": False,
}


UNASKED = ("\N{ELECTRIC LIGHT BULB}", "TPU available", "GPU available", "`weights_only` was not set")


class Parser(LightningArgumentParser):
    """Takes no abbreviation, tells a mistake in one line and names the nearest right word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2; the parser of a component passes it on to the one around it."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"lit-rlhf: error: {explain(str(message), self.known_options())}", file=sys.stderr)
        sys.exit(2)

    def known_options(self) -> list[str]:
        """The options of this parser and its commands, without dashes."""
        commands = getattr(self._subcommands_action, "choices", None) or {}
        actions = [action for parser in (self, *commands.values()) for action in parser._actions]
        return list(dict.fromkeys(o[2:] for action in actions for o in action.option_strings if o.startswith("--")))


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run's folder, and the configuration to the loggers."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Only when training: validating a run does not change what it was trained with."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class CLI(LightningCLI):
    """LightningCLI with the run's folder and lit-rlhf's callbacks."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser with one-line errors."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a YAML file; several: the later wins")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The two callbacks that have options."""
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Samples, "samples")

    def before_instantiate_classes(self) -> None:
        """Put W&B's files into the run's folder, and check that the checkpoint to resume from exists."""
        config = self.config[self.subcommand]
        folder = config.trainer.default_root_dir
        for logger in _as_list(config.trainer.logger):
            if getattr(logger, "class_path", "").endswith("WandbLogger") and logger.init_args.get("save_dir") == ".":
                logger.init_args["save_dir"] = str(folder)
                Path(folder).mkdir(parents=True, exist_ok=True)
        _check_checkpoint(config.ckpt_path)

    def before_fit(self) -> None:
        """Move an older run's folder out of the way, unless that run is resumed; LightningCLI calls it.

        By one process only: the Trainer knows its rank however the processes were started.
        """
        folder = Path(self.trainer.default_root_dir)
        if self.config["fit"].ckpt_path is None and self.trainer.is_global_zero:
            move_aside(folder)
            folder.mkdir(parents=True, exist_ok=True)  # W&B writes elsewhere if there is no such folder

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Checkpoints are read as files and as folders; ``--trainer.enable_progress_bar false`` takes the bar out."""
        if self._get(self.config_init, "trainer").enable_progress_bar is False:
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in defaults if not isinstance(c, ProgressBar)]
        plugins = [p for p in _as_list(self._get(self.config_init, "trainer").plugins) if p is not None]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AnyCheckpoint())
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what they refuse is the user's mistake."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, MisconfigurationException) as error:
            raise UserError(explain(str(error))) from error


def run(args: Sequence[str] | None = None) -> None:
    """Run a subcommand of LightningCLI.

    Args:
        args: Its words; None: those of the command line (which child processes of DDP repeat).
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")  # class_path: my_module.MyReward, of the folder one stands in
    check_config_files(list(sys.argv[1:] if args is None else args))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _quieten()
    with together():
        CLI(
            lightning.LightningModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults={
                **TRAINER_DEFAULTS,
                "callbacks": [MetricsFile(), Predictions(), ProgressBar(), ExportAtEnd()],
            },
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lit-rlhf"},
            args=None if args is None else list(args),
        )


def check_config_files(words: Sequence[str]) -> None:
    """Every file that follows ``--config`` is a YAML mapping.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, given, value = word.partition("=")
        if option in ("-c", "--config"):
            _check_config_file(Path(value if given else after))


def _check_config_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"config: there is no file {path}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"config: {path}{line} is no YAML: {error.problem}") from error
    if not isinstance(config, dict):
        what = "is empty" if config is None else f"holds {type(config).__name__}"
        raise UserError(f"config: {path} should be a mapping of options (model: …, data: …), it {what}")


def _check_checkpoint(path: str | None) -> None:
    if path is None or path in ("last", "best", "hpc") or str(path).startswith("registry"):
        return
    if not Path(path).exists():
        raise UserError(f"ckpt_path: there is no checkpoint {path}; it should be a path, last, or best")


def move_aside(folder: Path) -> None:
    """Rename an older run's folder to the first free ``NAME.1``, ``NAME.2``, …: nothing already written is lost."""
    if not (folder / "config.yaml").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"{folder} held an older run; it is now {aside}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _quieten() -> None:
    """Advertisements, and warnings of Lightning that do not apply here."""
    for logger in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{logger}").addFilter(
            lambda record: not record.getMessage().startswith(UNASKED)
        )
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*You are running.*without validation.*",
        ".*module\\(s\\) in eval mode.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*couldn't infer the indices fetched for your dataloader.*",
    ):
        warnings.filterwarnings("ignore", message=message)
