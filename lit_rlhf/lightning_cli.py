"""The commands ``fit``, ``validate``, ``test`` and ``predict``, built on LightningCLI."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import lightning
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils import logging as transformers_logging

import lit_rlhf.algorithms.group_baselines
import lit_rlhf.algorithms.off_policy_objectives
import lit_rlhf.algorithms.vtrace
import lit_rlhf.modules  # noqa: F401 (imported so that short class names resolve)
from lit_rlhf import compat, recipes
from lit_rlhf.callbacks import IterationCheckpoint, ProgressBar
from lit_rlhf.callbacks.defaults import UNNAMED, WITH_OPTIONS
from lit_rlhf.callbacks.logged_rows import keep_csv
from lit_rlhf.callbacks.logged_runs import LOGGED, continued
from lit_rlhf.callbacks.older_run import OlderRun
from lit_rlhf.callbacks.run_lock import RunLock
from lit_rlhf.checkpoints import numbered
from lit_rlhf.command_words import check_config_files, chosen_class, help_words
from lit_rlhf.components import class_names
from lit_rlhf.config_changes import SaveConfig
from lit_rlhf.config_comments import with_comments
from lit_rlhf.config_errors import chosen_options, explain, missing_options
from lit_rlhf.data import Demonstrations, Preferences, Prompts  # noqa: F401
from lit_rlhf.early_check import store, stored
from lit_rlhf.errors import UserError, one_line
from lit_rlhf.lost_processes import exit_with_peers
from lit_rlhf.models.precision import check_precision
from lit_rlhf.schema import config_schema
from lit_rlhf.trainer_options import (
    check_automatic_options,
    check_intervals,
    check_numbers,
    check_predict,
    folder_of_run,
    refusals_as_user_errors,
)

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/default",
    "logger": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the data loaders take this rank's share themselves
    "inference_mode": False,  # inference tensors cannot be trained on later
    "max_epochs": 1,
    "enable_model_summary": False,
}


PRINT_COMMENTS = "--print_config=comments"
"""The option that prints the configuration with the description of each option as a comment."""


class Parser(LightningArgumentParser):
    """A parser that accepts no abbreviations, and reports a mistake in one line, with the closest valid name if any."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.option_groups: dict[str, tuple[type, bool]] = {}
        """The class of each top-level option, and whether the option chooses one of the class's subclasses."""
        self.words: Sequence[str] = ()
        """The words of the command line."""

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Add the options of a class, and store the class in ``option_groups``."""
        self.option_groups[nested_key] = (lightning_class, subclass_mode)
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain the message in one line and exit with status 2; in a nested parser, raise an error instead."""
        if not self.exit_on_error:
            super().error(message, ex)
        known = compat.option_names(self)
        for group, base in (("model", lightning.LightningModule), ("data", lightning.LightningDataModule)):
            known += chosen_options(base, group, chosen_class(self.words, group))
        print(f"lit-rlhf: error: {one_line(explain(str(message), known, self.words))}", file=sys.stderr)
        sys.exit(2)


class ConfigFile(ActionConfigFile):
    """The option ``--config``, which takes a path or the name of a recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file or the recipe that the option names."""
        super().__call__(parser, cfg, str(recipes.find(values)), option_string)


class CLI(LightningCLI):
    """LightningCLI with a folder for each run and with lit-rlhf's callbacks.

    For example, to start a run, and to resume it later::

        lit-rlhf fit --config ppo --trainer.default_root_dir runs/ppo --checkpoint.every_n 20
        lit-rlhf fit --config runs/ppo/config.yaml --ckpt_path last
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self.words: list[str] = list(sys.argv[1:] if given is None else given)
        self.checkpoint: str | None = None  # the option ckpt_path
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the given subcommand, or all subcommands if none is given, with the arguments that each skips.

        The other subcommands are left out because adding the options of each takes a third of a second.
        """
        commands = LightningCLI.subcommands()
        return {name: skipped for name, skipped in commands.items() if [name] == self.words[:1]} or commands

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a `Parser` with the option ``--config``."""
        self.command_parser = parser = Parser(**kwargs)  # the last one made is a subcommand's; all have the same groups
        parser.words = self.words
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="a YAML file or recipe; if there are several, later ones take precedence",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and print the configuration with comments if ``--print_config=comments`` is given."""
        if type(self) is CLI and stored() is None:
            store(config_schema(self.command_parser.option_groups), class_names())
        if PRINT_COMMENTS not in self.words:
            super().parse_arguments(parser, args)
            self._check_groups()
            command = self.config.get("subcommand")
            if command and self.config[command].get("ckpt_path"):  # LightningCLI would read the whole file
                self.checkpoint, self.config[command].ckpt_path = self.config[command].ckpt_path, None
            return
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                super().parse_arguments(
                    parser, ["--print_config" if word == PRINT_COMMENTS else word for word in self.words]
                )
        except SystemExit as end:
            if end.code:
                raise
        print(with_comments(yaml.safe_load(printed.getvalue()), config_schema(self.command_parser.option_groups)))
        sys.exit()

    def _check_groups(self) -> None:
        """Check that each group of options, such as ``trainer`` or ``model.sampling``, is a mapping, as it must be.

        Raises:
            UserError: if a group is not.
        """
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        for name, (_, is_choice) in self.command_parser.option_groups.items():
            if not is_choice and name in config and not isinstance(config[name], Namespace):
                raise UserError(f"{name} should be a mapping of options, not {config[name]!r}")
            chosen = config.get(name) if is_choice else None
            if chosen and (mistake := missing_options(name, chosen.class_path, vars(chosen.get("init_args", {})))):
                raise UserError(mistake)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run uses, with their options."""
        for name, callback in WITH_OPTIONS.items():
            parser.add_lightning_class_args(callback, name)
        compat.prefer_integers(parser)

    def before_instantiate_classes(self) -> None:
        """Place W&B's files in the run's folder, and check that the checkpoint named by ``--ckpt_path`` exists.

        With ``fit --ckpt_path last``, a run that has no checkpoint yet starts anew, so that one command can start and
        resume a run.

        Raises:
            UserError: if the checkpoint does not exist, unless it is ``last`` and the command is ``fit``; or if a
                number cannot be used.
        """
        config = self.config[self.subcommand]
        config.ckpt_path = self.checkpoint or config.ckpt_path
        if config.get("weights_only") is False:
            raise UserError("weights_only must be true or null, because a checkpoint could otherwise execute code")
        check_numbers(config)
        check_intervals(config.trainer.check_val_every_n_epoch, config.trainer.val_check_interval)
        folder = config.trainer.default_root_dir
        for logger in _one_or_more(config.trainer.logger):
            if getattr(logger, "class_path", "").endswith("WandbLogger") and logger.init_args.get("save_dir") == ".":
                logger.init_args["save_dir"] = str(folder)
                Path(folder).mkdir(parents=True, exist_ok=True)
        checkpoints = Path(config.checkpoint.dirpath or Path(folder, "checkpoints"))
        if self.subcommand == "fit" and config.ckpt_path == "last" and not (checkpoints / "last.ckpt").exists():
            found = numbered(checkpoints)  # killed after its first checkpoint, before last.ckpt named it
            then = f"the run resumes from {found[max(found)].name}" if found else "the run starts anew"
            rank_zero_only(print)(f"ckpt_path: there is no last.ckpt in {checkpoints}, so {then}")
            config.ckpt_path = str(found[max(found)]) if found else None
        _check_checkpoint(config.ckpt_path, checkpoints)

    def before_fit(self) -> None:
        """Check the Trainer's options and callbacks, lock the folder, and rename it if an older run is not resumed.

        LightningCLI calls this method. Only process 0 locks and renames the folder; the Trainer knows which process
        this is, however the processes were started.

        Raises:
            UserError: if an option or a callback works only in automatic optimization, if another run is training in
                the folder, or if the folder cannot be written.
        """
        check_automatic_options(self.trainer, self.model)
        if not self.trainer.is_global_zero:
            return
        folder, callbacks = Path(self.trainer.default_root_dir), self.trainer.callbacks  # type: ignore[attr-defined]
        lock = next(callback for callback in callbacks if isinstance(callback, RunLock))
        with folder_of_run(folder):
            lock.take(folder)
            if self.config["fit"].ckpt_path is None:
                next(callback for callback in callbacks if isinstance(callback, OlderRun)).move_aside(folder)
                lock.take(folder)  # in the new folder; W&B would write elsewhere if it did not exist
        if self.config["fit"].ckpt_path is not None:
            keep_csv(self.trainer.loggers)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Return a Trainer, with a progress bar unless it is disabled.

        The default precision depends on the device. It is stored in the configuration, so that a run that is resumed on
        another device keeps its precision. On GPUs, products of float32 matrices use TensorFloat-32, unless the user's
        own code has set the precision of these products.

        Raises:
            UserError: if the precision is not supported.
        """
        options = self.config_init[self.subcommand].trainer
        if options.enable_progress_bar is False:
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in defaults if not isinstance(c, ProgressBar)]
        on_gpus = _uses_gpus(options.accelerator)
        if on_gpus and torch.backends.cuda.matmul.fp32_precision == "none":  # not set by the user's own modules
            torch.set_float32_matmul_precision("high")
        if options.precision is None and not any(isinstance(x, Precision) for x in _one_or_more(options.plugins)):
            half = on_gpus and torch.cuda.is_bf16_supported(including_emulation=False)
            options.precision = "bf16-mixed" if half else "32-true"
            self.config[self.subcommand].trainer.precision = options.precision
        if options.precision is not None:
            check_precision(options.precision)
        trainer: lightning.Trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:  # otherwise, Lightning looks for "last" in a logger's folder
            if isinstance(callback, IterationCheckpoint):
                callback.dirpath = callback.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        return trainer

    def _logged_runs(self) -> AbstractContextManager[None]:
        """Return a context in which the loggers that a resumed run makes continue its earlier logs."""
        if self.subcommand != "fit" or self.config["fit"].ckpt_path is None:
            return nullcontext()
        trainer = self.config["fit"].trainer
        return continued(Path(trainer.default_root_dir) / LOGGED, _one_or_more(trainer.logger))

    def instantiate_classes(self) -> None:
        """Construct the model, the data module and the Trainer.

        Raises:
            UserError: if one of the three refuses a value, if the precision is not supported, or if ``predict`` is
                called for a model that cannot predict.
        """
        try:
            with self._logged_runs():
                super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(explain(str(error))) from error
        if self.subcommand == "predict":
            check_predict(self.model)


