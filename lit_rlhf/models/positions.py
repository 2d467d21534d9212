"""Learned positions, such as GPT-2's: a model has a fixed number of them, and no text can be longer."""

from typing import Any

from lit_rlhf.errors import UserError


def learned_positions(config: Any) -> int | None:
    """Return the largest number of tokens in a text; None if a model computes its positions, without a limit.

    Args:
        config: The model's transformers configuration.

    >>> from transformers import GPT2Config, LlamaConfig
    >>> learned_positions(GPT2Config(n_positions=512)), learned_positions(LlamaConfig())
    (512, None)
    """
    is_rotary = getattr(config, "rope_parameters", None) is not None
    return None if is_rotary else getattr(config, "max_position_embeddings", None)


def check_positions(config: Any, length: int) -> None:
    """Check that a text fits into a model's learned positions.

    Args:
        config: The model's transformers configuration.
        length: The number of tokens in the longest text.

    Raises:
        UserError: if the text is longer; on a GPU, the lookup of its positions would end the process's use of the GPU.
    """
    positions = learned_positions(config)
    if positions is not None and length > positions:
        raise UserError(
            f"a text of {length} tokens does not fit into the {positions} positions of the model "
            f"{config.name_or_path} (max_position_embeddings in its config); shorten prompts and responses"
        )
