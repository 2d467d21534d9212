"""Prompts for the actor to answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

import pyarrow
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import (
    ANSWERS,
    PROMPTS,
    filled,
    filled_columns,
    is_conversation,
    only,
    prompt_column,
    until_last_user,
    value_at,
    with_context,
)
from lit_rlhf.data.encoding import Row, Rows
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Records, Source, value_of
from lit_rlhf.data.tokenize import prompt_piece, token_rows
from lit_rlhf.errors import UserError
from lit_rlhf.types import Prompt, PromptBatch

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """An encoder that makes one row from each record: the prompt's tokens, and whether the prompt was dropped or cut.

    The fields, except ``context``, are arguments of `Prompts`.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> encoder = PromptEncoder(first_tokens=2)
    >>> encoder(tokenizer(), [{"prompt": "the soup was cold ."}], ["record 1"])
    [{'kept': True, 'cut': False, 'whole': False, 'tokens': [60, 54]}]
    """

    column: str | None = None
    context: str | None = None  # the column of the input to a recognised `instruction`
    answer: str | None = field(default=None, repr=False)  # not in the repr, which identifies the cached rows
    template: str | None = None
    chat: bool = False
    first_tokens: int | None = None
    max_tokens: int = 512
    too_long: Literal["drop", "cut_left", "cut_right"] = "drop"

    @property
    def schema(self) -> pyarrow.Schema:
        """The columns of a row.

        ``cut`` says whether the prompt was cut to ``max_tokens``, and ``whole`` whether it still has all its tokens.
        """
        flags = {name: pyarrow.bool_() for name in ("kept", "cut", "whole")}
        return pyarrow.schema({**flags, "tokens": pyarrow.list_(pyarrow.int32())})

    @property
    def columns(self) -> str:
        """The columns that the prompts and the answers are made from, for a message."""
        names = " and ".join(f"`{name}`" for name in (self.column or "prompt", self.context) if name)
        prompts = f"prompts from {names if self.template is None else 'data.template'}"
        return prompts + (f", answers from `{self.answer}`" if self.answer else "")

    def recognised(self, record: Record, where: str) -> "PromptEncoder":
        """Return this encoder with the recognised columns of the prompts and the answers, where no option names them.

        Raises:
            UserError: if the record has no column or several columns that are known to hold prompts, or several columns
                that are known to hold answers.

        >>> PromptEncoder().recognised({"question": "6 x 7?", "ground_truth": "42"}, "record 1").columns
        'prompts from `question`, answers from `ground_truth`'
        """
        usual, answer = record.get("answer") is not None, self.answer
        if answer is None and not usual:
            answer = only(filled(record, ANSWERS), f"{where}: the answer may be in", "data.answer")
        if self.column is not None or self.template is not None:
            return replace(self, answer=answer)
        column = prompt_column(record, PROMPTS, where, "data.column")
        if column is None and is_conversation(record.get("chosen")):
            column = "chosen"
        if column is None:
            raise UserError(
                f"{where} has no column 'prompt'; it has: {filled_columns(record)}; name another with data.column"
            )
        if answer is None and usual and column != "prompt":
            answer = "answer"  # to report it
        return replace(self, column=column, context="input" if column == "instruction" else None, answer=answer)

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], where: Sequence[str]
    ) -> list[Row]:
        """Return one row for each record.

        Raises:
            UserError: if a record cannot be used (see `Prompts`).
        """
        prompts = [self.prompt(record, place) for record, place in zip(records, where, strict=True)]
        pieces = [prompt_piece(tokenizer, prompt, place) for prompt, place in zip(prompts, where, strict=True)]
        return [self._row(tokens) for tokens in token_rows(tokenizer, pieces)]

    def prompt(self, record: Record, where: str) -> Prompt:
        """Return the prompt of a record, as text or as a conversation.

        If the last turn of a conversation is the assistant's, the prompt is the conversation up to the user's last
        turn.

        Raises:
            UserError: if the record has no value in the prompts' column or in a column of the template, the template is
                not valid, or a conversation has no user turn to answer.

        >>> PromptEncoder(template="{question} Think.", chat=True).prompt({"question": "Why?"}, "record 1")
        [{'role': 'user', 'content': 'Why? Think.'}]
        """
        prompt: Any = self._value(record, where) if self.template is None else self._filled(record, where)
        if is_conversation(prompt):
            return until_last_user(prompt, where)
        return [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt

    def _value(self, record: Record, where: str) -> Any:
        prompt = value_of(record, self.column or "prompt", where)
        return with_context(prompt, record.get(self.context)) if self.context else prompt

    def _row(self, tokens: list[int]) -> Row:
        shown = tokens if self.first_tokens is None else tokens[: self.first_tokens]
        long = len(shown) > self.max_tokens
        if long and self.too_long == "drop":
            return {"kept": False, "cut": False, "whole": False, "tokens": []}
        if long:
            shown = shown[-self.max_tokens :] if self.too_long == "cut_left" else shown[: self.max_tokens]
        return {"kept": True, "cut": long, "whole": len(shown) == len(tokens), "tokens": shown}

    def _filled(self, record: Record, where: str) -> str:
        template = str(self.template)
        try:
            return _Formatter().vformat(template, (), record)
        except KeyError as error:
            raise UserError(
                f"{where}: data.template names the column {error}; the record has: {filled_columns(record)}"
            ) from error
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"data.template {template!r} should be text with columns in braces: {error}") from error


class _Formatter(Formatter):
    """A formatter that inserts the values of columns, and nothing else.

    It refuses a column without a value, which would otherwise become the word None. It does not read attributes of
    values, and it does not pad values to a width that no prompt has.
    """

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the value of a field and the name of its column.

        Raises:
            KeyError: if the column is missing or has no value.
        """
        value = value_at(dict(kwargs), field_name)
        if value is None and "[" in field_name and "." not in field_name:  # an entry, as in {messages[0]}
            value, _ = super().get_field(field_name, args, kwargs)
        if value is None:
            raise KeyError(field_name)
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a value as text.

        Raises:
            ValueError: if the format asks for a width or a precision of five digits or more.
        """
        if re.search(r"\d{5}", format_spec):
            raise ValueError(f"the format {format_spec[:20]!r} has a number of five digits or more")
        return str(super().format_field(value, format_spec))


class Prompts(ResumableData):
    """Prompts from JSONL, JSON, CSV or Parquet files, the Hugging Face hub, or a Python function.

    A prompt is text, or a conversation (``[{"role": …, "content": …}]``), which the chat template renders; if the last
    turn is the assistant's, the prompt is the conversation up to the user's last turn. The rewards receive all columns
    of the records, and the correct answers as ``answer``.

    Args:
        train: The source of the prompts to train on.
        validation: The source of the held-out prompts for ``validate`` and for the validations during ``fit``.
        test: The source of the prompts for ``test``.
        predict: The source of the prompts for ``predict``.
        column: The column of the prompts. If None, it is recognised: ``prompt``, or the only one of ``question``,
            ``instruction`` (with ``input``), ``messages``, ``context_messages`` and ``input``, or ``chosen`` if it
            holds conversations. A name such as ``extra_info.question`` stands for an entry in a column of
            dictionaries.
        answer: The column of the correct answers, which the rewards receive as ``answer``. If None, it is recognised:
            ``answer``, or the only one of ``reward_model.ground_truth`` and ``ground_truth``; it may be missing.
        template: A text with column names in braces, such as ``"{question} Think step by step."``, from which each
            prompt is made. If None, the prompt is the value of ``column``.
        chat: Whether to make each prompt that is text the user's turn of a conversation.
        first_tokens: The number of tokens to keep at the start of each prompt, for the actor to continue. If None, the
            whole prompt is kept.
        max_tokens: The largest number of tokens in a prompt.
        too_long: What to do with longer prompts: ``drop`` leaves them out, ``cut_left`` removes tokens at the start,
            ``cut_right`` removes tokens at the end.
        batch_size: The number of prompts in an iteration, over all processes.
        validation_batch_size: The number of prompts in a validation, test or prediction batch, over all processes.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, if a source that is needed is None or cannot be read, a column is missing or could be
            one of several, the template is not valid, a prompt is neither text nor a conversation that the chat
            template accepts, a conversation has no user turn to answer, or no prompt is short enough.

    >>> data = Prompts(train="prompts.jsonl", template="{question} Think step by step.", max_tokens=1024)
    >>> Prompts(train="prompts.jsonl", batch_size=0)
    Traceback (most recent call last):
        ...
    ValueError: data.batch_size must be 1 or more, not 0
    """

    encoder: PromptEncoder

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        column: str | None = None,
        answer: str | None = None,
        template: str | None = None,
        chat: bool = False,
        first_tokens: int | None = None,
        max_tokens: int = 512,
        too_long: Literal["drop", "cut_left", "cut_right"] = "drop",
        batch_size: int = 64,
        validation_batch_size: int = 256,
    ) -> None:
        super().__init__(
            {"train": train, "validation": validation, "test": test, "predict": predict}, contents="prompts"
        )
        check_positive(
            first_tokens=first_tokens,
            max_tokens=max_tokens,
            batch_size=batch_size,
            validation_batch_size=validation_batch_size,
        )
        self.encoder = PromptEncoder(
            column=column,
            answer=answer,
            template=template,
            chat=chat,
            first_tokens=first_tokens,
            max_tokens=max_tokens,
            too_long=too_long,
        )
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.dropped: dict[str, int] = {}
        self.cut: dict[str, int] = {}

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training loader, whose order depends only on the seed and the epoch.

        Raises:
            UserError: if the split has fewer records than a batch, or a batch fewer records than there are processes.
        """
        return self.train_loader(self.batch_size)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of the validation prompts in the source's order, or an empty list if there are none.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self._held_out("validation")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of the test prompts in the source's order, or an empty list if there are none.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self._held_out("test")

    def predict_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of the prompts for ``predict`` in the source's order, or an empty list if there are none.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self._held_out("predict")

    def _held_out(self, split: str) -> ResumableLoader | list[Any]:
        return self.held_out_loader(split, self.validation_batch_size, "data.validation_batch_size")

    def rows_of(self, split: str, encoder: PromptEncoder, records: Records, table: "datasets.Dataset") -> Rows:
        """Return the rows of the prompts that are kept, with their records, and report how many were dropped or cut.

        Raises:
            UserError: if no prompt is left.
        """
        answered = records.with_column("answer", encoder.answer) if encoder.answer else records
        rows, source, limit = Rows(table, answered, encoder), self.sources[split], encoder.max_tokens
        self.dropped[split] = len(records) - len(rows)
        self.cut[split] = int(rows.column("cut").sum())
        if not len(rows):
            raise UserError(
                f"data.{split}: all {len(records)} prompts of {source} are longer than data.max_tokens={limit}"
            )
        counts = (("dropped", self.dropped[split]), ("cut", self.cut[split]))
        note = "".join(f", {count} {what} (longer than {limit} tokens)" for what, count in counts if count)
        self.report(f"data: {len(rows)} {split} prompts from {source}{note}")
        return rows

    def collate(self, placed: list[tuple[int, Row]]) -> PromptBatch:
        """Make a batch from a list of (index in the global batch, row) pairs."""
        rows = [row for _, row in placed]
        names = dict.fromkeys(name for row in rows for name in row["record"])
        tokens, mask = left_pad([row["tokens"] for row in rows], self.tokenizer.pad_token_id)
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            group=torch.tensor([place for place, _ in placed]),
            prompts=[self._prompt(row) for row in rows],
            columns={name: [row["record"].get(name) for row in rows] for name in names},
        )

    def _prompt(self, row: Row) -> Prompt:
        if row["whole"]:
            return row["encoder"].prompt(row["record"], "data")
        return str(self.tokenizer.decode(row["tokens"], skip_special_tokens=True))


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token rows as a left-padded tensor [B, P], and a bool mask [B, P] that is True where there is no padding.

    >>> left_pad([[5, 6], [7]], pad=0)[0]
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask
