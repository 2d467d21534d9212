"""The command ``lit-rlhf``.

Heavy libraries are imported only when a command needs them, so that ``lit-rlhf --help`` answers quickly.
"""

import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import NoReturn

from lit_rlhf import __version__
from lit_rlhf.errors import UserError, one_line
from lit_rlhf.files import disk_error

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The names of the environment variable from which torch reads the options of its GPU memory allocator."""

COMMANDS = {
    "quickstart": "quickstart_cli",
    "init": "starter",
    "recipes": "recipes",
    "plan": "plan_cli",
    "report": "report_cli",
    "export": "export_cli",
    "schema": "schema_cli",
}
"""The name of the module that runs each command."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
"""The commands that LightningCLI runs."""

CHECKED = (*LIGHTNING_COMMANDS, "plan")
"""The commands whose options are checked before torch and Lightning are imported."""

HELP = """usage: lit-rlhf COMMAND [options]

Align language models with human preferences by reinforcement learning.

commands:
  quickstart   SFT, a reward model and PPO from scratch, on a small corpus that is included
  init         write a folder to start from: lit-rlhf init my_project
  recipes      list the configurations that come with lit-rlhf; lit-rlhf recipes ppo prints one
  fit          train: lit-rlhf fit --config ppo, or --config FILE.yaml
  plan         say what fit will need: memory, FLOPs, seconds; lit-rlhf plan --config ppo --gpu h100
  report       write a page with the charts and the responses of a run: lit-rlhf report runs/ppo
  validate     evaluate a model on the validation data
  test         evaluate a model on the test data
  predict      write responses as JSONL
  export       write a checkpoint's model as a Hugging Face folder
  schema       print a JSON schema of the configurations, with which editors complete and check them

lit-rlhf COMMAND --help shows a command's options, lit-rlhf fit --model.help PolicyGradient shows those of a model, and
lit-rlhf --version shows the version.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; report a user's mistake in one line, and exit with a non-zero status.

    Args:
        args: The command and its options; None to read the command line.

    Raises:
        SystemExit: if the user made a mistake, or asked only to see a command's help or a configuration.

    >>> main(["--help"])  # doctest: +ELLIPSIS
    usage: lit-rlhf COMMAND [options]
    ...
    """
    words = list(sys.argv[1:] if args is None else args)
    _configure_allocator()
    try:
        _run(words, from_command_line=args is None)
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        if words and words[0] in LIGHTNING_COMMANDS:
            _refuse("the program that reads this output has ended")
        sys.exit(1)
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        failed = disk_error(error)
        if failed is not None:
            file = failed.filename or "a file"
            _refuse(f"{failed.strerror}: {file} could not be written; make room, then resume with --ckpt_path last")
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _refuse(f"there is no {error.filename}: {error.strerror}")
        raise
    finally:
        _end_output()


def _run(words: list[str], from_command_line: bool) -> None:
    """Run the command that the first word names.

    Raises:
        UserError: if there is no such command, or if the command refuses its options.
    """
    command = words[0] if words else "--help"
    if command in CHECKED:
        importlib.import_module("lit_rlhf.early_check").check(words)
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command in ("-V", "--version"):
        print(f"lit-rlhf {__version__}")
    elif command in COMMANDS:
        importlib.import_module(f"lit_rlhf.{COMMANDS[command]}").main(words[1:])
    elif command in LIGHTNING_COMMANDS or command.startswith("-"):
        from lit_rlhf import lightning_cli

        lightning_cli.run(None if from_command_line else words)
    else:
        from lit_rlhf.config_errors import unknown_command

        raise UserError(unknown_command(command, [*LIGHTNING_COMMANDS, *COMMANDS]))


def _output_is_closed() -> bool:
    """Return whether the program that reads the standard output has ended, as ``head`` does after its last line."""
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
    except (TypeError, ValueError, OSError):  # an output without a file
        return False
    return bool(output.poll(0))  # without events to wait for, only errors are reported


def _end_output() -> None:
    """Write what is left of the output, or drop it if nobody reads it any longer; Python would print an error."""
    if sys.stdout is None:  # closed from the beginning
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> NoReturn:
    print(f"lit-rlhf: error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


def _configure_allocator() -> None:
    """Make torch extend its segments of GPU memory, so that tensors of varying sizes fragment the memory less.

    The option ``expandable_segments`` is set in torch's environment variable, unless the user has set this variable
    under any of its names, `ALLOCATOR_VARIABLES`. This function must be called before torch is imported, because torch
    may read the variable during its import. The first two names are set: torch 2.9 ignores the option under the first
    name, and reports the second name as deprecated unless the first is set, too.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        for name in ALLOCATOR_VARIABLES[:2]:
            os.environ[name] = "expandable_segments:True"


if __name__ == "__main__":
    main()
