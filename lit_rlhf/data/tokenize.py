"""Text and conversations to token ids, many at a time; all tokenizing of data is here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.types import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation to tokenize by the chat template."""

    conversation: Conversation
    where: str
    """The field, or the record, for messages."""
    opened: bool
    """Whether the template opens the assistant's next turn."""


Piece: TypeAlias = str | Turns
"""Something to tokenize."""


def token_rows(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> list[list[int]]:
    """Tokenize texts and conversations in one batch each.

    A text has the tokenizer's own opening but not an end-of-sequence token that the tokenizer may add at the end, so
    that it can be continued. The tokens are those that each piece would have alone.

    Raises:
        UserError: if the chat template refuses a conversation.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> token_rows(tokenizer(), ["the soup was cold .", "the soup"])
    [[60, 54, 68, 16, 3], [60, 54]]
    """
    rows: dict[int, list[int]] = {}
    texts = [place for place, piece in enumerate(pieces) if isinstance(piece, str)]
    rows.update(zip(texts, _opened(tokenizer, [str(pieces[place]) for place in texts]), strict=True))
    for opened in (False, True):
        talks = {p: piece for p, piece in enumerate(pieces) if isinstance(piece, Turns) and piece.opened is opened}
        rows.update(zip(talks, _templated(tokenizer, list(talks.values()), opened), strict=True))
    return [rows[place] for place in range(len(pieces))]


def prompt_piece(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str) -> Piece:
    """Return a prompt as something to tokenize; the next turn of a conversation will be opened.

    Args:
        tokenizer: The model's.
        prompt: Text or conversation.
        where: The field, or the record, for messages.

    Raises:
        UserError: if the prompt is neither, or is a conversation and the tokenizer has no chat template.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> prompt_piece(tokenizer(), "the soup", "data.train")
    'the soup'
    """
    return prompt if isinstance(prompt, str) else turns(tokenizer, prompt, where, opened=True)


def turns(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str, *, opened: bool) -> Turns:
    """Return a conversation as something to tokenize.

    Raises:
        UserError: if it is not a conversation, or the tokenizer has no chat template.
    """
    if not _is_conversation(conversation):
        raise UserError(
            f"{where}: a prompt is text or a list of {{'role': …, 'content': …}}, not {str(conversation)[:80]!r}"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompts are conversations, but the model's tokenizer has no chat template")
    return Turns(conversation, where, opened)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, field: str, *, add_generation_prompt: bool
) -> list[int]:
    """Tokenize one conversation by the tokenizer's chat template.

    Raises:
        UserError: if it is not a conversation, or the tokenizer has no chat template.
    """
    return token_rows(tokenizer, [turns(tokenizer, conversation, field, opened=add_generation_prompt)])[0]


def ended(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """Return the tokens of a conversation up to its last end-of-sequence token; one is added if there is none.

    An opening token that is the same does not count.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> ended(tokenizer(), [75, 68, 1, 3]), ended(tokenizer(), [75, 68])
    ([75, 68, 1], [75, 68, 1])
    """
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id and place > 0]
    return tokens[: ends[-1] + 1] if ends else [*tokens, int(tokenizer.eos_token_id)]


def shared_prefix(*rows: list[int]) -> int:
    """Count the tokens that all rows begin with.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    first, last = min(rows), max(rows)  # all rows are between these two, so they share what these share
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _opened(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The texts with the tokenizer's own opening, without an end-of-sequence token that it may have added."""
    if not texts:
        return []
    rows: list[list[int]] = list(tokenizer(list(texts), return_attention_mask=False)["input_ids"])
    ending = [place for place, ids in enumerate(rows) if ids and ids[-1] == tokenizer.eos_token_id]
    if ending:
        plains = tokenizer([texts[place] for place in ending], add_special_tokens=False)["input_ids"]
        for place, plain in zip(ending, plains, strict=True):
            ids = rows[place]
            if plain and len(ids) > len(plain) and ids[-len(plain) :] != list(plain):
                rows[place] = ids[:-1]
    # an empty text and a tokenizer without an opening: the end-of-sequence token opens
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [ids or [opening] for ids in rows]


def _templated(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Turns], opened: bool) -> list[list[int]]:
    if not talks:
        return []

    def rows(some: Sequence[Turns]) -> list[list[int]]:
        encoded: Any = tokenizer.apply_chat_template(
            [talk.conversation for talk in some], tokenize=True, add_generation_prompt=opened, return_dict=False
        )
        return [list(ids) for ids in encoded]

    try:
        return rows(talks)
    except Exception:
        for talk in talks:  # one at a time, to name the one that the template refuses
            try:
                rows([talk])
            except Exception as error:
                raise UserError(f"{talk.where}: the chat template refuses the conversation: {error}") from error
        raise


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )
