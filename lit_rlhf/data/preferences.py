"""Pairs and rankings of responses, for reward models and DPO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow
import torch
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.columns import PROMPTS, filled_columns, is_conversation, prompt_column, shared_turns, with_context
from lit_rlhf.data.encoding import Row, Rows
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Records, Source, value_of
from lit_rlhf.data.tokenize import Piece, check_length, finished, prompt_piece, shared_prefix, token_rows, turns
from lit_rlhf.errors import UserError
from lit_rlhf.types import PreferenceBatch, Prompt

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The texts or conversations of one record, which are to be tokenized."""

    pieces: list[Piece]  # the prompt, if it is known, then each response together with the prompt, best first
    prompted: bool  # whether the first piece is the prompt
    column: bool  # whether the record has a column with the prompt
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class PreferenceEncoder:
    """An encoder that makes one row from each record or, with ``as_pairs``, from each pair of a record's responses.

    For each response, best first, a row has the tokens of the prompt with that response in ``tokens``, and the index of
    the response's first token in ``begin``. The fields, except ``context``, are arguments of `Preferences`.

    >>> from lit_rlhf.data.reviews import tokenizer
    >>> record = {"prompt": "the soup", "chosen": " was cold .", "rejected": " was"}
    >>> (row,) = PreferenceEncoder()(tokenizer(), [record], ["record 1"])
    >>> row["prompt"], row["tokens"], row["begin"]
    ([60, 54], [[60, 54, 68, 16, 3, 1], [60, 54, 68, 1]], [2, 2])
    """

    prompt: str | None = None
    context: str | None = None  # the column of the input to a recognised `instruction`
    chosen: str = "chosen"
    rejected: str = "rejected"
    responses: str = "responses"
    margin: str | None = None
    as_pairs: bool = False
    ties: Literal["refuse", "drop"] = "refuse"
    max_tokens: int = 512

    @property
    def schema(self) -> pyarrow.Schema:
        """The columns of a row.

        ``tied`` says whether two responses are equal, and ``prompted`` whether the record has a column with the prompt.
        """
        numbers = pyarrow.list_(pyarrow.int32())
        flags = {name: pyarrow.bool_() for name in ("kept", "tied", "prompted")}
        lists = {"prompt": numbers, "tokens": pyarrow.list_(numbers), "begin": numbers}
        return pyarrow.schema({**flags, **lists, "margin": pyarrow.float64()})

    @property
    def columns(self) -> str:
        """The columns that the prompts are made from, for a message."""
        return "prompts from " + " and ".join(f"`{name}`" for name in (self.prompt or "prompt", self.context) if name)

    def recognised(self, record: Record, where: str) -> "PreferenceEncoder":
        """Return this encoder with the column of the prompts, if no option names it and the record has one.

        Raises:
            UserError: if the record has several columns that are known to hold prompts.

        >>> PreferenceEncoder().recognised({"question": "Why?", "chosen": "So.", "rejected": "No."}, "record 1").columns
        'prompts from `question`'
        """
        column = None if self.prompt else prompt_column(record, PROMPTS[:3], where, "data.prompt")
        if column in (None, "prompt"):
            return self
        return replace(self, prompt=column, context="input" if column == "instruction" else None)

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], where: Sequence[str]
    ) -> list[Row]:
        """Return the rows of the records; ``kept`` is False if two responses are equal or a response is too long.

        Raises:
            UserError: if a record cannot be used (see `Preferences`).
        """
        rankings = [self._ranking(tokenizer, record, place) for record, place in zip(records, where, strict=True)]
        tokens = iter(token_rows(tokenizer, [piece for ranking in rankings if ranking for piece in ranking.pieces]))
        rows: list[Row] = []
        for ranking in rankings:
            if ranking is None:
                rows.append({"kept": False, "tied": True, "prompted": False})
            else:
                rows += self._rows(tokenizer, ranking, [next(tokens) for _ in ranking.pieces])
        return rows

    def _ranking(self, tokenizer: PreTrainedTokenizerBase, record: Record, where: str) -> _Ranking | None:
        """Return the texts of a record, or None if two responses are equal and such records are to be dropped.

        Raises:
            UserError: if the record cannot be used.
        """
        responses = self._ordered(record, where)
        equal = next((one for one, other in combinations(responses, 2) if one == other), None)
        if equal is not None:
            if self.ties == "refuse":
                raise UserError(
                    f"{where}: two of its responses are equal, so neither is better (data.ties: drop leaves such "
                    f"records out): {str(equal)[:60]!r}"
                )
            return None
        margin = None if self.margin is None else self._margin(record, responses, where)
        prompt = self._prompt(record, where)
        column = prompt is not None
        if all(map(is_conversation, responses)) and (prompt is None or isinstance(prompt, str)):
            asked = None if prompt is None else [{"role": "user", "content": prompt}]
            prompt = shared_turns(responses) or asked
        if prompt is None:
            for response in filter(lambda response: isinstance(response, str), responses):
                check_length(response, where)
            wholes = [r if isinstance(r, str) else turns(tokenizer, r, where, opened=False) for r in responses]
            return _Ranking(wholes, False, column, margin)
        opening = prompt_piece(tokenizer, prompt, where)
        pieces = [opening, *(_continued(tokenizer, prompt, r, where) for r in responses)]
        return _Ranking(pieces, True, column, margin)

    def _prompt(self, record: Record, where: str) -> Prompt | None:
        if self.prompt in (None, "prompt"):  # the default column may be missing
            return record.get("prompt")
        prompt = value_of(record, str(self.prompt), where)
        return with_context(prompt, record.get(self.context)) if self.context else prompt

    def _ordered(self, record: Record, where: str) -> list[Any]:
        """Return the responses of a record, best first.

        Raises:
            UserError: if the record has neither a ranking nor a pair, or if its ranking is not a list, has fewer than
                two responses or contains a tie.
        """
        if record.get(self.responses) is not None:
            responses = record[self.responses]
            if not isinstance(responses, list) or len(responses) < 2:
                count = f"ranks {len(responses)}" if isinstance(responses, list) else "is not a list"
                raise UserError(f"{where}: {self.responses} should rank 2 responses or more, best first; it {count}")
            if any(isinstance(r, list) and r and not isinstance(r[0], dict) for r in responses):
                raise UserError(f"{where}: {self.responses} has a tie (a list in the list); the order must be strict")
            return responses
        for name in (self.chosen, self.rejected):
            if record.get(name) is None:
                raise UserError(
                    f"{where} has neither {self.responses!r} nor a pair with {name!r}; it has: {filled_columns(record)}"
                )
        return [record[self.chosen], record[self.rejected]]

    def _margin(self, record: Record, responses: Sequence[Any], where: str) -> float:
        value: Any = record.get(self.margin or "")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or len(responses) != 2:
            beside = f"{value!r} beside {len(responses)} responses"
            raise UserError(f"{where}: data.margin should be a finite number beside a pair, not {beside}")
        return float(value)

    def _rows(self, tokenizer: PreTrainedTokenizerBase, ranking: _Ranking, tokens: list[list[int]]) -> list[Row]:
        prompt, wholes = (tokens[0], tokens[1:]) if ranking.prompted else ([], tokens)
        pieces = ranking.pieces[-len(wholes) :]
        alike = shared_prefix(*wholes)
        responses = []
        for piece, tokenized in zip(pieces, wholes, strict=True):
            begin = shared_prefix(prompt, tokenized) if ranking.prompted else alike
            whole = finished(tokenizer, piece, tokenized, begin)
            responses.append((whole, _begin(begin, whole)))
        parts = list(combinations(responses, 2)) if self.as_pairs else [tuple(responses)]
        return [self._row(prompt, part, ranking) for part in parts]

    def _row(self, prompt: list[int], responses: Sequence[tuple[list[int], int]], ranking: _Ranking) -> Row:
        return {
            "kept": max(len(tokens) for tokens, _ in responses) <= self.max_tokens,
            "tied": False,
            "prompted": ranking.column,
            "prompt": prompt,
            "tokens": [tokens for tokens, _ in responses],
            "begin": [begin for _, begin in responses],
            "margin": ranking.margin,
        }


