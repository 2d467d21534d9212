"""The columns of a record that hold its prompt, its response and its answer, recognised by their usual names."""

from collections.abc import Sequence
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.types import Conversation

PROMPTS = ("question", "instruction", "context_messages", "messages", "input")
"""The columns that may hold the prompts if there is no ``prompt``."""
ANSWERS = ("reward_model.ground_truth", "ground_truth")
"""The columns that may hold the correct answers if there is no ``answer``."""
WHOLE_TEXTS = ("text", "messages")
"""The columns that may hold a prompt with its response."""
RESPONSES = ("completion", "response", "output", "answer")
"""The columns that may hold the responses to imitate."""


def value_at(record: dict[str, Any], path: str) -> Any:
    """Return the value of a column, or of an entry in a column of dictionaries; None if there is none.

    >>> value_at({"reward_model": {"style": "rule", "ground_truth": "72"}}, "reward_model.ground_truth")
    '72'
    """
    if path in record:
        return record[path]
    column, _, rest = path.partition(".")
    value = record.get(column)
    return value_at(value, rest) if rest and isinstance(value, dict) else None


def filled(record: dict[str, Any], paths: Sequence[str]) -> list[str]:
    """Return the columns in ``paths`` that have a value in the record.

    >>> filled({"question": "Why?", "input": None}, PROMPTS)
    ['question']
    """
    return [path for path in paths if value_at(record, path) is not None]


def filled_columns(record: dict[str, Any]) -> str:
    """Return the names of a record's columns that have a value, sorted and joined into one string for messages.

    >>> filled_columns({"prompt": "Why?", "answer": None, "level": 1})
    'level, prompt'
    """
    return ", ".join(sorted(name for name, value in record.items() if value is not None)) or "nothing"


def prompt_column(record: dict[str, Any], names: Sequence[str], where: str, option: str) -> str | None:
    """Return the column that holds the prompt of a record, or None if there is none.

    The column is ``prompt`` if it has a value. An ``input`` beside an ``instruction`` does not count, since it is the
    input to the instruction.

    Args:
        record: The record.
        names: The columns that may hold the prompt if there is no ``prompt``.
        where: The field, number and source of the record, for the message.
        option: The option that names the column, for the message.

    Raises:
        UserError: if there is no ``prompt``, and several of the columns have a value.

    >>> prompt_column({"instruction": "Add.", "input": "1 and 2", "output": "3"}, PROMPTS, "record 1", "data.column")
    'instruction'
    >>> prompt_column({"question": "Why?", "messages": []}, PROMPTS, "record 1", "data.column")
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: record 1: the prompt may be in question or messages; choose with data.column
    """
    if record.get("prompt") is not None:
        return "prompt"
    return only(
        [name for name in filled(record, names) if name != "input" or "instruction" not in record],
        f"{where}: the prompt may be in",
        option,
    )


def only(found: Sequence[str], beginning: str, option: str) -> str | None:
    """Return the only element of ``found``, or None if it is empty.

    Raises:
        UserError: if there are several elements; the message consists of ``beginning``, the elements, and the
            option that chooses one.
    """
    if len(found) > 1:
        raise UserError(f"{beginning} {' or '.join(found)}; choose with {option}")
    return found[0] if found else None


def with_context(prompt: Any, context: Any) -> Any:
    """Return the prompt, followed by a blank line and the context if both are text and the context is not empty.

    >>> with_context("Translate into French.", "the soup")
    'Translate into French.\\n\\nthe soup'
    >>> with_context("Tell a joke.", "")
    'Tell a joke.'
    """
    return f"{prompt}\n\n{context}" if isinstance(prompt, str) and isinstance(context, str) and context else prompt


def is_conversation(value: Any) -> bool:
    """Return whether a value is a non-empty list of turns, each with a role and content.

    >>> is_conversation([{"role": "user", "content": "Why?"}]), is_conversation("Why?"), is_conversation([])
    (True, False, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def until_last_user(conversation: Conversation, where: str) -> Conversation:
    """Return a conversation up to the user's last turn if the last turn is the assistant's, otherwise all of it.

    Raises:
        UserError: if the last turn is the assistant's, and no turn is the user's.

    >>> until_last_user([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "record 1")
    [{'role': 'user', 'content': 'Why?'}]
    """
    if conversation[-1]["role"] != "assistant":
        return conversation
    places = [place for place, turn in enumerate(conversation) if turn["role"] == "user"]
    if not places:
        raise UserError(f"{where}: the conversation has no user turn to answer")
    return conversation[: places[-1] + 1]


def split_answer(conversation: Conversation, where: str) -> tuple[Conversation, Conversation]:
    """Split a conversation into its beginning and the assistant's turns at its end.

    Raises:
        UserError: if the conversation does not end with a turn of the assistant, or has no other turn.

    >>> split_answer([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "record 1")
    ([{'role': 'user', 'content': 'Why?'}], [{'role': 'assistant', 'content': 'So.'}])
    """
    places = [place for place, turn in enumerate(conversation) if turn["role"] != "assistant"]
    last = places[-1] + 1 if places else 0
    if last in (0, len(conversation)):
        raise UserError(f"{where}: the conversation should end with the assistant's answer to an earlier turn")
    return conversation[:last], conversation[last:]


def shared_turns(conversations: Sequence[Conversation]) -> Conversation:
    """Return the turns that all conversations begin with.

    Returns:
        The turns; empty if there are none, or if a conversation does not continue with a turn of the assistant.

    >>> why, so, no = ({"role": r, "content": c} for r, c in [("user", "Why?"), ("assistant", "So."), ("user", "No.")])
    >>> shared_turns([[why, so], [why, so | {"content": "Because."}]])
    [{'role': 'user', 'content': 'Why?'}]
    """
    shared = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    answered = all(len(c) > shared and c[shared]["role"] == "assistant" for c in conversations)
    return conversations[0][:shared] if answered else []
