"""Incidents: numbers that are not finite stop a run before an optimizer step, and a file says which rows have them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.errors import UserError, some_of
from lit_rlhf.files import replacing
from lit_rlhf.generation.collectives import gather
from lit_rlhf.models.actor import Actor
from lit_rlhf.modules.forwards import response_logprobs
from lit_rlhf.modules.incident_rows import Record, not_finite, response_records
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.types import Experience, RewardInputs, Rollout, ScoredRollout, Trajectory

MOST_ROWS = 10
"""The maximum number of rows in the file of an incident."""
GOOD = "and the last checkpoint is good"
USUAL_HELP = (
    ("rewards/", "try the reward on these responses with make_reward_inputs: a division by 0 is the usual cause"),
    ("scores", "smaller rewards, or smaller weights of the rewards, usually help"),
    ("shaped_scores", "smaller rewards, or model.scores.clip, usually help"),
    ("rollout_logprobs", "the engine's log-probabilities or its weights are wrong; a smaller learning rate may help"),
    ("old_logprobs", "a smaller learning rate, or trainer.precision: 32-true, usually helps"),
    ("ref_logprobs", "look at the weights of model.reference: they may be damaged, or overflow in this precision"),
    ("full_kl", "look at the weights of model.reference: they may be damaged, or overflow in this precision"),
    ("values", "a smaller model.critic_optimizer.lr, or model.update.value_clip, usually helps"),
    ("bootstrap", "a smaller model.critic_optimizer.lr, or model.update.value_clip, usually helps"),
    ("token_rewards", "a smaller model.kl.coef, or model.scores.clip, usually helps"),
    ("advantages", "look at model.advantages; model.scores.clip usually helps if the scores are large"),
    ("returns", "look at model.advantages; model.scores.clip usually helps if the scores are large"),
    ("policy_weights", "model.correction.truncate_above limits these weights"),
    ("policy_", "a smaller model.actor_optimizer.lr, or model.scores.clip, usually helps"),
    ("value_", "a smaller model.critic_optimizer.lr, model.update.value_clip or model.scores.clip usually helps"),
    ("", "a smaller learning rate, or trainer.precision: 32-true, usually helps"),
)
"""What usually helps, by the beginning of the name of the tensor that is not finite; the first match counts."""
OF_WEIGHTS = (
    "the last checkpoints may hold these weights, too: go back to an earlier one (--checkpoint.keep_every_n), or start "
    "again, with a smaller learning rate"
)

# ------------------------------------------------------------------ on-policy iterations


def check_iteration(module: Any, scored: ScoredRollout, trajectory: Trajectory, experience: Experience) -> None:
    """Stop the run if a number from which an iteration learns is not finite.

    The scores of responses that are left out, because a reward failed, do not count. All processes call this function
    together and decide together; the host waits for the device only once.

    Args:
        module: The `OnPolicy` module that trains.
        scored: This process's responses, with the outputs of the models and the rewards.
        trajectory: The reward of each token.
        experience: The advantages and the returns.

    Raises:
        UserError: if a number is not finite; the message names the first such tensor, and a file, which lists the rows.
    """
    everywhere, learned = scored.rollout.response_mask, experience.rollout.response_mask
    left_out = module.scores.left_out(scored.rewards)
    has_score = ~torch.stack(list(left_out.values())).any(0)
    tensors = {
        "rollout_logprobs": (scored.rollout.rollout_logprobs, everywhere),
        "old_logprobs": (scored.old_logprobs, everywhere),
        "ref_logprobs": (scored.ref_logprobs, everywhere),
        "full_kl": (scored.full_kl, everywhere),
        "values": (scored.values, everywhere),
        "bootstrap": (scored.bootstrap, None),
        **{f"rewards/{name}": (values, ~left_out[name]) for name, values in scored.rewards.items()},
        "scores": (scored.scores, has_score),
        "shaped_scores": (scored.shaped_scores, has_score),
        "token_rewards": (trajectory.rewards, everywhere & has_score[:, None]),
        "advantages": (experience.advantages, learned),
        "returns": (experience.returns, learned),
        "policy_weights": (experience.policy_weights, learned),
    }
    masked = {
        name: values if mask is None else torch.where(mask, values, 0.0)
        for name, (values, mask) in tensors.items()
        if values is not None
    }
    _check_tensors(module, masked, scored.rollout, scored.reward_inputs)


def check_logprobs(module: AlignmentModule, actor: Actor, rollout: Rollout) -> None:
    """Stop the run if a log-probability of the engine or of the actor is not finite, as `check_iteration` does.

    Args:
        module: The module that trains.
        actor: The actor, with the weights that should have drawn the responses.
        rollout: This process's responses.

    Raises:
        UserError: if a log-probability is not finite.
    """
    mask, own = rollout.response_mask, response_logprobs(actor, rollout, module.max_tokens)
    tensors = {"rollout_logprobs": rollout.rollout_logprobs, "old_logprobs": own}
    _check_tensors(module, {name: torch.where(mask, x, 0.0) for name, x in tensors.items()}, rollout)


def _check_tensors(
    module: AlignmentModule, tensors: Mapping[str, Tensor], rollout: Rollout, inputs: RewardInputs | None = None
) -> None:
    is_bad = [(~x.isfinite()).view(len(x), -1) for x in tensors.values()]
    counts = [torch.stack([bad.any(1).sum(), bad.sum()]) for bad in is_bad]
    counts.append(torch.full((2,), len(rollout.tokens), device=rollout.tokens.device))
    *found, (responses, _) = module.sum_over_ranks(torch.stack(counts)).tolist()
    bad = {name: {"rows": rows, "elements": n} for name, (rows, n) in zip(tensors, found, strict=True) if n}
    if not bad:
        return
    name = next(iter(bad))
    here = tensors[name][~tensors[name].isfinite()].tolist()
    value = next(value for values in gather(here[:1]) for value in values)
    rows, elements = bad[name]["rows"], bad[name]["elements"]
    stop(
        module,
        tensor=name,
        finding=f"{name} is {value} in {rows} of {responses} responses",
        before="update",
        records=response_records(module.tokenizer, rollout, tensors, inputs=inputs, cause=name),
        details={"elements": elements, "rows_not_finite": rows, "rows_in_iteration": responses, "tensors": bad},
    )


# ------------------------------------------------------------------------- optimizer steps


def all_finite(module: AlignmentModule, values: Mapping[str, Tensor]) -> bool:
    """Return whether the losses and gradient norms of a step are finite on all processes, which decide together.

    The host waits for the device only once.

    Args:
        module: The module that trains.
        values: Tensors of shape [] on one device, by name; the names are the same on all processes.
    """
    bad = ~torch.stack([value.detach().float() for value in values.values()]).isfinite()
    return not module.sum_over_ranks(bad.float()).any()


def stop_at_step(
    module: AlignmentModule, values: Mapping[str, Tensor], records: Sequence[Record], gradients: Sequence[str]
) -> NoReturn:
    """Stop the run because a loss or a gradient norm is not finite on some process; all call this function together.

    Args:
        module: The module that trains.
        values: The losses and gradient norms, as for `all_finite`.
        records: This process's rows that have numbers that are not finite.
        gradients: The names of the parameters whose gradients are not finite on this process.

    Raises:
        UserError: always.
    """
    shares = gather([float(value) for value in values.values()])
    names = list(values)
    number, value = next(
        (number, share[number]) for number in range(len(names)) for share in shares if not math.isfinite(share[number])
    )
    name = names[number]
    stop(
        module,
        tensor=name,
        finding=f"the {name.replace('_', ' ')} is {value:g}",
        before="step",
        records=records,
        gradients=gradients,
        details={"elements": 1, "values": {name: float(value) for name, value in values.items()}},
    )


def not_finite_gradients(module: torch.nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients, or this process's shards of them, are not finite."""
    return _names(module, ((parameter, parameter.grad) for parameter in module.parameters()))