class Preferences(ResumableData):
    """Pairs (``prompt``, ``chosen``, ``rejected``) or rankings (``prompt``, ``responses`` best first).

    The records come from JSONL, JSON, CSV or Parquet files, the Hugging Face hub, or a Python function; the columns of
    a record determine whether it is a pair or a ranking. A prompt is text, or a conversation
    (``[{"role": …, "content": …}]``), which the chat template renders; a response to a conversation is text or a list
    of further turns, with or without the turns of the prompt before them. If the responses are lists without the turns
    of the prompt, a prompt that is text becomes the user's turn. If the records have no prompts, each response is a
    whole text or a whole conversation, and the beginning that the responses of a record share counts as the prompt.

    Args:
        train: The source of the pairs or rankings to learn from.
        validation: The source of the held-out pairs or rankings.
        prompt: The column of the prompts. If None, it is recognised: ``prompt``, or the only one of ``question``,
            ``instruction`` (with ``input``) and ``context_messages``; the records may also have none of these. All
            records must have the column, unless it is ``prompt`` and no record has it.
        chosen: The column of the better response of a pair.
        rejected: The column of the worse response of a pair.
        responses: The column of a ranking's responses, best first.
        margin: The column of margins, in units of score, by which the better response of a pair should score higher
            than the other. If None, no margin is used.
        as_pairs: Whether to split each ranking into all its pairs.
        ties: What to do with a record that has two equal responses, neither of which can be better: ``refuse`` raises
            an error, ``drop`` leaves the record out and counts it.
        max_tokens: The largest number of tokens in a prompt and a response together; a pair or ranking is
            dropped, and counted, if its prompt and one of its responses together have more.
        batch_size: The number of pairs or rankings in a batch, over all processes.
        validation_batch_size: The number of pairs or rankings in a validation batch, over all processes.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, if a source that is needed is None or cannot be read, a column is missing or could be
            one of several, a ranking has fewer than two responses or contains a tie, two responses are equal and
            ``ties`` is ``refuse``, a prompt or a response has the wrong type or is refused by the chat template, a
            margin is not a finite number or does not belong to a pair, only some records have prompts, or no record is
            left.

    >>> data = Preferences(train="lit_rlhf.data.reviews:pairs", ties="drop")
    >>> Preferences(validation_batch_size=0)
    Traceback (most recent call last):
        ...
    ValueError: data.validation_batch_size must be 1 or more, not 0
    """

    encoder: PreferenceEncoder

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        prompt: str | None = None,
        chosen: str = "chosen",
        rejected: str = "rejected",
        responses: str = "responses",
        margin: str | None = None,
        as_pairs: bool = False,
        ties: Literal["refuse", "drop"] = "refuse",
        max_tokens: int = 512,
        batch_size: int = 32,
        validation_batch_size: int = 64,
    ) -> None:
        super().__init__({"train": train, "validation": validation}, contents="preferences")
        check_positive(max_tokens=max_tokens, batch_size=batch_size, validation_batch_size=validation_batch_size)
        self.encoder = PreferenceEncoder(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            responses=responses,
            margin=margin,
            as_pairs=as_pairs,
            ties=ties,
            max_tokens=max_tokens,
        )
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.dropped: dict[str, int] = {}  # too long
        self.tied: dict[str, int] = {}

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training loader, whose order depends only on the seed and the epoch.

        Raises:
            UserError: if the split has fewer records than a batch, or a batch fewer records than there are processes.
        """
        return self.train_loader(self.batch_size)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of the validation preferences in the source's order, or an empty list if there are none.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self.held_out_loader("validation", self.validation_batch_size, "data.validation_batch_size")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the validation loader, since the validation preferences are also used for testing.

        Raises:
            UserError: if a batch has fewer records than there are processes.
        """
        return self.val_dataloader()

    def rows_of(self, split: str, encoder: PreferenceEncoder, records: Records, table: "datasets.Dataset") -> Rows:
        """Return the rows that are neither tied nor too long, and report how many were dropped.

        Raises:
            UserError: if only some records have prompts, or if no row is left.
        """
        rows, source, field, limit = Rows(table), self.sources[split], f"data.{split}", encoder.max_tokens
        tied = rows.column("tied")
        if len(np.unique(rows.column("prompted")[~tied])) > 1:
            raise UserError(f"{field}: some records of {source} have a {encoder.prompt or 'prompt'!r}, and some do not")
        self.tied[split] = int(tied.sum())
        self.dropped[split] = len(table) - len(rows) - self.tied[split]
        if not len(rows):
            raise UserError(
                f"{field}: no record of {source} is left: each is tied or longer than data.max_tokens={limit}"
            )
        counts = ((self.dropped[split], f"longer than {limit} tokens"), (self.tied[split], "equal responses"))
        note = "".join(f", {count} dropped ({why})" for count, why in counts if count)
        what = "pairs" if (rows.lengths("tokens") == 2).all() else "rankings"
        self.report(f"data: {len(rows)} {split} {what} from {source}{note}")
        return rows

    def collate(self, placed: list[tuple[int, Row]]) -> PreferenceBatch:
        """Make a batch from a list of (index in the global batch, row) pairs."""
        rankings = [row for _, row in placed]
        responses = [tokens for ranking in rankings for tokens in ranking["tokens"]]
        tokens = torch.full((len(responses), max(map(len, responses))), int(self.tokenizer.pad_token_id))
        for i, response in enumerate(responses):
            tokens[i, : len(response)] = torch.tensor(response)
        counts = torch.tensor([len(ranking["tokens"]) for ranking in rankings])
        mask = torch.arange(int(counts.max())) < counts[:, None]
        ranking = torch.zeros_like(mask, dtype=torch.long)
        ranking[mask] = torch.arange(len(responses))
        margins = None if self.encoder.margin is None else torch.tensor([r["margin"] for r in rankings])
        return PreferenceBatch(
            tokens=tokens,
            prompt_lengths=torch.tensor([begin for r in rankings for begin in r["begin"]]),
            lengths=torch.tensor([len(response) for response in responses]),
            ranking=ranking,
            mask=mask,
            margin=margins,
            number=torch.tensor([r["number"] for r in rankings]),
            prompts=[r["prompt"] for r in rankings],
        )


def _continued(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Any, where: str) -> Piece:
    """Return the prompt continued by the response, as one piece to tokenize.

    A response that is a list of turns may begin with the turns of the prompt, which are then not repeated.

    Raises:
        UserError: if the response has the wrong type, or the tokenizer has no chat template for a conversation.
    """
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise UserError(f"{where}: the prompt is text, so a response is text too, not {str(response)[:60]!r}")
        check_length(prompt + response, where)
        return prompt + response
    added = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    if not isinstance(added, list) or not added:
        raise UserError(f"{where}: a response is text or a list of turns, not {str(response)[:60]!r}")
    repeated = len(added) > len(prompt) and added[: len(prompt)] == prompt
    return turns(tokenizer, added if repeated else [*prompt, *added], where, opened=False)


def _begin(shared: int, whole: list[int]) -> int:
    """Return the index of the response's first token.

    The index is at least 1, because nothing predicts token 0, and at most the index of the last token.
    """
    return max(1, min(shared, len(whole) - 1))
