"""The assertion that a formula has the right gradient, and reads nothing outside its mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.advantages import AdvantageEstimator
from lit_rlhf.algorithms.objectives import Objective
from lit_rlhf.types import Trajectory

Tensors = dict[str, Tensor]
LENGTHS = (5, 2, 4, 1)
"""The numbers of tokens in the four responses on which objectives and estimators are tested."""


def assert_gradient_matches(
    part: Objective | AdvantageEstimator | Callable[..., Any], *inputs: Tensor, mask: Tensor | None = None
) -> None:
    """Assert that gradients match finite differences, and that garbage outside the mask changes nothing.

    The gradients of automatic differentiation are compared with finite differences in float64 by
    ``torch.autograd.gradcheck``. Then each input in turn is set to NaN, to infinity and to −10³⁰ outside the mask.
    All outputs and gradients must stay exactly the same. Outside the mask, all gradients must be 0, and so must the
    outputs of an objective or an estimator. What is tested depends on the part:

    - of an `Objective`, the loss and its gradient with respect to the log-probabilities;
    - of an `AdvantageEstimator`, advantages and returns, and their gradients with respect to rewards and values,
      unless the estimator computes without gradients;
    - of a function, which is called as ``part(*inputs, mask=mask)``, or as ``part(*inputs)`` without a mask: all its
      outputs, one tensor or several, and their gradients with respect to all its inputs.

    An objective that stops a gradient on purpose, as CISPO does, fails.

    >>> from lit_rlhf import GAE, Clip
    >>> assert_gradient_matches(Clip(0.2))
    >>> assert_gradient_matches(GAE(lam=0.9))
    >>> assert_gradient_matches(lambda x: x.detach() * x, torch.tensor([0.5]))
    Traceback (most recent call last):
        ...
    AssertionError: <lambda>: d output[0] / d input 0[0] is 0.5 by autograd, and 1 by finite differences

    Args:
        part: An objective, an advantage estimator, or a function of tensors.
        inputs: For a function, tensors of numbers; they are converted to float64.
        mask: For an objective or an estimator, a bool tensor, [B, T], True at the tokens that count; None for responses
            of 5, 2, 4 and 1 tokens. For a function, a mask with the shape of its inputs; None for no mask.

    Raises:
        AssertionError: if a gradient is wrong, or garbage changes something; the message has the numbers.
        TypeError: if tensors are given for an objective or an estimator, or no tensors for a function.
    """
    case = _case(part, inputs, mask)
    _check_gradients(case)
    if case.mask is not None:
        for garbage in (float("nan"), float("inf"), -1e30):
            for name in case.inputs:
                _check_garbage(case, case.mask, name, garbage)


@dataclass(frozen=True)
class _Case:
    """A function of named tensors that returns named tensors, and the inputs at which it is tested."""

    name: str
    call: Callable[[Tensors], Mapping[str, Tensor]]
    inputs: Tensors
    differentiated: tuple[str, ...]
    mask: Tensor | None
    by_token: bool = True  # whether the outputs are [B, T], and 0 outside the mask
    may_detach: bool = False


def _case(part: Any, inputs: tuple[Tensor, ...], mask: Tensor | None) -> _Case:
    is_function = not isinstance(part, Objective | AdvantageEstimator)
    if is_function != bool(inputs):
        raise TypeError("assert_gradient_matches takes tensors with a function, and none with any other part")
    ragged = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if isinstance(part, Objective):
        return _of_objective(part, ragged if mask is None else mask)
    if isinstance(part, AdvantageEstimator):
        return _of_estimator(part, ragged if mask is None else mask)
    named = {f"input {number}": x.detach().double() for number, x in enumerate(inputs)}

    def call(tensors: Tensors) -> Mapping[str, Tensor]:
        outputs = part(*tensors.values()) if mask is None else part(*tensors.values(), mask=mask)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        names = ["output"] if len(outputs) == 1 else [f"output {number}" for number in range(len(outputs))]
        return dict(zip(names, outputs, strict=True))

    name = getattr(part, "__name__", type(part).__name__)
    return _Case(name, call, named, tuple(named), mask, by_token=False)


def _of_objective(objective: Objective, mask: Tensor) -> _Case:
    normal = _normal(mask)
    old_logprobs = -1.0 - normal().abs()
    inputs = {"logprobs": old_logprobs + 0.3 * normal(), "old_logprobs": old_logprobs, "advantages": normal()}
    return _Case(_title(objective), lambda x: {"loss": objective(**x, mask=mask).loss}, inputs, ("logprobs",), mask)


def _of_estimator(estimator: AdvantageEstimator, mask: Tensor) -> _Case:
    normal = _normal(mask)
    inputs = {"rewards": normal(), "values": normal(), "ratios": (0.3 * normal()).exp(), "bootstrap": normal()[:, 0]}
    rows = mask.any(1)
    group = ((rows.cumsum(0) - 1) // 2).clamp(0, max(0, int(rows.sum()) // 2 - 1))  # two or three responses in a group

    def call(tensors: Tensors) -> Mapping[str, Tensor]:
        estimates = estimator(Trajectory(mask=mask, group=group, **tensors))
        return {"advantages": estimates.advantages, "returns": estimates.returns}

    return _Case(_title(estimator), call, inputs, ("rewards", "values"), mask, may_detach=True)


def _normal(mask: Tensor) -> Callable[[], Tensor]:
    """Return a function that draws standard normal numbers, in float64 and in the shape of a mask."""
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(mask.shape, generator=generator, dtype=torch.float64)


def _check_gradients(case: _Case) -> None:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(case.inputs | dict(zip(case.differentiated, tensors, strict=True))).values())

    leaves = tuple(case.inputs[name].clone().requires_grad_() for name in case.differentiated)
    if case.may_detach and not any(output.requires_grad for output in function(*leaves)):
        return
    if torch.autograd.gradcheck(function, leaves, raise_exception=False):
        return
    raise AssertionError(f"{case.name}: {_worst_derivative(case)}")


def _worst_derivative(case: _Case, step: float = 1e-6) -> str:
    """Describe the derivative that differs most between automatic differentiation and finite differences."""
    worst, text = -1.0, ""
    for name in case.differentiated:
        leaf = case.inputs[name].clone().requires_grad_()
        outputs = case.call(case.inputs | {name: leaf})
        for at in _places(leaf):
            ends = []
            for sign in (1.0, -1.0):
                moved = case.inputs[name].clone()
                moved[at] += sign * step
                ends.append(case.call(case.inputs | {name: moved}))
            for key, output in outputs.items():
                numeric = (ends[0][key] - ends[1][key]).detach() / (2 * step)
                for place in _places(output):
                    found = 0.0
                    if output.requires_grad:
                        (gradient,) = torch.autograd.grad(
                            output[place], leaf, retain_graph=True, materialize_grads=True
                        )
                        found = float(gradient[at])
                    error = abs(found - float(numeric[place]))
                    if not error <= worst:
                        worst = error
                        text = (
                            f"d {_name(key, place)} / d {_name(name, at)} is {found:.6g} by autograd, and "
                            f"{float(numeric[place]):.6g} by finite differences"
                        )
    return text


def _check_garbage(case: _Case, mask: Tensor, name: str, garbage: float) -> None:
    inside = mask if mask.shape == case.inputs[name].shape else mask.any(1)  # the tokens, or the rows, that count
    spoilt, clean = (
        case.inputs | {name: torch.where(inside, case.inputs[name], outside)} for outside in (garbage, 0.0)
    )
    (expected, gradients), (found, others) = (_values_and_gradients(case, inputs) for inputs in (clean, spoilt))
    for key, value in expected.items():
        _check_equal(case, name, garbage, key, value, found[key])
        if case.by_token:
            _check_zero(case, mask, key, value)
    for key, value in gradients.items():
        _check_equal(case, name, garbage, f"the gradient with respect to {key}", value, others[key])
        _check_zero(case, mask, f"the gradient with respect to {key}", others[key])


def _check_zero(case: _Case, mask: Tensor, what: str, found: Tensor) -> None:
    outside = torch.where(mask, 0.0, found)
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{case.name}: {_name(what, place)}, which is outside the mask, is {float(outside[place]):.6g}, but should "
            "be 0"
        )


def _values_and_gradients(case: _Case, inputs: Tensors) -> tuple[Tensors, Tensors]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in case.differentiated}
    outputs = case.call(inputs | leaves)
    values = {key: value.detach() for key, value in outputs.items()}
    total = sum(  # with different weights, so that errors do not cancel
        (value * torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)).sum()
        for value in outputs.values()
        if value.requires_grad
    )
    if not isinstance(total, Tensor):
        return values, {}
    gradients = torch.autograd.grad(total, tuple(leaves.values()), materialize_grads=True)
    return values, dict(zip(leaves, gradients, strict=True))


def _check_equal(case: _Case, name: str, garbage: float, what: str, expected: Tensor, found: Tensor) -> None:
    if torch.equal(expected, found):
        return
    place = tuple((expected != found).nonzero()[0].tolist())
    raise AssertionError(
        f"{case.name}: {garbage:g} in {name} outside the mask changes {_name(what, place)} from "
        f"{float(expected[place]):.6g} to {float(found[place]):.6g}"
    )


def _title(part: Any) -> str:
    """Return the repr of a part, or the name of its class if it has only Python's default repr."""
    return type(part).__name__ if type(part).__repr__ is object.__repr__ else repr(part)


def _places(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(place) for place in torch.ones(x.shape).nonzero().tolist()]


def _name(what: str, place: tuple[int, ...]) -> str:
    return f"{what}{list(place)}" if place else what
