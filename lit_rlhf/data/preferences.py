"""Pairs and rankings of responses, for reward models and DPO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch

from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.module import ResumableData, check_positive
from lit_rlhf.data.records import Record, Source, read_records
from lit_rlhf.data.tokenize import chat_tokens, continued_tokens, ended, prompt_tokens, shared_prefix
from lit_rlhf.errors import UserError
from lit_rlhf.types import PreferenceBatch, Prompt


@dataclass(frozen=True, slots=True)
class _Ranking:
    prompt: list[int]  # ready to be continued; empty: the records have no prompt
    responses: list[tuple[list[int], int]]  # prompt and response, and how many tokens are the prompt's; best first
    margin: float | None


class Preferences(ResumableData):
    """Pairs (``prompt``, ``chosen``, ``rejected``) or rankings (``prompt``, ``responses`` best first).

    From JSONL, CSV or Parquet files, hub names, or a Python function; which of the two a record is, its columns tell.
    Texts, or conversations (``[{"role": …, "content": …}]``), which go through the chat template: as the prompt alone,
    with the responses as text or as turns; or, where records have no prompt, as whole conversations or texts that begin
    alike.

    Args:
        train: What to learn.
        validation: Held-out pairs or rankings.
        prompt: The prompts' column.
        chosen: The column of the better response of a pair.
        rejected: The column of the worse.
        responses: The column of a ranking's responses, best first.
        margin: A column of numbers, by how much the better of a pair should be ahead; None: not used.
        as_pairs: Cut each ranking into all its pairs.
        ties: What becomes of a record with two equal responses, neither of which can be better: refused, or dropped
            and counted.
        max_tokens: Tokens of prompt and response at most; a record with a longer one is dropped, and counted.
        batch_size: Records of a batch, over all processes.
        validation_batch_size: The same of a validation batch.

    Raises:
        ValueError: if a number is out of range.
        UserError: in ``setup``, for a source that cannot be read, a missing column, a ranking of one, or a tie.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        prompt: str = "prompt",
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
        super().__init__()
        check_positive(max_tokens=max_tokens, batch_size=batch_size, validation_batch_size=validation_batch_size)
        self.sources = {"train": train, "validation": validation}
        self.prompt = prompt
        self.pair = (chosen, rejected)
        self.responses = responses
        self.margin = margin
        self.as_pairs = as_pairs
        self.ties = ties
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.dropped: dict[str, int] = {}  # too long
        self.tied: dict[str, int] = {}
        self._rankings: dict[str, list[_Ranking]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenize; Lightning calls it."""
        for split in ["train", "validation"] if stage == "fit" else ["validation"]:
            if split not in self._rankings and self.sources[split] is not None:
                self._rankings[split] = self._read(split)
        needed = "train" if stage == "fit" else "validation"
        if needed not in self._rankings:
            raise UserError(f"data.{needed} is not set: a file, a hub name or module:function with preferences")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, the same order for the same seed and epoch."""
        return self.train_loader(list(enumerate(self._rankings["train"])), self.batch_size, self._collate)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """In the file's order; empty if there is nothing held out."""
        if "validation" not in self._rankings:
            return []
        rows = list(enumerate(self._rankings["validation"]))
        return self.loader(rows, self.validation_batch_size, self._collate, "data.validation_batch_size")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """The same as the validation loader."""
        return self.val_dataloader()

    def _read(self, split: str) -> list[_Ranking]:
        source, field = self.sources[split], f"data.{split}"
        assert source is not None
        records = read_records(source, field)
        rankings, self.tied[split] = [], 0
        for number, record in enumerate(records, 1):
            where = f"{field}: record {number} of {source}"
            responses = self._ordered(record, where)
            equal = next((one for one, other in combinations(responses, 2) if one == other), None)
            if equal is not None:
                if self.ties == "refuse":
                    raise UserError(
                        f"{where}: two of its responses are equal, so neither is better (data.ties: drop leaves such "
                        f"records out): {str(equal)[:60]!r}"
                    )
                self.tied[split] += 1
                continue
            ranking = self._tokenize(record, responses, where)
            rankings += _pairs(ranking) if self.as_pairs else [ranking]
        if len({bool(r.prompt) for r in rankings}) > 1:
            raise UserError(f"{field}: some records of {source} have a {self.prompt!r}, and some have none")
        kept = [r for r in rankings if max(len(tokens) for tokens, _ in r.responses) <= self.max_tokens]
        self.dropped[split] = len(rankings) - len(kept)
        if not kept:
            raise UserError(
                f"{field}: no record of {source} is left: longer than data.max_tokens={self.max_tokens}, or tied"
            )
        counts = ((self.dropped[split], f"longer than {self.max_tokens} tokens"), (self.tied[split], "equal responses"))
        note = "".join(f", {count} dropped ({why})" for count, why in counts if count)
        what = "pairs" if all(len(r.responses) == 2 for r in kept) else "rankings"
        self.say(f"data: {len(kept)} {split} {what} from {source}{note}")
        return kept

    def _ordered(self, record: Record, where: str) -> list[Any]:
        """The responses, best first."""
        if record.get(self.responses) is not None:
            responses = record[self.responses]
            if not isinstance(responses, list) or len(responses) < 2:
                count = f"is one of {len(responses)}" if isinstance(responses, list) else "is no list"
                raise UserError(f"{where}: {self.responses} should rank 2 responses or more, best first; it {count}")
            if any(isinstance(r, list) and r and not isinstance(r[0], dict) for r in responses):
                raise UserError(f"{where}: {self.responses} has a tie (a list in the list); the order must be strict")
        else:
            for name in self.pair:
                if record.get(name) is None:
                    there = ", ".join(sorted(k for k, v in record.items() if v is not None)) or "nothing"
                    raise UserError(f"{where} has neither {self.responses!r} nor a pair with {name!r}; it has: {there}")
            responses = [record[name] for name in self.pair]
        return responses

    def _tokenize(self, record: Record, responses: Sequence[Any], where: str) -> _Ranking:
        prompt = record.get(self.prompt)
        if prompt is None and self.prompt != "prompt":
            raise UserError(f"{where} has no column {self.prompt!r}; it has: {', '.join(sorted(record))}")
        margin = None if self.margin is None else self._margin(record, responses, where)
        if prompt is None:
            wholes = [self._whole(response, where) for response in responses]
            shared = shared_prefix(*wholes)
            return _Ranking([], [(whole, _begin(shared, whole)) for whole in wholes], margin)
        opening = prompt_tokens(self.tokenizer, prompt, where)
        return _Ranking(opening, [self._continued(prompt, opening, r, where) for r in responses], margin)

    def _continued(self, prompt: Prompt, opening: list[int], response: Any, where: str) -> tuple[list[int], int]:
        if isinstance(prompt, str):
            if not isinstance(response, str):
                raise UserError(f"{where}: the prompt is text, so a response is text too, not {str(response)[:60]!r}")
            whole, begin = continued_tokens(self.tokenizer, prompt, response)
            return whole, _begin(begin, whole)
        turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: a response is text or a list of turns, not {str(response)[:60]!r}")
        whole = self._whole([*prompt, *turns], where)
        return whole, _begin(shared_prefix(opening, whole), whole)

    def _whole(self, text: Any, where: str) -> list[int]:
        """A whole text or conversation, up to and with its last end-of-sequence token."""
        if isinstance(text, str):
            return continued_tokens(self.tokenizer, "", text)[0]
        return ended(self.tokenizer, chat_tokens(self.tokenizer, text, where, add_generation_prompt=False))

    def _margin(self, record: Record, responses: Sequence[Any], where: str) -> float:
        value: Any = record.get(self.margin or "")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or len(responses) != 2:
            count = len(responses)
            raise UserError(f"{where}: data.margin is a finite number beside a pair, not {value!r} beside {count}")
        return float(value)

    def _collate(self, placed: list[tuple[int, tuple[int, _Ranking]]]) -> PreferenceBatch:
        rankings = [ranking for _, (_, ranking) in placed]
        rows = [response for ranking in rankings for response in ranking.responses]
        tokens = torch.full((len(rows), max(len(row) for row, _ in rows)), int(self.tokenizer.pad_token_id))
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        counts = torch.tensor([len(ranking.responses) for ranking in rankings])
        mask = torch.arange(int(counts.max())) < counts[:, None]
        ranking = torch.zeros_like(mask, dtype=torch.long)
        ranking[mask] = torch.arange(len(rows))
        return PreferenceBatch(
            tokens=tokens,
            prompt_lengths=torch.tensor([prompt for _, prompt in rows]),
            lengths=torch.tensor([len(row) for row, _ in rows]),
            ranking=ranking,
            mask=mask,
            margin=None if self.margin is None else torch.tensor([r.margin for r in rankings]),
            number=torch.tensor([number for _, (number, _) in placed]),
            prompts=[r.prompt for r in rankings],
        )


def _pairs(ranking: _Ranking) -> list[_Ranking]:
    """Each better response with each worse one."""
    return [_Ranking(ranking.prompt, [*pair], ranking.margin) for pair in combinations(ranking.responses, 2)]


def _begin(shared: int, whole: list[int]) -> int:
    """Where the response begins: never at the first token, which nothing predicts, and never after the last."""
    return max(1, min(shared, len(whole) - 1))