def not_finite_weights(module: torch.nn.Module) -> list[str]:
    """Return the names of the trained weights that are not finite; of sharded weights, only this process's shards."""
    return _names(module, ((parameter, parameter) for parameter in module.parameters() if parameter.requires_grad))


def check_weights(module: AlignmentModule) -> None:
    """Check the weights at the end of a run, after the last step; all processes call this function together.

    Raises:
        UserError: if a trained weight is not finite on some process.
    """
    bad = sorted({name for names in gather(not_finite_weights(module)) for name in names})
    if bad:
        raise UserError(f"weights that are not finite: {some_of(bad)}: nothing is exported; {OF_WEIGHTS}")


def _names(module: torch.nn.Module, tensors: Iterable[tuple[Tensor, Tensor | None]]) -> list[str]:
    names = {id(p): name.replace("_fsdp_wrapped_module.", "") for name, p in module.named_parameters()}
    found = [(parameter, x.to_local() if isinstance(x, DTensor) else x) for parameter, x in tensors if x is not None]
    return [names[id(parameter)] for parameter, x in found if not x.detach().isfinite().all()]


# -------------------------------------------------------------------------------- responses


@contextmanager
def sampling_explained(module: AlignmentModule) -> Iterator[None]:
    """Return a context in which an error while responses are sampled stops the run as an incident, if it is one.

    It is one if a trained weight is not finite: most samplers then fail. No process waits for another here, because
    the error may be on this process only.

    Raises:
        UserError: if responses cannot be sampled, and a trained weight is not finite.
    """
    try:
        yield
    except Exception as error:
        if not not_finite_weights(module):
            raise
        finding = f"responses cannot be sampled ({' '.join(str(error).split())[:120]})"
        stop(module, tensor="weights", finding=finding, before="update", records=(), details={}, together=False)


