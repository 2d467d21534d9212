"""A Python function as a reward."""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.references import load_reference
from lit_rlhf.rewards.reward import Reward, checked_scores
from lit_rlhf.rewards.signatures import scores_of
from lit_rlhf.types import RewardInputs


class RewardFunction(Reward):
    """A Python function that scores a batch of responses.

    These keyword arguments are available, each a list with one entry per response: ``prompts`` (text or conversations),
    ``responses`` (text), ``terminated`` (bools, True if a stop token ended the response), and every column of the
    prompts. The function receives the arguments that its signature names, or all of them if it accepts ``**columns``.
    It returns one finite number per response::

        def brevity(prompts, responses, **columns):
            return [-len(response.split()) / 100 for response in responses]

    The function may be async. A function written for another trainer is recognised by its parameters' names, and called
    as that trainer calls it:

    - TRL, ``f(completions, **columns)``, also with ``prompts``, ``completion_ids`` and ``trainer_state`` (whose
      ``global_step`` counts iterations): a completion is text, or ``[{"role": "assistant", "content": …}]`` if
      the prompt is a conversation. A score of None counts as 0.
    - verl, ``f(data_source, solution_str, ground_truth, extra_info)``, one call per response: the ground truth is the
      entry ``reward_model.ground_truth``, or the column ``ground_truth`` or ``answer``. The score is a number, or the
      entry ``"score"`` of a dictionary. A function with the parameter ``solution_strs`` is called once, with lists:
      ``f(data_sources, solution_strs, ground_truths, extra_infos)``.
    - OpenRLHF, ``f(queries, prompts, labels)``, one call per response, with lists of one element: the prompt with the
      response as text, the prompt as text, and the value of the column ``answer`` or ``label``. The score is a tensor,
      or the entry ``"rewards"`` of a dictionary.

    Args:
        function: The location of the function: ``path/to/file.py:name`` or ``package.module:name``; in Python, also the
            function itself.
        weight: The factor of this reward in the score.

    Raises:
        UserError: in ``prepare``, if the function cannot be imported.

    >>> from lit_rlhf.rewards import make_reward_inputs
    >>> reward = RewardFunction("lit_rlhf.data.reviews:reward")
    >>> reward.prepare(tokenizer=None)  # imports the function
    >>> reward(make_reward_inputs(["the soup was delicious .", "the soup was awful ."]))
    tensor([ 1., -1.])
    >>> def brevity(responses):
    ...     return [-len(response.split()) for response in responses]
    >>> RewardFunction(brevity)(make_reward_inputs(["the soup was delicious ."]))
    tensor([-5.])
    """

    def __init__(self, function: str | Callable[..., Any], weight: float = 1.0) -> None:
        super().__init__(weight)
        self._call: Callable[..., Any] | None = None if isinstance(function, str) else function
        self.function = function if isinstance(function, str) else _location(function)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def name(self) -> str:
        """The function's name, without the module or the file."""
        return self.function.rpartition(":")[2]

    @property
    def description(self) -> str:
        """The word ``function``, followed by the function's location."""
        return f"function {self.function}"

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Import the function, and keep the tokenizer for OpenRLHF's signature, in which prompts are rendered as text.

        Raises:
            UserError: if the function cannot be imported.
        """
        self._tokenizer = tokenizer
        if self._call is None:
            self._call = load_reference(self.function, "rewards.function")

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Call the function and return its scores, [B].

        Raises:
            UserError: if the function requires an argument that is not available, raises an exception, or does not
                return one finite number per response.
        """
        assert self._call is not None, "call prepare() first"
        try:
            scores = scores_of(self._call, self.function, reward_inputs, self._tokenizer)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"the reward function {self.function} raised {reason} ({_error_location(self._call, error)})"
            ) from error
        tensor = checked_scores(scores, reward_inputs.responses, f"the reward function {self.function}")
        return tensor.to(reward_inputs.rollout.tokens.device)


def _location(function: Callable[..., Any]) -> str:
    named: Any = function if hasattr(function, "__name__") else type(function)
    return f"{named.__module__}:{named.__name__}"


def _error_location(function: Callable[..., Any], error: Exception) -> str:
    """Return the file and line of the innermost frame in the function's file, or of the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if frame.filename == inspect.getsourcefile(function)]
    frame = (user_frames or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
