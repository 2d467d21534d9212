"""Optimizer steps: gradients of micro-batches, checks before the step, and a retry if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.algorithms.masked import Reduce
from lit_rlhf.compat import no_gradient_sync
from lit_rlhf.errors import UserError
from lit_rlhf.models.sharding import is_sharded
from lit_rlhf.modules.incident_rows import Record, experience_records
from lit_rlhf.modules.incidents import all_finite, not_finite_gradients, stop_at_step
from lit_rlhf.modules.losses import Losses, step_totals
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.modules.update import Update
from lit_rlhf.strategies import FSDP
from lit_rlhf.types import Experience

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def losses_of(module: OnPolicy) -> Losses:
    """Return the losses of a module's actor and critic, with the current coefficient of the KL to the reference."""
    return Losses(
        actor=module.actor,
        critic=module.critic,
        reference=module.reference,
        objective=module.objective,
        reference_kl=module.reference_kl,
        kl_coef=module.kl.coef,
        update=module.update,
        max_tokens=module.sampling.max_tokens,
        only_critic=module.update.trains_only_critic(module.iteration),
    )


def step_within_target(module: OnPolicy, minibatch: Experience, losses: Losses, metrics: Metrics) -> bool:
    """Step all optimizers with the gradients of a minibatch, unless the KL to the old policy exceeds its target.

    Args:
        module: The module that trains; its ``update.target_kl`` is the target, in nats per token.
        minibatch: The rows of all processes.
        losses: The losses of the actor and the critic.
        metrics: Receives the metrics of the losses and, if the optimizers step, of the gradients.

    Returns:
        Whether the optimizers stepped; if not, the gradients are dropped.

    Raises:
        UserError: if a loss or a gradient norm is not finite, or if memory runs out (see `within_memory`).
    """

    def attempt() -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients; return the mean KL to the old policy, [], and this process's losses to check, [] each."""
        batches, parts = module.micro_batches(minibatch), losses.parts
        totals, kl_to_old = module.sum_over_ranks(step_totals(batches)), torch.zeros((), device=module.device)
        means: dict[str, Tensor] = {}
        *_, final = parts
        untouched = [p for name, own in module.trained_parameters().items() if name != final for p in own]
        for number, micro_batch in enumerate(batches, start=1):
            for name, part in parts.items():
                loss, summed_kl, part_means = part(micro_batch, totals, metrics)
                kl_to_old += summed_kl
                for key, mean in part_means.items():
                    means[key] = means.get(key, 0.0) + mean
                add_gradient(module, loss, last=number == len(batches) and name == final, untouched=untouched)
        return module.sum_over_ranks(kl_to_old) / totals[0], means

    kl_to_old, means = within_memory(module, attempt, minibatch.rollout.lengths, metrics)
    if module.update.target_kl is not None and kl_to_old > module.update.target_kl:
        drop_gradients(module)
        return False
    if losses.only_critic:  # DDP gives the actor gradients of 0, with which an optimizer could still move the actor
        for parameter in module.trained_parameters()["policy"]:
            parameter.grad = None
    records = partial(experience_records, module, minibatch, losses)
    norms = step_optimizers(module, module.update.clip_grad_norm, records, **means)
    measure_gradients(norms, module.update, metrics)
    return True


def measure_gradients(norms: Mapping[str, Tensor], update: Update, metrics: Metrics) -> None:
    """Record the gradient norms of a step, [] each, by optimizer name, and whether the gradients were clipped."""
    for name, norm in norms.items():
        metrics.add(f"{name}/grad_norm", norm)
        if update.clip_grad_norm is not None:
            metrics.add(f"{name}/grad_clipped_fraction", norm > update.clip_grad_norm)


def add_gradient(module: AlignmentModule, loss: Tensor, *, last: bool, untouched: Sequence[nn.Parameter] = ()) -> None:
    """Add the gradient of a part of the step's loss to the gradients of the trained parameters.

    Under DDP, only the last backward pass of a step averages the gradients over the ranks, including the gradients of
    earlier passes; strategies that shard models average in every pass.

    Args:
        module: The module that trains.
        loss: A part of the loss of the step, []; the parts of all ranks add up to the loss.
        last: Whether this is the last part on this rank.
        untouched: The trained parameters on which the loss does not depend; needed only for the last part.
    """
    if last and isinstance(module.trainer.model, DistributedDataParallel):
        loss = reach(loss, untouched)
    with nullcontext() if last else no_gradient_sync(module.trainer.strategy):
        module.manual_backward(loss * module.trainer.world_size)  # DDP and FSDP average over the ranks


def add_gradients(
    module: AlignmentModule, batches: Sequence[Batch], loss_of: Callable[[Batch, bool], Tensor]
) -> Tensor:
    """Add the gradients of the micro-batches of a step, and return the sum of their losses, [], without gradient.

    All ranks take part in each collective operation of a sharded model, so all ranks must do the same number of passes:
    a rank with fewer micro-batches repeats its last one, with a loss of 0.

    Args:
        module: The module that trains.
        batches: The micro-batches of this rank, at least one.
        loss_of: A function of a micro-batch that returns its part of the loss of the step, []. The function's second
            argument is False for a repeated micro-batch, which must not enter the metrics.
    """
    total, count = torch.zeros((), device=module.device), len(batches)
    most = module.max_over_ranks(count)[0] if is_sharded(module.get_submodule(module.role)) else count
    for number in range(most):
        counts = number < count
        loss = loss_of(batches[min(number, count - 1)], counts)
        loss = loss if counts else loss * 0.0
        total += loss.detach()
        add_gradient(module, loss, last=number == most - 1)
    return total


