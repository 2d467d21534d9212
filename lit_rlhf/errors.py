"""The one exception that the command line shows as a single line, without a traceback."""

import re
from collections.abc import Sequence

LONGEST_WORD = 400
"""The number of characters of a message without a space that are shown, such as those of a very long option value."""
LONGEST_MESSAGE = 2_000
"""The number of characters of a message that are shown."""


class UserError(ValueError):
    """A mistake that the user can correct; the message names the field or file, what was found, and what is right.

    >>> raise UserError("data.batch_size must be 1 or more, not 0")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: data.batch_size must be 1 or more, not 0
    """


def one_line(message: str) -> str:
    """Return a message as one line that a terminal can show, which has a bounded length.

    White space becomes a single space, and characters that control a terminal are shown by their numbers. Long words
    are cut at their ends, and a long message in its middle.

    >>> one_line("there is no file\\n  a\\x1b[2J.jsonl")
    'there is no file a\\\\x1b[2J.jsonl'
    """
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    line = re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1…", line)
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


def some_of(names: Sequence[str]) -> str:
    """Return the first of some names, and the number of the others, for a message.

    >>> some_of(["head.weight"]), some_of(["head.weight", "head.bias"])
    ('head.weight', 'head.weight and 1 more')
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
