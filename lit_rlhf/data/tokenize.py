"""The conversion of texts and conversations to token ids, in batches; all data is tokenized by this module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import is_conversation
from lit_rlhf.data.templates import EndlessTemplateError, render
from lit_rlhf.errors import UserError
from lit_rlhf.types import Conversation, Prompt


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation to tokenize with the chat template."""

    conversation: Conversation
    where: str
    """The configuration field or the record that the conversation is from, for messages."""
    opened: bool
    """Whether the template opens the assistant's next turn."""


LONGEST_TEXT = 4 * 2**20
"""The maximum number of characters in a text or a rendered conversation."""

Piece: TypeAlias = str | Turns
"""A text or a conversation to tokenize."""


def token_rows(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> list[list[int]]:
    """Tokenize texts and conversations in batches, and return the token ids of each piece in the order of the pieces.

    A text begins with the tokens that the tokenizer adds at the start, but an end-of-sequence token that the tokenizer
    adds at the end of a non-empty text is removed, so that the text can be continued. Each piece gets the tokens that
    it would get alone.

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
        rows.update(zip(talks, _templated(tokenizer, list(talks.values()), add_generation_prompt=opened), strict=True))
    return [rows[place] for place in range(len(pieces))]


def prompt_piece(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str) -> Piece:
    """Return a prompt as a piece for `token_rows`; after a conversation, the assistant's next turn is opened.

    Args:
        tokenizer: The model's tokenizer.
        prompt: A text or a conversation.
        where: The configuration field or the record that the prompt is from, for messages.

    Raises:
        UserError: if the prompt is neither a text nor a conversation, if it is too long, or if it is a conversation and
            the tokenizer has no chat template.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> prompt_piece(tokenizer(), "the soup", "data.train")
    'the soup'
    """
    if not isinstance(prompt, str):
        return turns(tokenizer, prompt, where, opened=True)
    check_length(prompt, where)
    return prompt


def turns(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str, *, opened: bool) -> Turns:
    """Return a conversation as a piece for `token_rows`.

    Args:
        tokenizer: The model's tokenizer.
        conversation: The turns, oldest first.
        where: The configuration field or the record that the conversation is from, for messages.
        opened: Whether the template opens the assistant's next turn.

    Raises:
        UserError: if ``conversation`` is not a list of turns with role and content, or the tokenizer has no chat
            template.
    """
    if not is_conversation(conversation):
        raise UserError(
            f"{where}: a prompt is text or a list of {{'role': …, 'content': …}}, not {str(conversation)[:80]!r}"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompts are conversations, but the model's tokenizer has no chat template")
    return Turns(conversation, where, opened)


def finished(tokenizer: PreTrainedTokenizerBase, piece: Piece, tokens: list[int], begin: int = 0) -> list[int]:
    """Return the tokens of a prompt and its complete response, with an end-of-sequence token at the end.

    Args:
        tokenizer: The tokenizer.
        piece: The prompt with its response.
        tokens: The tokens that `token_rows` returned for the piece.
        begin: The number of tokens of the prompt, if it is known; an end-of-sequence token among them ends nothing.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> finished(tokenizer(), "the soup was cold .", [60, 54, 68, 16, 3])
    [60, 54, 68, 16, 3, 1]
    """
    return [*tokens, int(tokenizer.eos_token_id)] if isinstance(piece, str) else ended(tokenizer, tokens, begin)


def unfinished(tokenizer: PreTrainedTokenizerBase, piece: Piece, tokens: list[int]) -> list[int]:
    """Return the tokens of a prompt and its truncated response, without an end-of-sequence token at the end.

    The tokens that a chat template writes after a response are left out. If these tokens cannot be separated, because
    the template changes the text of the response, the last end-of-sequence token and the tokens after it are left out.
    The arguments are the same as for `finished`.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> unfinished(tokenizer(), "the soup was cold .", [60, 54, 68, 16, 3])
    [60, 54, 68, 16, 3]
    """
    if isinstance(piece, str):
        return tokens
    try:
        return _templated(tokenizer, [piece], continue_final_message=True)[0]
    except ValueError:
        return ended(tokenizer, tokens)[:-1]


def ended(tokenizer: PreTrainedTokenizerBase, tokens: list[int], begin: int = 0) -> list[int]:
    """Return a conversation's tokens up to and including the last end-of-sequence token, added if there is none.

    The first ``begin`` tokens do not count, and neither does the first of all, since some tokenizers open every text
    with the end-of-sequence token.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> ended(tokenizer(), [75, 68, 1, 3]), ended(tokenizer(), [75, 1, 68], begin=2)
    ([75, 68, 1], [75, 1, 68, 1])
    """
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id and place >= max(begin, 1)]
    return tokens[: ends[-1] + 1] if ends else [*tokens, int(tokenizer.eos_token_id)]


def shared_prefix(*rows: list[int]) -> int:
    """Count the tokens that all rows begin with.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    first, last = min(rows), max(rows)  # the ends of the sorted order, so all rows share what these two share
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _opened(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts with the tokens that the tokenizer adds at the start, but without an EOS token added at the end.

    An end-of-sequence (EOS) token that is part of a text is kept. An empty text keeps all tokens that the tokenizer
    adds; if there are none, it becomes the beginning-of-sequence token or, if the tokenizer has no such token, the EOS
    token.
    """
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
    # an empty text has no tokens if the tokenizer adds none; give it one token, so that it can be continued
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [ids or [opening] for ids in rows]


def _templated(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Turns], **options: bool) -> list[list[int]]:
    """Tokenize conversations, which the chat template renders with these options of ``apply_chat_template``."""
    rendered = []
    for talk in talks:
        try:
            rendered.append(render(tokenizer, talk.conversation, **options))
        except EndlessTemplateError as error:
            raise UserError(f"{talk.where}: the model's chat template cannot be used: {error}") from error
        except Exception as error:
            raise UserError(f"{talk.where}: the chat template refuses the conversation: {error}") from error
        if isinstance(rendered[-1], str):
            check_length(rendered[-1], talk.where)
    texts = [text for text in rendered if isinstance(text, str)]
    # without the tokens that the tokenizer adds, because a chat template writes its own
    rows = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [next(rows) if isinstance(text, str) else text for text in rendered]


def check_length(text: str, where: str) -> None:
    """Check that a text is not so long that a tokenizer would take minutes and gigabytes for it.

    Args:
        text: The text.
        where: The configuration field or the record that the text is from, for the message.

    Raises:
        UserError: if the text is too long.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where} has a text of {len(text)} characters; the longest possible has {LONGEST_TEXT}")
