"""Prompts for the actor to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Source, column, read_records
from lit_rlhf.data.tokenize import prompt_tokens
from lit_rlhf.errors import UserError
from lit_rlhf.types import Prompt, PromptBatch


@dataclass(frozen=True, slots=True)
class _TokenizedPrompt:
    prompt: Prompt
    tokens: list[int]
    record: Record


class Prompts(ResumableData):
    """Prompts from JSONL, CSV or Parquet files, hub names, or a Python function.

    A prompt is text, or a conversation (``[{"role": …, "content": …}]``), which goes through the chat template. The
    other columns travel along, for the rewards.

    Args:
        train: Prompts to learn on.
        validation: Held-out prompts for ``validate``, and for ``fit`` every so often.
        test: Prompts for ``test``.
        predict: Prompts for ``predict``.
        column: The prompts' column.
        template: Text with columns in braces, ``"{question} Think step by step."``, in the column's place.
        chat: Whether to make of each text the user's turn of a conversation.
        first_tokens: Use only the first so many tokens of each text: a text becomes a prompt and is to be continued.
        max_tokens: Tokens of a prompt at most.
        too_long: What becomes of longer ones: dropped, or cut on the left or on the right.
        batch_size: Prompts of an iteration, over all processes.
        validation_batch_size: Prompts of a validation, test or prediction batch, over all processes.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, for a source that cannot be read, a missing column, or no prompt short enough.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        column: str = "prompt",
        template: str | None = None,
        chat: bool = False,
        first_tokens: int | None = None,
        max_tokens: int = 512,
        too_long: Literal["drop", "cut_left", "cut_right"] = "drop",
        batch_size: int = 64,
        validation_batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_positive(
            first_tokens=first_tokens,
            max_tokens=max_tokens,
            batch_size=batch_size,
            validation_batch_size=validation_batch_size,
        )
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.column = column
        self.template = template
        self.chat = chat
        self.first_tokens = first_tokens
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.dropped: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self._prompts: dict[str, list[_TokenizedPrompt]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs; Lightning calls it."""
        splits = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["predict"]}
        needed = splits[stage]
        for split in needed:
            if split not in self._prompts and self.sources[split] is not None:
                self._prompts[split] = self._read(split)
        if needed[0] not in self._prompts:
            raise UserError(f"data.{needed[0]} is not set: a file, a hub name or module:function with prompts")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, the same order for the same seed and epoch."""
        return self.train_loader(self._prompts["train"], self.batch_size, self._collate)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """In the file's order; empty if there are no validation prompts."""
        return self._in_order("validation") if "validation" in self._prompts else []

    def test_dataloader(self) -> ResumableLoader:
        """In the file's order."""
        return self._in_order("test")

    def predict_dataloader(self) -> ResumableLoader:
        """In the file's order."""
        return self._in_order("predict")

    def _in_order(self, split: str) -> ResumableLoader:
        size, option = self.validation_batch_size, "data.validation_batch_size"
        return self.loader(self._prompts[split], size, self._collate, option)

    def _read(self, split: str) -> list[_TokenizedPrompt]:
        source = self.sources[split]
        assert source is not None
        records = read_records(source, f"data.{split}")
        kept, self.dropped[split], self.cut[split] = [], 0, 0
        for prompt, record in zip(self._texts(records, split), records, strict=True):
            tokens = prompt_tokens(self.tokenizer, prompt, f"data.{split}")
            if self.first_tokens is not None and len(tokens) > self.first_tokens:
                tokens = tokens[: self.first_tokens]
                prompt = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            if len(tokens) > self.max_tokens:
                if self.too_long == "drop":
                    self.dropped[split] += 1
                    continue
                self.cut[split] += 1
                tokens = tokens[-self.max_tokens :] if self.too_long == "cut_left" else tokens[: self.max_tokens]
                prompt = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            kept.append(_TokenizedPrompt(prompt, tokens, record))
        if not kept:
            raise UserError(
                f"data.{split}: all {len(records)} prompts of {source} are longer than "
                f"data.max_tokens={self.max_tokens}"
            )
        self.say(f"data: {len(kept)} {split} prompts from {source}{self._counted(split)}")
        return kept

    def _counted(self, split: str) -> str:
        counts = (("dropped", self.dropped[split]), ("cut", self.cut[split]))
        return "".join(f", {n} {what} (longer than {self.max_tokens} tokens)" for what, n in counts if n)

    def _texts(self, records: list[Record], split: str) -> list[Prompt]:
        source = self.sources[split]
        assert source is not None
        if self.template is None:
            prompts = column(records, self.column, f"data.{split}", source)
        else:
            prompts = [_filled(self.template, record, source) for record in records]
        if self.chat:
            prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        return prompts

    def _collate(self, placed: list[tuple[int, _TokenizedPrompt]]) -> PromptBatch:
        rows = [prompt.tokens for _, prompt in placed]
        names = dict.fromkeys(name for _, prompt in placed for name in prompt.record)
        tokens, mask = left_pad(rows, self.tokenizer.pad_token_id)
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            group=torch.tensor([place for place, _ in placed]),
            prompts=[prompt.prompt for _, prompt in placed],
            columns={name: [prompt.record.get(name) for _, prompt in placed] for name in names},
        )


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows as a left-padded tensor [B, P], and the mask of what is real.

    >>> left_pad([[5, 6], [7]], pad=0)[0]
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


def _filled(template: str, record: Record, source: Source) -> str:
    try:
        return template.format_map(record)
    except KeyError as error:
        there = ", ".join(sorted(record))
        raise UserError(f"data.template names the column {error}, {source} has: {there}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"data.template {template!r} should be text with columns in braces: {error}") from error
