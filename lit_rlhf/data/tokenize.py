"""Text and conversations to token ids; nobody else has to tokenize."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.types import Conversation, Prompt


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, field: str) -> list[int]:
    """A prompt's tokens, ready to be continued: no end-of-sequence token behind; a conversation's next turn is opened.

    Args:
        tokenizer: The model's.
        prompt: Text or conversation.
        field: The configuration field, for messages.

    Raises:
        UserError: if the prompt is neither, or is a conversation and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return _opened(tokenizer, prompt)
    return chat_tokens(tokenizer, prompt, field, add_generation_prompt=True)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, field: str, *, add_generation_prompt: bool
) -> list[int]:
    """A conversation's tokens by the tokenizer's chat template.

    Raises:
        UserError: if it is no conversation, or the tokenizer has no chat template.
    """
    if not _is_conversation(conversation):
        raise UserError(
            f"{field}: a prompt is text or a list of {{'role': …, 'content': …}}, not {str(conversation)[:80]!r}"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"{field}: the prompts are conversations, but the model's tokenizer has no chat template")
    ids: Any = tokenizer.apply_chat_template(
        conversation, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return list(ids)


def continued_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], int]:
    """Prompt and response as one text, ended; and how many tokens are the prompt's.

    The two are tokenized together, so that a text cut in two has the tokens it would have whole; the prompt's tokens
    are those that it shares with the whole from the start.
    """
    whole = [*_opened(tokenizer, prompt + response), tokenizer.eos_token_id]
    return whole, shared_prefix(_opened(tokenizer, prompt), whole)


def ended(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """A conversation's tokens up to and with its last end-of-sequence token; one is added if there is none.

    An opening token that is the same does not count.
    """
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id and place > 0]
    return tokens[: ends[-1] + 1] if ends else [*tokens, int(tokenizer.eos_token_id)]


def shared_prefix(*rows: list[int]) -> int:
    """How many tokens all of them begin with.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    shared = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def _opened(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text with the tokenizer's own opening, without an end-of-sequence token it may have added behind."""
    ids = list(tokenizer(text)["input_ids"])
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    closes = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != list(plain)
    ids = ids[:-1] if plain and closes else ids
    if not ids:  # an empty text and a tokenizer without an opening: the end-of-sequence token opens
        ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return ids


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )
