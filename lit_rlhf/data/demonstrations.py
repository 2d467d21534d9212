"""Texts for a model to imitate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow
import torch
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import (
    PROMPTS,
    RESPONSES,
    WHOLE_TEXTS,
    filled,
    filled_columns,
    is_conversation,
    only,
    split_answer,
    with_context,
)
from lit_rlhf.data.encoding import Row, Rows
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Records, Source, value_of
from lit_rlhf.data.tokenize import Piece, check_length, finished, prompt_piece, shared_prefix, token_rows, turns
from lit_rlhf.errors import UserError
from lit_rlhf.types import DemonstrationBatch

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class DemonstrationEncoder:
    """An encoder that makes one row from each record: the record's tokens, and the number of its prompt's tokens.

    A prompt and its response are tokenized as one text, so that the tokens do not depend on where the text was split.
    The prompt's tokens are the longest common prefix of the whole text's tokens and the tokens of the prompt alone.
    The fields, except ``context``, are arguments of `Demonstrations`.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> encoder = DemonstrationEncoder(prompt="prompt", response="response")
    >>> encoder(tokenizer(), [{"prompt": "the soup", "response": " was cold ."}], ["record 1"])
    [{'kept': True, 'cut': False, 'tokens': [60, 54, 68, 16, 3, 1], 'prompt': 2}]
    """

    prompt: str | None = None
    context: str | None = None  # the column of the input to a recognised `instruction`
    response: str | None = None
    max_tokens: int = 512

    @property
    def schema(self) -> pyarrow.Schema:
        """The columns of a row; ``cut`` says whether the text was cut, and ``prompt`` counts the prompt's tokens."""
        flags = {name: pyarrow.bool_() for name in ("kept", "cut")}
        return pyarrow.schema({**flags, "tokens": pyarrow.list_(pyarrow.int32()), "prompt": pyarrow.int64()})

    @property
    def columns(self) -> str:
        """The columns that the texts are made from, for a message."""
        if self.prompt is None:
            return f"texts from `{self.response or 'text'}`"
        prompts = " and ".join(f"`{name}`" for name in (self.prompt, self.context) if name)
        return f"prompts from {prompts}, responses from `{self.response}`"

    def recognised(self, record: Record, where: str) -> "DemonstrationEncoder":
        """Return this encoder with the recognised columns, or unchanged if ``response`` is set.

        Raises:
            UserError: if the record has no columns that are known to hold demonstrations, or if several
                choices of columns are possible.

        >>> DemonstrationEncoder().recognised({"prompt": "6 x 7?", "completion": "42"}, "record 1").columns
        'prompts from `prompt`, responses from `completion`'
        """
        if self.response is not None:
            return self
        whole = [] if self.prompt else filled(record, WHOLE_TEXTS)
        prompts = [self.prompt] if self.prompt else filled(record, ("prompt", *PROMPTS[:2]))
        names = (*RESPONSES, "text") if self.prompt else RESPONSES
        pairs = [(prompt, response) for prompt in prompts for response in filled(record, names)]
        found = [*whole, *(f"{prompt} + {response}" for prompt, response in pairs)]
        options = "data.response" if self.prompt else "data.prompt and data.response"
        if only(found, f"{where}: the demonstration may be in", options) is None:
            raise UserError(
                f"{where} has no columns that are known to hold demonstrations, such as text, messages or prompt + "
                f"completion; it has: {filled_columns(record)}; name others with {options}"
            )
        if whole:
            return replace(self, response=whole[0])
        prompt, response = pairs[0]
        alpaca = prompt == "instruction" and self.prompt is None
        return replace(self, prompt=prompt, response=response, context="input" if alpaca else None)

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], where: Sequence[str]
    ) -> list[Row]:
        """Return one row for each record.

        Raises:
            UserError: if a record cannot be used (see `Demonstrations`).
        """
        pairs = [self._pieces(tokenizer, record, place) for record, place in zip(records, where, strict=True)]
        openings, wholes = (token_rows(tokenizer, pieces) for pieces in zip(*pairs, strict=True))
        rows = []
        for (_, piece), opening, whole in zip(pairs, openings, wholes, strict=True):
            prompt = shared_prefix(opening, whole)
            tokens = finished(tokenizer, piece, whole, prompt)
            long = len(tokens) > self.max_tokens
            rows.append({"kept": True, "cut": long, "tokens": tokens[: self.max_tokens], "prompt": prompt})
        return rows

    def _pieces(self, tokenizer: PreTrainedTokenizerBase, record: Record, where: str) -> tuple[Piece, Piece]:
        """Return two pieces: the prompt, and the prompt with the response.

        Raises:
            UserError: if a column has no value, the prompt is neither text nor a conversation, the response to a text
                is neither text nor a conversation, a whole conversation does not end with the assistant's answer, or
                the tokenizer has no chat template for a conversation.
        """
        response = value_of(record, self.response or "text", where)
        prompt = value_of(record, self.prompt, where) if self.prompt else ""
        if self.prompt is None and is_conversation(response):
            prompt, response = split_answer(response, where)
        elif self.context:
            prompt = with_context(prompt, record.get(self.context))
        if isinstance(prompt, str) and is_conversation(response):
            prompt = [{"role": "user", "content": prompt}]
        opening = prompt_piece(tokenizer, prompt, where)
        if not isinstance(prompt, str):
            added = response if is_conversation(response) else [{"role": "assistant", "content": response}]
            return opening, turns(tokenizer, [*prompt, *added], where, opened=False)
        if not isinstance(response, str):
            raise UserError(f"{where}: {self.response} should be text, not {type(response).__name__}")
        check_length(prompt + response, where)
        return opening, prompt + response


class Demonstrations(ResumableData):
    """Texts to imitate, or prompts with responses to imitate.

    The records come from JSONL, JSON, CSV or Parquet files, the Hugging Face hub, or a Python function. A response to a
    conversation is text or a list of further turns. In a whole conversation, the response is the assistant's turns at
    the end.

    Args:
        train: The source of the texts to imitate.
        validation: The source of the held-out texts.
        prompt: The column of the prompts, which may be texts or conversations. If None and ``response`` is set, each
            record is one text or one conversation.
        response: The column of the responses, or of the whole texts or conversations if ``prompt`` is None. If both
            are None, they are recognised: ``text``, ``messages``, or one of ``prompt``, ``question`` and
            ``instruction`` (with ``input``) beside one of ``completion``, ``response``, ``output`` and ``answer``. If
            only ``response`` is None, it is recognised among these four columns and ``text``.
        loss_on: ``response`` to train on the tokens of the response only, ``all`` to train on all tokens.
        packing: Whether to put several short texts into one row of at most ``max_tokens`` tokens, which saves padding.
            The loss stays the same, since no text attends to another.
        max_tokens: The largest number of tokens in a text, or in a prompt and its response together; longer texts are
            cut at the end, and counted.
        batch_size: The number of texts in a batch, over all processes.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, if a source that is needed is None or cannot be read, a column is missing or could be
            one of several, a prompt is neither text nor a conversation that the chat template accepts, a whole
            conversation does not end with the assistant's answer, or the response to a text is neither text nor a list
            of turns.

    >>> data = Demonstrations(train="lit_rlhf.data.reviews:demonstrations", prompt="prompt", response="response")
    >>> Demonstrations(max_tokens=0)
    Traceback (most recent call last):
        ...
    ValueError: data.max_tokens must be 1 or more, not 0
    """

    encoder: DemonstrationEncoder

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        prompt: str | None = None,
        response: str | None = None,
        loss_on: Literal["response", "all"] = "response",
        packing: bool = False,
        max_tokens: int = 512,
        batch_size: int = 32,
    ) -> None:
        super().__init__({"train": train, "validation": validation}, contents="demonstrations")
        check_positive(max_tokens=max_tokens, batch_size=batch_size)
        self.encoder = DemonstrationEncoder(prompt=prompt, response=response, max_tokens=max_tokens)
        self.loss_on = loss_on
        self.packing = packing
        self.batch_size = batch_size
        self.cut: dict[str, int] = {}

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training loader, whose order depends only on the seed and the epoch.

        Raises:
            UserError: if the split has fewer records than a batch, or a batch fewer records than there are processes.
        """
        return self.train_loader(self.batch_size)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of the validation texts in the source's order, or an empty list if there are none.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self.held_out_loader("validation", self.batch_size, "data.batch_size")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the validation loader, since the validation texts are also used for testing.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self.val_dataloader()

    def rows_of(self, split: str, encoder: DemonstrationEncoder, records: Records, table: "datasets.Dataset") -> Rows:
        """Return the rows of all texts, and report how many texts were cut."""
        rows = Rows(table)
        self.cut[split] = int(rows.column("cut").sum())
        note = f", {self.cut[split]} cut (longer than {self.encoder.max_tokens} tokens)" if self.cut[split] else ""
        self.report(f"data: {len(rows)} {split} texts from {self.sources[split]}{note}")
        return rows

    def collate(self, placed: list[tuple[int, Row]]) -> DemonstrationBatch:
        """Make a batch from a list of (index in the global batch, row) pairs."""
        texts = [(row["tokens"], row["prompt"]) for _, row in placed]
        alone = [[i] for i in range(len(texts))]
        limit = self.encoder.max_tokens
        rows = _fill([len(tokens) for tokens, _ in texts], limit) if self.packing else alone
        width = max(sum(len(texts[i][0]) for i in row) for row in rows)
        batch = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            start = 0
            for tokens, prompt in (texts[i] for i in row):
                end = start + len(tokens)
                batch[number, start:end] = torch.tensor(tokens)
                positions[number, start:end] = torch.arange(len(tokens))
                first = max(1, prompt) if self.loss_on == "response" else 1
                mask[number, start + first : end] = True
                start = end
        return DemonstrationBatch(tokens=batch, mask=mask, positions=positions if self.packing else None)


def _fill(lengths: list[int], width: int) -> list[list[int]]:
    """Return the indices of the texts in each row of ``width`` tokens.

    The longest text is placed first, and each text goes into the first row with enough room.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(left) if room >= lengths[text]), None)
        if row is None:
            rows.append([])
            left.append(width)
            row = len(rows) - 1
        rows[row].append(text)
        left[row] -= lengths[text]
    return rows
