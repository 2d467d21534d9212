"""The command ``lit-rlhf``.

Nothing heavy is imported before it is needed: ``lit-rlhf --help`` answers at once.
"""

import sys
from collections.abc import Sequence

from lit_rlhf.errors import UserError

HELP = """usage: lit-rlhf COMMAND [options]

Align language models with human preferences by reinforcement learning.

commands:
  quickstart   SFT, a reward model and PPO on a small corpus of the package's own, from scratch
  fit          train: lit-rlhf fit --config configs/ppo.yaml
  validate     score held-out prompts
  test         score test prompts
  predict      write responses as JSONL
  export       write a checkpoint's model as a Hugging Face folder

lit-rlhf COMMAND --help tells a command's options; lit-rlhf fit --model.help PolicyGradient a model's.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a mistake of the user's is told in one line, with a non-zero exit.

    Args:
        args: The command's words; None: those of the command line.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(HELP, end="")
        elif words[0] == "quickstart":
            from lit_rlhf import quickstart

            quickstart.main(words[1:])
        elif words[0] == "export":
            from lit_rlhf import export

            export.main(words[1:])
        else:
            from lit_rlhf import lightning_cli

            lightning_cli.run(None if args is None else words)
    except UserError as error:
        print(f"lit-rlhf: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
