"""A reward model: a sequence classifier with one label."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.batching import pack
from lit_rlhf.data.tokenize import chat_tokens, ended
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import ModelSource, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel, freeze, load_reward_model
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import Prompt, RewardInputs


class RewardModel(Reward):
    """A Hugging Face sequence classifier with one label, asked at the response's last token (its stop token included).

    With the actor's vocabulary it reads the actor's tokens; with another one the text is tokenized again.

    Args:
        model: A folder or hub id, or a configuration for random weights.
        weight: Factor of this reward in the score.
        max_tokens: Padded tokens in one forward at most.
        normalize: Subtract the mean and divide by the deviation of the scores of the model's own training set, which
            `RewardModeling` stores with it.

    Raises:
        UserError: in ``prepare``, if the model does not load, or has no mean and deviation stored.
    """

    def __init__(
        self, model: ModelSource, weight: float = 1.0, max_tokens: int = 16384, normalize: bool = False
    ) -> None:
        super().__init__(weight)
        self.source = model
        self.max_tokens = max_tokens
        self.normalize = normalize
        self.scale = (0.0, 1.0)  # what is subtracted, and divided by
        self.model: ScalarModel | None = None
        self.retokenizer: PreTrainedTokenizerBase | None = None

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the model, frozen, and its tokenizer if it is another than the actor's."""
        if self.model is not None:
            return
        self.model = load_reward_model(self.source, "rewards.model")
        freeze(self.model)
        if self.normalize:
            config: Any = self.model.trunk.config
            if getattr(config, "score_std", None) is None:
                raise UserError(f"rewards.normalize: {self.source} has no score_mean and score_std in its config.json")
            self.scale = (config.score_mean, config.score_std)
        own = load_tokenizer(self.source, "rewards.model")
        if own.get_vocab() != tokenizer.get_vocab():
            self.retokenizer = own
            print(f"rewards: {self.source} has another vocabulary than the actor; texts are tokenized again for it")

    @torch.no_grad()
    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """The score of prompt and response, [B]."""
        assert self.model is not None, "prepare() comes first"
        rollout = reward_inputs.rollout
        tokens, lengths = rollout.tokens, rollout.lengths
        if self.retokenizer is not None:
            tokens, lengths = _tokenize(self.retokenizer, reward_inputs)
            tokens, lengths = tokens.to(rollout.tokens.device), lengths.to(rollout.tokens.device)
        scores = torch.empty(len(tokens), device=tokens.device)
        with unsharded(self.model):
            for rows in pack(lengths.cpu(), self.max_tokens):
                rows = rows.to(tokens.device)
                some = tokens[rows, : int(lengths[rows].max())]
                scores[rows] = self.model(some, lengths[rows]).gather(1, lengths[rows, None] - 1).squeeze(1)
        mean, deviation = self.scale
        return (scores - mean) / deviation


def _tokenize(tokenizer: PreTrainedTokenizerBase, reward_inputs: RewardInputs) -> tuple[Tensor, Tensor]:
    """Prompt and response as this tokenizer writes them, ended where the actor ended; right-padded."""
    rows: list[list[int]] = []
    pairs: Sequence[tuple[Prompt, str]] = list(zip(reward_inputs.prompts, reward_inputs.responses, strict=True))
    for (prompt, response), terminated in zip(pairs, reward_inputs.rollout.terminated.tolist(), strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + response)["input_ids"]
            if terminated and ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
        else:
            turns = [*prompt, {"role": "assistant", "content": response}]
            ids = ended(tokenizer, chat_tokens(tokenizer, turns, "rewards.model", add_generation_prompt=False))
        rows.append(list(ids))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths
