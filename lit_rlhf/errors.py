"""The one exception that the command line shows as a single line, without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct; the message names the field or file, what was found, and what is right.

    >>> raise UserError("data.batch_size must be 1 or more, not 0")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: data.batch_size must be 1 or more, not 0
    """