def run(args: Sequence[str] | None = None, cli: type[CLI] = CLI, prog: str = "lit-rlhf") -> None:
    """Run a subcommand of LightningCLI.

    Args:
        args: The subcommand and its options; None to read the command line. Use None under DDP, whose child processes
            always read the command line.
        cli: The class that parses the arguments and does the work.
        prog: The command, for messages.

    Raises:
        UserError: if the user made a mistake, such as naming a configuration file or a checkpoint that does not exist,
            or giving a value that a class refuses; or if another process of the run has ended.
        SystemExit: if an option does not exist, if a value has the wrong type, or if the command line asks only for
            help or for the configuration.
    """
    # so that class_path finds my_module.MyReward in this folder; "" would stand for the folder of a configuration file
    # while jsonargparse reads the file, because it changes to that folder
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = list(sys.argv[1:] if args is None else args)
    check_config_files(given)
    words = help_words(given)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _quieten()
    with exit_with_peers(), refusals_as_user_errors():
        cli(
            lightning.LightningModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults={
                **TRAINER_DEFAULTS,
                "callbacks": [OlderRun(), *(callback() for callback in UNNAMED)],
            },
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": prog},
            args=None if args is None and words == given else words,
        )


def _check_checkpoint(path: str | None, folder: Path) -> None:
    """Check that the checkpoint named by ``--ckpt_path`` exists; ``last`` and ``best`` are looked for in ``folder``.

    Raises:
        UserError: if the checkpoint does not exist.
    """
    if path is None or path == "hpc" or str(path).startswith("registry"):
        return
    if path in ("last", "best"):
        if not (folder / f"{path}.ckpt").exists():
            raise UserError(f"ckpt_path: there is no {path}.ckpt in {folder}")
    elif not Path(path).exists():
        raise UserError(f"ckpt_path: there is no checkpoint {path}; it should be a path, last, or best")


def _uses_gpus(accelerator: Any) -> bool:
    """Return whether the Trainer will use CUDA GPUs, given the option ``trainer.accelerator``."""
    chosen = accelerator in ("auto", "gpu", "cuda") or isinstance(accelerator, CUDAAccelerator)
    return chosen and torch.cuda.is_available()


def _one_or_more(value: Any) -> list[Any]:
    """Return a list of the values of an option that takes either one value or a list."""
    return value if isinstance(value, list) else [value]


def _quieten() -> None:
    """Hide Lightning's advertisements, and libraries' warnings that do not apply to lit-rlhf."""
    for logger in compat.ADVERTISING_LOGGERS:
        logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(compat.ADVERTISEMENTS))
    compat.hide_inapplicable_warnings()
    warnings.filterwarnings("ignore", message=compat.LEAF_SPEC_WARNING)
