"""The one exception that the command line shows as a single line, without a traceback."""


class UserError(ValueError):
    """Something the user can mend: it names the field or the file and line, what was found, and what would be right."""
