"""A Python function as a reward."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.references import load_reference
from lit_rlhf.rewards.reward import Reward, checked_scores
from lit_rlhf.types import RewardInputs


class RewardFunction(Reward):
    """A Python function that scores a batch of responses.

    These keyword arguments are available, each a list with one entry per response: ``prompts`` (text or conversations),
    ``responses`` (text), ``terminated`` (bools, True if a stop token ended the response), and every column of the
    prompts. The function receives those that its signature names, or all of them if it accepts ``**columns``. It
    returns one finite number per response::

        def brevity(prompts, responses, **columns):
            return [-len(response.split()) / 100 for response in responses]

    Args:
        function: The location of the function: ``path/to/file.py:name`` or ``package.module:name``.
        weight: The factor of this reward in the score.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> reward = RewardFunction("lit_rlhf.data.reviews:reward")
    >>> reward.prepare(tokenizer=None)  # imports the function
    >>> reward(make_reward_inputs(["the soup was delicious .", "the soup was awful ."]))
    tensor([ 1., -1.])
    """

    def __init__(self, function: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.function = function
        self._call: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The function's name, without the module or the file."""
        return self.function.rpartition(":")[2]

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Import the function; the tokenizer is not used.

        Raises:
            UserError: if the function cannot be imported.
        """
        if self._call is None:
            self._call = load_reference(self.function, "rewards.function")

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Call the function and return its scores, [B].

        Raises:
            UserError: if the function requires an argument that is not available, raises an exception, or does not
                return one finite number per response.
        """
        assert self._call is not None, "call prepare() first"
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
                f"the reward function {self.function} raised {reason} ({_error_location(self._call, error)})"
            ) from error
        tensor = checked_scores(scores, reward_inputs.responses, f"the reward function {self.function}")
        return tensor.to(reward_inputs.rollout.tokens.device)

    def _arguments(self, function: Callable[..., Any], available: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return available
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in available]
        if missing:
            raise UserError(
                f"the reward function {self.function} requires {', '.join(missing)}, "
                f"but the available arguments are: {', '.join(available)}"
            )
        return {p.name: available[p.name] for p in parameters if p.name in available}


def _error_location(function: Callable[..., Any], error: Exception) -> str:
    """Return the file and line of the innermost frame in the function's file, or else of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if frame.filename == inspect.getsourcefile(function)]
    frame = (user_frames or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
