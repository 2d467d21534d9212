"""Chat templates, rendered within limits of time and memory: a template is a program that comes with a model."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.types import Conversation

SECONDS = 3.0
"""The processor time in which a chat template must have rendered one conversation."""
BYTES = 512 * 2**20
"""The host memory that a chat template may use to render one conversation."""
_CHECKS_PER_SECOND = 20
_UNIT = 1 if sys.platform == "darwin" else 1024


class EndlessTemplateError(ValueError):
    """A chat template has exceeded a limit of this module."""


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **options: Any) -> str | list[int]:
    """Return a conversation as text, as the chat template writes it; or as tokens, if the tokenizer needs no template.

    The limits hold in the main thread of a process only, because Python handles signals there.

    Args:
        tokenizer: A tokenizer with a chat template, or one whose class writes conversations by itself.
        conversation: The turns, oldest first.
        options: Options of ``apply_chat_template``.

    Raises:
        EndlessTemplateError: if the template takes too much time or memory.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> made = tokenizer()
    >>> made.chat_template = "{{ messages[0].content }}!"
    >>> render(made, [{"role": "user", "content": "the soup"}])
    'the soup!'
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return list(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **options))
    with _limits():
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))


@contextmanager
def _limits() -> Iterator[None]:
    """Return a context that the timer of this process's processor time ends with an error, at a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    used, peak = _seconds(), _peak()

    def check(*_: Any) -> None:
        if _seconds() - used > SECONDS:
            raise EndlessTemplateError(f"it takes more than {SECONDS:g} s for one conversation; does it loop?")
        if _peak() - peak > BYTES:
            raise EndlessTemplateError(f"it takes more than {BYTES >> 20} MiB for one conversation; does it loop?")

    before = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1 / _CHECKS_PER_SECOND, 1 / _CHECKS_PER_SECOND)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def _seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
