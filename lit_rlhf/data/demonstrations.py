"""Texts for a model to imitate."""

from typing import Any, Literal

import torch

from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Source, column, read_records
from lit_rlhf.data.tokenize import chat_tokens, continued_tokens, shared_prefix
from lit_rlhf.errors import UserError
from lit_rlhf.types import DemonstrationBatch

Tokenized = tuple[list[int], int]  # the tokens, and how many of them are the prompt's


class Demonstrations(ResumableData):
    """Texts, or prompts with responses, from JSONL, CSV or Parquet files, hub names, or a Python function.

    Args:
        train: What to learn.
        validation: Held-out texts.
        prompt: The prompts' column; None if a record is one text. A prompt may be a conversation.
        response: The column of responses, or of whole texts if there is no prompt.
        loss_on: Train on the response only, or on all tokens.
        packing: Put several short texts into one row of at most ``max_tokens``: less padding, the same loss (no text
            sees another).
        max_tokens: Tokens of prompt and response at most; longer ones are cut at the end, and counted.
        batch_size: Texts of a batch, over all processes.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, for a source that cannot be read or a missing column.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        prompt: str | None = None,
        response: str = "text",
        loss_on: Literal["response", "all"] = "response",
        packing: bool = False,
        max_tokens: int = 512,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        check_positive(max_tokens=max_tokens, batch_size=batch_size)
        self.sources = {"train": train, "validation": validation}
        self.prompt = prompt
        self.response = response
        self.loss_on = loss_on
        self.packing = packing
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.cut: dict[str, int] = {}
        self._texts: dict[str, list[Tokenized]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenize; Lightning calls it."""
        for split in ["train", "validation"] if stage == "fit" else ["validation"]:
            if split not in self._texts and self.sources[split] is not None:
                self._texts[split] = self._read(split)
        needed = "train" if stage == "fit" else "validation"
        if needed not in self._texts:
            raise UserError(f"data.{needed} is not set: a file, a hub name or module:function with demonstrations")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, the same order for the same seed and epoch."""
        return self.train_loader(self._texts["train"], self.batch_size, self._collate)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """In the file's order; empty if there are no validation texts."""
        if "validation" not in self._texts:
            return []
        return self.loader(self._texts["validation"], self.batch_size, self._collate, "data.batch_size")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """The same as the validation loader."""
        return self.val_dataloader()

    def _read(self, split: str) -> list[Tokenized]:
        source = self.sources[split]
        assert source is not None
        records = read_records(source, f"data.{split}")
        for name in filter(None, (self.prompt, self.response)):
            column(records, name, f"data.{split}", source)  # tells what is missing
        texts = [self._tokenize(record, f"data.{split}") for record in records]
        self.cut[split] = sum(len(tokens) > self.max_tokens for tokens, _ in texts)
        assert self.trainer is not None
        if self.trainer.is_global_zero:
            note = f", {self.cut[split]} cut (longer than {self.max_tokens} tokens)" if self.cut[split] else ""
            print(f"data: {len(texts)} {split} texts from {source}{note}")
        return [(tokens[: self.max_tokens], prompt) for tokens, prompt in texts]

    def _tokenize(self, record: Record, field: str) -> Tokenized:
        prompt = record[self.prompt] if self.prompt else ""
        response = record[self.response]
        if not isinstance(prompt, str):
            opening = chat_tokens(self.tokenizer, prompt, field, add_generation_prompt=True)
            turns = [*prompt, {"role": "assistant", "content": response}]
            whole = chat_tokens(self.tokenizer, turns, field, add_generation_prompt=False)
            return whole, shared_prefix(opening, whole)
        if not isinstance(response, str):
            raise UserError(f"{field}: {self.response} should be text, not {type(response).__name__}")
        return continued_tokens(self.tokenizer, prompt, response)

    def _collate(self, placed: list[tuple[int, Tokenized]]) -> DemonstrationBatch:
        texts = [text for _, text in placed]
        alone = [[i] for i in range(len(texts))]
        rows = _fill([len(tokens) for tokens, _ in texts], self.max_tokens) if self.packing else alone
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
    """Which texts go into which row of that width: the longest first, each into the first row where it fits."""
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
