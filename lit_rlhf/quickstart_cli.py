"""The command ``lit-rlhf quickstart``, which imports heavy libraries only when its options are right."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_rlhf.errors import UserError


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf quickstart``.

    Args:
        args: The arguments that follow ``lit-rlhf quickstart`` on the command line.

    Raises:
        UserError: if a stage would have no iterations, or if ``lit-rlhf fit`` fails in one of the stages.
        SystemExit: if an argument is unknown or wrong, or if it is ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lit-rlhf quickstart",
        description="Train a language model of a million parameters, from random weights, to write restaurant reviews "
        "(SFT), train a reward model to predict which of two reviews people prefer, and then train the language model "
        "to write reviews that the reward model scores highly (PPO). Takes about four minutes on two cores, and needs "
        "no files, network, account or GPU. With --lora, the first half of SFT trains all weights of a base, and "
        "every later stage trains a low-rank adapter of that base.",
    )
    parser.add_argument(
        "--stage", choices=("ppo", "dpo"), default="ppo", help="dpo: run DPO instead of the reward model and PPO"
    )
    parser.add_argument(
        "--lora", action="store_true", help="train adapters of one base in all stages after a short first one"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=None,
        help="the folder for all files (default: runs/quickstart, or runs/quickstart_lora with --lora)",
    )
    parser.add_argument("--sft-iterations", type=int, default=500, help="iterations of SFT (default: %(default)s)")
    parser.add_argument("--ppo-iterations", type=int, default=25, help="iterations of PPO (default: %(default)s)")
    options = parser.parse_args(args)
    for name, least in (("sft", 2 if options.lora else 1), ("ppo", 1)):  # with --lora, half are for the base
        if (number := getattr(options, f"{name}_iterations")) < least:
            raise UserError(f"{name}-iterations must be {least} or more, not {number}")
    folder = options.dir or Path("runs/quickstart_lora" if options.lora else "runs/quickstart")
    from lit_rlhf.quickstart import quickstart

    quickstart(options.stage, folder, options.sft_iterations, options.ppo_iterations, lora=options.lora)