def check_sampled(rollout: Rollout) -> Rollout:
    """Return a rollout that is not learned from, if the log-probabilities of its responses are finite.

    Raises:
        UserError: if they are not.
    """
    if not torch.where(rollout.response_mask, rollout.rollout_logprobs, 0.0).isfinite().all():
        raise UserError("the log-probabilities of the sampled responses are not finite: the model's weights are not")
    return rollout


def check_rewards(rewards: Mapping[str, Tensor], responses: Sequence[str]) -> None:
    """Check the rewards of held-out responses, [B] each, by name.

    Raises:
        UserError: if a reward is not finite; the message names the first one.

    >>> check_rewards({"Judge": torch.tensor([0.5, torch.nan])}, ["yes", "no"])
    Traceback (most recent call last):
        ...
    lit_rlhf.errors.UserError: the reward Judge is nan for the response 'no'
    """
    for name, values in rewards.items():
        for row in not_finite(values)[:1]:
            raise UserError(f"the reward {name} is {float(values[row])} for the response {responses[row][:80]!r}")


# --------------------------------------------------------------------------- the end of a run


def stop(
    module: AlignmentModule,
    *,
    tensor: str,
    finding: str,
    before: str,
    records: Sequence[Record],
    details: Mapping[str, Any],
    gradients: Sequence[str] = (),
    together: bool = True,
) -> NoReturn:
    """Write the files of an incident, and stop the run with the same line on every process.

    Each process that has rows writes a file; if none has any, process 0 writes one.

    Args:
        module: The module that trains.
        tensor: The name of the tensor that is not finite.
        finding: What was found, the beginning of the message.
        before: What the run stops before: the ``update`` or the ``step``.
        records: This process's rows with numbers that are not finite.
        details: Further entries of the file.
        gradients: The names of the parameters whose gradients are not finite on this process.
        together: Whether all processes call this function together; if not, this process acts alone.

    Raises:
        UserError: always.
    """
    rank, world_size = module.on_rank()
    own = len(records), not_finite_weights(module), list(gradients)
    shares = dict(enumerate(gather(own))) if together else {rank: own}
    weights = sorted({name for _, names, _ in shares.values() for name in names})
    bad_gradients = sorted({name for _, _, names in shares.values() for name in names})
    writers = [number for number, share in shares.items() if share[0]] or [min(shares)]
    iteration, folder = int(module.iteration) + 1, Path(module.trainer.default_root_dir)
    files = [folder / f"incident-{iteration}{f'-rank{number}' * (world_size > 1)}.json" for number in writers]
    rows = sum(share[0] for share in shares.values())
    message = _message(tensor, finding, before, rows, weights, bad_gradients, files)
    if rank in writers:
        of_iteration = {"iteration": iteration, "module": type(module).__name__, "tensor": tensor}
        named = {"weights": weights, "gradients": bad_gradients, "rows": list(records[:MOST_ROWS])}
        try:
            _write(files[writers.index(rank)], of_iteration | {"message": message} | dict(details) | named)
        except OSError as error:
            print(f"the file of the incident cannot be written: {error}", flush=True)
    raise UserError(message)


def _message(
    tensor: str,
    finding: str,
    before: str,
    rows: int,
    weights: Sequence[str],
    gradients: Sequence[str],
    files: Sequence[Path],
) -> str:
    """Return the line with which a run stops."""
    good = "" if weights else f", {GOOD}"
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    causes = [f"weights that are not finite: {some_of(weights)}"] if weights else []
    if before == "step":
        causes.append(f"rows of the minibatch that give it: {rows or 'none alone'}")
        causes += [f"gradients that are not finite: {some_of(gradients)}"] if gradients and not rows else []
    found = "".join(f"; {cause}" for cause in causes)
    usual = OF_WEIGHTS if weights else next(text for start, text in USUAL_HELP if tensor.startswith(start))
    return f"{finding}: stopped before the {before}{good}{found}. {files[0]}{more} has the details; {usual}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is complete or absent."""
    text = json.dumps(_strict(content), ensure_ascii=False, allow_nan=False, indent=1)
    text = re.sub(r"\[\n\s+[^][{}]+\n\s+\]", lambda found: re.sub(r"\n\s+", " ", found[0]), text)  # a list in one line
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a character becomes its escape in JSON


def _strict(value: Any) -> Any:
    """Return a value with its numbers that are not finite as text, since JSON has no such numbers.

    >>> _strict({"scores": [1.0, float("-inf")]})
    {'scores': [1.0, '-inf']}
    """
    if isinstance(value, Mapping):
        return {str(key): _strict(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