def step_optimizers(
    module: AlignmentModule, max_norm: float | None, records: Callable[[], Sequence[Record]], **losses: Tensor
) -> dict[str, Tensor]:
    """Step all optimizers, and return the norms of their gradients before clipping, [] each, by optimizer name.

    The losses and the norms of all processes are checked before any optimizer steps. The host waits for the device only
    in this check. After the steps, the gradients are dropped.

    Args:
        module: The module that trains.
        max_norm: The maximum norm of the gradients of each optimizer, over all ranks, to which larger gradients are
            scaled down; None for no clipping.
        records: A function that returns this process's rows with numbers that are not finite, for the incident's file;
            it is called on all processes, if a loss or a norm is not finite.
        losses: The losses to check, [] each, keyed by the names to use in the message.

    Raises:
        UserError: if a loss or a gradient norm is not finite on any process; the gradients are dropped.
    """
    reduce = (
        module.sum_over_ranks if isinstance(module.trainer.strategy, FSDP) else None
    )  # FSDP1's shards are plain tensors
    optimizers = module.optimizers_by_name()
    parameters = {
        name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, optimizer in optimizers.items()
    }
    norms = {name: gradient_norm(parameters[name], reduce) for name in optimizers}
    checked = {f"{name}_gradient_norm" if len(norms) > 1 else "gradient_norm": norm for name, norm in norms.items()}
    checked = losses | {name: norm.to(module.device) for name, norm in checked.items()}
    if not all_finite(module, checked):
        gradients = not_finite_gradients(module)
        drop_gradients(module)
        stop_at_step(module, checked, records(), gradients)
    for name, optimizer in optimizers.items():
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters[name], max_norm, norms[name])
        optimizer.step()
    drop_gradients(module)
    return norms


def drop_gradients(module: AlignmentModule) -> None:
    """Free the memory of the gradients, so that decoding and judging can use it.

    With ``gradient_as_bucket_view``, the gradients are parts of the buffers that DDP sends, which exist during the
    whole run. In this case, the gradients are set to 0, because new gradients would need memory in addition to the
    buffers. FSDP1 keeps its shards of the gradients until the next forward pass with gradients.
    """
    model = module.trainer.model
    in_buffers = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
    for optimizer in module.optimizers_by_name().values():
        optimizer.zero_grad(set_to_none=not in_buffers)


def within_memory(
    module: AlignmentModule, attempt: Callable[[], Result], sizes: Tensor, metrics: Metrics | None = None
) -> Result:
    """Return the result of an attempt; whenever it runs out of GPU memory, halve ``max_tokens`` and repeat the attempt.

    The gradients and the metrics of a failed attempt are dropped, so that the result is the same as with the smaller
    ``max_tokens`` from the beginning. The smaller value is used for the rest of the run, and a printed line says so; a
    resumed run begins with the configured value. Under DDP and FSDP, an attempt is not repeated, because the other
    processes are already waiting in a collective operation; the error then names the value to set.

    Args:
        module: The module that trains.
        attempt: A function that computes gradients in micro-batches of at most ``module.max_tokens`` tokens.
        sizes: The number of tokens, including padding, in each row or ranking, which a micro-batch must hold whole; a
            tensor of any shape.
        metrics: The metrics to which the attempt adds; None if it adds to none.

    Raises:
        UserError: if the attempt ran out of memory under DDP or FSDP, or if a single row or ranking already has
            ``max_tokens`` tokens or more.
    """
    while True:
        before = {} if metrics is None else metrics.snapshot()
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            _check_can_halve(module, int(sizes.max()), error)
        # after the handler, when the error's traceback no longer keeps the attempt's tensors alive
        drop_gradients(module)
        if metrics is not None:
            metrics.restore(before)
        torch.cuda.empty_cache()
        module.max_tokens //= 2
        print(f"{module.max_tokens_option}: the update ran out of memory; it continues with {module.max_tokens}")


def _check_can_halve(module: AlignmentModule, longest: int, error: torch.OutOfMemoryError) -> None:
    option, value = module.max_tokens_option, module.max_tokens
    if value <= longest:
        raise UserError(
            f"{option} is {value}: the update ran out of memory, and the longest row alone has {longest} tokens; use "
            "the callback ActivationCheckpointing, shorter texts, or more GPUs with the strategy fsdp2"
        ) from error
    if not isinstance(module.trainer.strategy, SingleDeviceStrategy):
        raise UserError(f"{option} is {value}: the update ran out of memory; set it to {value // 2}") from error


def gradient_norm(parameters: Sequence[Tensor], reduce: Reduce | None = None) -> Tensor:
    """Return the norm of the parameters' gradients, [], without waiting for the device.

    Args:
        parameters: The parameters of one optimizer.
        reduce: A function that sums a tensor over all ranks; needed if each rank holds its shards of the gradients as
            plain tensors (FSDP1), otherwise None.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> (3.0 * weight[0] + 4.0 * weight[1]).backward()
    >>> gradient_norm([weight])
    tensor(5.)
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm if reduce is None else reduce(norm.square()).sqrt()


def reach(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss, [], with a backward pass that also gives each of the given parameters a gradient of 0.

    The zeros take the memory of one number. DDP averages the gradients over the ranks in the last backward pass of a
    step, and waits until that pass has given a gradient to every trained parameter.

    Args:
        loss: The loss, [].
        parameters: Parameters on which the loss does not depend.

    >>> weight, other = torch.tensor(2.0, requires_grad=True), torch.ones(3, requires_grad=True)
    >>> reach(weight**2, [other]).backward()
    >>> weight.grad, other.grad
    (tensor(4.), tensor([0., 0., 0.]))
    """
    return _Reach.apply(loss, *parameters) if parameters else loss


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zero = torch.zeros_like(grad)
        return (grad, *(zero.expand(shape) for shape in ctx.shapes))
