"""A Python function as a reward."""

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.http import pause_before_retry
from lit_rlhf.references import load_reference
from lit_rlhf.rewards.calls import CallTimeoutError, call_in_thread, isolated
from lit_rlhf.rewards.reward import OnFailure, Reward, RewardError, checked_scores
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
        timeout: The maximum number of seconds that the function may take for a batch, in each attempt; it then runs in
            a thread of its own, which is given up if it takes longer (see `call_in_thread`). None for no limit.
        retries: The maximum number of times that the function is called again after a failure: an exception, a timeout,
            or a result that is not one finite number per response. The pauses before are 0, 1, 2, 4, … seconds.
        on_failure: What happens if the last attempt fails, too: see `Reward`. Where the function is called for each
            response, an exception concerns only that response.

    Raises:
        ValueError: if a number is out of range.
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

    def __init__(
        self,
        function: str | Callable[..., Any],
        weight: float = 1.0,
        timeout: float | None = None,
        retries: int = 0,
        on_failure: OnFailure = "stop",
    ) -> None:
        super().__init__(weight, on_failure)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"rewards.timeout must be positive, or null for no limit, not {timeout}")
        if retries < 0:
            raise ValueError(f"rewards.retries must be 0 or more, not {retries}")
        self.timeout = timeout
        self.retries = retries
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
            with isolated():
                self._call = load_reference(self.function, "rewards.function")

    def forward(self, reward_inputs: RewardInputs) -> Tensor:
        """Call the function and return its scores, [B].

        Raises:
            UserError: if the function requires an argument that is not available.
            RewardError: if the function raises an exception, takes too long, or does not return one finite number per
                response, in all attempts.
        """
        assert self._call is not None, "call prepare() first"
        for attempt in range(self.retries):
            try:
                return self._score(self._call, reward_inputs)
            except RewardError:
                time.sleep(pause_before_retry(attempt))
        return self._score(self._call, reward_inputs)

    def _score(self, function: Callable[..., Any], reward_inputs: RewardInputs) -> Tensor:
        source = f"the reward function {self.function}"
        call = partial(scores_of, function, self.function, reward_inputs, self._tokenizer)
        try:
            scores = call() if self.timeout is None else call_in_thread(call, self.timeout)
        except UserError:
            raise
        except CallTimeoutError as error:
            place = _place(function, error.stack)
            raise RewardError(f"{source} took more than {self.timeout:g} s (rewards.timeout){place}") from error
        except (Exception, SystemExit) as error:
            raise RewardError(self._raised(function, error)) from error
        responses = reward_inputs.responses
        errors = [x for x in scores if isinstance(x, Exception)] if isinstance(scores, list) else []
        try:
            return checked_scores(scores, responses, source).to(reward_inputs.rollout.tokens.device)
        except RewardError as failure:
            if not errors:
                raise
            raise RewardError(self._raised(function, errors[0]), failure.scores) from errors[0]

    def _raised(self, function: Callable[..., Any], error: BaseException) -> str:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        place = _place(function, traceback.extract_tb(error.__traceback__))
        return f"the reward function {self.function} raised {reason}{place}"


def _location(function: Callable[..., Any]) -> str:
    named: Any = function if hasattr(function, "__name__") else type(function)
    return f"{named.__module__}:{named.__name__}"


def _place(function: Callable[..., Any], stack: traceback.StackSummary) -> str:
    """Return the file and line of the innermost frame in the function's file, or of the innermost of all, in brackets.

    The result is empty if there is no frame.
    """
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    frames = [frame for frame in stack if code is not None and frame.filename == code.co_filename] or stack
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
