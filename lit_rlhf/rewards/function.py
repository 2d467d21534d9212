"""A Python function as reward."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.references import load_reference
from lit_rlhf.rewards.reward import Reward
from lit_rlhf.types import RewardInputs


class RewardFunction(Reward):
    """A Python function that scores a batch of responses.

    It is called with keyword arguments, those that its signature names of: ``prompts`` (text or conversations),
    ``responses`` (text), ``terminated`` (bools: the response ended by itself), and any column of the prompts' file;
    each a list with one entry a response. It returns one finite number a response::

        def brevity(prompts, responses, **columns):
            return [-len(response.split()) / 100 for response in responses]

    Args:
        function: ``path/to/file.py:name`` or ``package.module:name``.
        weight: Factor of this reward in the score.
    """

    def __init__(self, function: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.function = function
        self._call: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.rpartition(":")[2]

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Import the function."""
        if self._call is None:
            self._call = load_reference(self.function, "rewards.function")

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """What the function returns, [B].

        Raises:
            UserError: if the function raises, wants a column that does not exist, or returns anything but one finite
                number a response.
        """
        assert self._call is not None, "prepare() comes first"
        available: dict[str, Sequence[Any]] = {
            **reward_inputs.columns,
            "prompts": reward_inputs.prompts,
            "responses": reward_inputs.responses,
            "terminated": reward_inputs.rollout.terminated.tolist(),
        }
        arguments = self._arguments(self._call, available)
        try:
            scores = self._call(**arguments)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"the reward function {self.function} raised {reason} ({_place(self._call, error)})"
            ) from error
        return self._checked(scores, reward_inputs).to(reward_inputs.rollout.tokens.device)

    def _arguments(self, call: Callable[..., Any], available: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        parameters = inspect.signature(call).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return available
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in available]
        if missing:
            raise UserError(
                f"the reward function {self.function} wants {', '.join(missing)}; there is: {', '.join(available)}"
            )
        return {p.name: available[p.name] for p in parameters if p.name in available}

    def _checked(self, scores: Any, reward_inputs: RewardInputs) -> Tensor:
        count = len(reward_inputs.responses)
        try:
            tensor = torch.as_tensor(scores, dtype=torch.float32).detach()
        except Exception as error:
            raise UserError(
                f"the reward function {self.function} should return {count} numbers, "
                f"not {type(scores).__name__}: {error}"
            ) from error
        if tensor.shape != (count,):
            found = f"shape {tuple(tensor.shape)}" if tensor.ndim != 1 else f"{len(tensor)}"
            raise UserError(f"the reward function {self.function} should return {count} numbers, it returned {found}")
        if not tensor.isfinite().all():
            row = int((~tensor.isfinite()).nonzero()[0])
            raise UserError(
                f"the reward function {self.function} returned {tensor[row]} for the response "
                f"{reward_inputs.responses[row][:80]!r}"
            )
        return tensor


def _place(function: Callable[..., Any], error: Exception) -> str:
    """The last line of the function's own file that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getsourcefile(function)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
