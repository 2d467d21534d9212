"""A reward model: a sequence classifier with one label."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.batching import items_of, pack
from lit_rlhf.data.tokenize import Piece, finished, token_rows, turns, unfinished
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import ModelSource, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel, freeze, load_reward_model
from lit_rlhf.models.sharding import unsharded
from lit_rlhf.progress import track
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import Prompt, RewardInputs, Rollout, shared_beginnings


class RewardModel(Reward):
    """A Hugging Face sequence classifier with one label, whose output at the last token of a response is the reward.

    If a stop token ended the response, that token is the last one. A truncated response has no such token, but the
    texts from which a reward model learns end with the end-of-sequence token: the output at any other token is largely
    noise. Therefore, a truncated response is scored with that token after it. A model with the actor's vocabulary reads
    the actor's tokens; for any other model, the text is tokenized again.

    Args:
        model: A folder, a hub id, or a configuration for random weights.
        weight: The factor of this reward in the score.
        max_tokens: The maximum number of tokens in a forward pass, including padding; a longer sequence is passed
            alone.
        normalize: Whether to subtract the mean and divide by the standard deviation of the scores on a sample of the
            reward model's training set, both of which `RewardModeling` stores in the model's configuration.
        end_truncated: Whether to score a truncated response with the end-of-sequence token after it; if False, it is
            scored at its last token.

    Raises:
        UserError: in ``prepare``, if the model or its tokenizer cannot be loaded, or if ``normalize`` is set and the
            model's configuration has no mean and standard deviation.

    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     reward = RewardModel(str(make_tiny_model(folder, task="score")))
    ...     reward.prepare(tokenizer=load_tokenizer(folder))
    >>> reward.model(torch.tensor([[2, 6, 7, 1]])).shape  # one number after each token
    torch.Size([1, 4])
    """

    def __init__(
        self,
        model: ModelSource,
        weight: float = 1.0,
        max_tokens: int = 16384,
        normalize: bool = False,
        end_truncated: bool = True,
    ) -> None:
        super().__init__(weight)
        self.source = model
        self.max_tokens = max_tokens
        self.normalize = normalize
        self.end_truncated = end_truncated
        self.end_token = 0
        self.scale = (0.0, 1.0)  # mean and standard deviation
        self.model: ScalarModel | None = None
        self.retokenizer: PreTrainedTokenizerBase | None = None

    @property
    def description(self) -> str:
        """The folder or the hub id of the model; for random weights, only a note that they are random."""
        return f"reward model {self.source if isinstance(self.source, str) else 'with random weights'}"

    def load(self) -> ScalarModel:
        """Load and freeze the model.

        Raises:
            UserError: if the model cannot be loaded, or is not a sequence classifier with one label.
        """
        model = load_reward_model(self.source, "rewards.model")
        freeze(model)
        return model

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the model unless it is already loaded; keep its tokenizer if the vocabulary differs from the actor's.

        Args:
            tokenizer: The actor's tokenizer.

        Raises:
            UserError: if the model or its tokenizer cannot be loaded, or if ``normalize`` is set and the model's
                configuration has no mean and standard deviation.
        """
        if self.model is None:
            self.model = self.load()
        if self.normalize:
            if self.model.scale is None:
                raise UserError(f"rewards.normalize: {self.source} has no score_mean and score_std in its config.json")
            self.scale = self.model.scale
        self.end_token = int(tokenizer.eos_token_id)
        own_tokenizer = load_tokenizer(self.source, "rewards.model")
        if own_tokenizer.get_vocab() != tokenizer.get_vocab():
            self.retokenizer = own_tokenizer
            print(f"rewards: the vocabulary of {self.source} differs from the actor's; texts are tokenized again")

    @torch.no_grad()
    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Compute the score of each response, given its prompt, [B].

        Raises:
            UserError: if the text is tokenized again, and the chat template of the model's tokenizer is missing or
                refuses a conversation.
        """
        assert self.model is not None, "call prepare() first"
        rollout = reward_inputs.rollout
        tokens, lengths = rollout.tokens, rollout.lengths
        if self.retokenizer is not None:
            tokens, lengths = _tokenize(self.retokenizer, reward_inputs, self.end_truncated)
            tokens, lengths = tokens.to(rollout.tokens.device), lengths.to(rollout.tokens.device)
        elif self.end_truncated:
            tokens, lengths = _end_truncated(rollout, self.end_token)
        scores = torch.empty(len(tokens), device=tokens.device)
        with unsharded(self.model):
            pads, limit, group = self.model.pads, self.max_tokens, rollout.group
            items = items_of(tokens.cpu(), lengths.cpu(), group.cpu(), limit, pads)
            for rows in track(pack(items, limit, pads), "judge", "micro-batches"):
                rows = rows.to(tokens.device)
                batch, ends = tokens[rows, : int(lengths[rows].max())], lengths[rows]
                after_tokens = self.model(batch, ends, shared_beginnings(batch, ends, group[rows]))
                scores[rows] = after_tokens.gather(1, ends[:, None] - 1).squeeze(1)
        mean, std = self.scale
        return (scores - mean) / std


def _end_truncated(rollout: Rollout, end_token: int) -> tuple[Tensor, Tensor]:
    """Return the tokens, [B, S + 1], and the length of each row, [B], with an end token after truncated responses."""
    tokens, lengths = nn.functional.pad(rollout.tokens, (0, 1), value=end_token), rollout.lengths
    at_end = torch.arange(tokens.shape[1], device=tokens.device) == lengths[:, None]
    return tokens.masked_fill(at_end, end_token), lengths + ~rollout.terminated


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, reward_inputs: RewardInputs, end_truncated: bool
) -> tuple[Tensor, Tensor]:
    """Tokenize the prompts with their responses, as `Preferences` does when a reward model is trained.

    A row ends with an end-of-sequence token if a stop token ended the response or ``end_truncated`` is set.

    Returns:
        The tokens, [B, S] int64, right-padded; and the length of each row, [B] int64.
    """
    pairs = zip(reward_inputs.prompts, reward_inputs.responses, strict=True)
    pieces = [_piece(tokenizer, prompt, response) for prompt, response in pairs]
    rows = [
        (finished if terminated or end_truncated else unfinished)(tokenizer, piece, tokens)
        for piece, tokens, terminated in zip(
            pieces, token_rows(tokenizer, pieces), reward_inputs.rollout.terminated.tolist(), strict=True
        )
    ]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def _piece(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> Piece:
    if isinstance(prompt, str):
        return prompt + response
    return turns(tokenizer, [*prompt, {"role": "assistant", "content": response}], "rewards.model", opened=False)
