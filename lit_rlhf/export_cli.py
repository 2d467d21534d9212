"""The command ``lit-rlhf export``, which imports heavy libraries only when its options are right."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf export``.

    Args:
        args: The arguments that follow ``lit-rlhf export`` on the command line.

    Raises:
        UserError: if the model cannot be exported, as in `export`.
        SystemExit: if an argument is missing, unknown or wrong, or if it is ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lit-rlhf export", description="Export a model from a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/NAME")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path (default: %(default)s)")
    parser.add_argument(
        "--role",
        choices=("actor", "critic", "reward"),
        default=None,
        help="the model to export (default: reward for reward modelling, actor for other runs)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the folder to write (default: RUN/export or RUN/export_ROLE)"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add the trained adapter to its base, and write a whole model (default folder: RUN/export_merged)",
    )
    parser.add_argument(
        "--towards-start",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="write start + SHARE (actor - start), where the start is the run's reference (default: 1, the actor; "
        "default folder: RUN/export_towards_start_SHARE)",
    )
    parsed = parser.parse_args(args)
    from transformers.utils import logging as transformers_logging

    from lit_rlhf.export import export

    transformers_logging.disable_progress_bar()
    options = parsed.checkpoint, parsed.out, parsed.role, parsed.merge, parsed.towards_start
    print(f"exported: {export(parsed.run, *options)}")
