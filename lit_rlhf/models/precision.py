"""The precisions that training supports."""

from lit_rlhf.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed")
"""The values of ``trainer.precision`` that training supports, as Lightning reports them."""
ALIASES = ("32", "bf16")
"""Other names of the same precisions, which Lightning accepts."""


def check_precision(precision: str | int) -> None:
    """Check that weights and gradients are in float32.

    In bfloat16 a step of the usual learning rates rounds to nothing, and float16 needs scaled losses, while gradient
    norms here are measured and clipped without the scale.

    Args:
        precision: The option ``trainer.precision``.

    Raises:
        UserError: if training does not support the precision.

    >>> check_precision("bf16-true")
    Traceback (most recent call last):
    lit_rlhf.errors.UserError: trainer.precision must be 32-true or bf16-mixed, not 'bf16-true'
    """
    if str(precision) not in (*PRECISIONS, *ALIASES):
        raise UserError(f"trainer.precision must be {' or '.join(PRECISIONS)}, not {str(precision)!r}")
