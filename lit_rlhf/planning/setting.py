"""The input of a plan: the models, the device, and the options of a run that affect memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning.pytorch.strategies import DDPStrategy, Strategy

from lit_rlhf.data import Demonstrations, Preferences, Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Ahead, NativeEngine, Sampling
from lit_rlhf.generation.engine import DetachedEngine
from lit_rlhf.generation.native import PREFILL_TOKENS
from lit_rlhf.modules import DPO, SFT
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.planning.dry_run import Shape
from lit_rlhf.planning.hardware import Device
from lit_rlhf.planning.models import models_of
from lit_rlhf.planning.roles import Role
from lit_rlhf.strategies import FSDP, FSDP2

Spread: TypeAlias = Literal["one", "ddp", "fsdp", "fsdp2"]
"""How models are distributed: in one process, as a copy in each process (DDP), or as shards (FSDP1 or FSDP2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How a training process generates the responses of an iteration."""

    prompt_tokens: int  # the maximum in each prompt
    sampling: Sampling
    cache_tokens: int | None  # the maximum in the key-value cache, including padding; None for no limit
    compiled: bool  # whether the decoding step is compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything on which the memory and the time of a run depend.

    Args:
        method: The name of the module's class.
        roles: The models with their parts in the run, except a shared base model.
        device: The device of each process.
        processes: The number of processes; on GPUs, there is one process for each GPU.
        spread: How the models are distributed.
        offload: Whether the shards are held in the memory of the host.
        half: Whether matrix products are computed in bfloat16.
        recompute: Whether the backward pass recomputes the activations of the trained layers.
        rows: The number of texts in an iteration, over all processes.
        responses: The number of responses to each prompt, which models that skip padding process once for all of them;
            1 for texts from a data set, although the texts of a pair may share a prompt.
        together: The number of rows that always share a micro-batch: 2 for preference pairs, otherwise 1.
        length: The maximum number of tokens in a row.
        scored: The maximum number of tokens in a row whose log-probabilities are computed.
        max_tokens: The maximum number of tokens in a micro-batch of the update, including padding.
        max_tokens_option: The name of the option that sets ``max_tokens``.
        epochs: The number of passes over the texts of an iteration.
        minibatches: The number of optimizer steps in each pass.
        judged: The names of the roles that judge the texts before the update, as far as the run has them.
        full_kl: Whether the KL to the reference is computed over the vocabulary.
        generation: How each process generates the texts; None if they come from a data set, or if worker processes or
            a server generate them.
        base: The base model that the roles' adapters share; None without adapters.
        averaged: Whether an average of the actor's trained weights is held, too.
    """

    method: str
    roles: tuple[Role, ...]
    device: Device
    processes: int
    spread: Spread
    offload: bool
    half: bool
    recompute: bool
    rows: int
    responses: int
    together: int
    length: int
    scored: int
    max_tokens: int
    max_tokens_option: str
    epochs: int
    minibatches: int
    judged: tuple[str, ...]
    full_kl: bool
    generation: Generation | None
    base: Role | None = None
    averaged: bool = False

    @property
    def models(self) -> tuple[Role, ...]:
        """The models that are held in memory: the roles and, if some roles share a base model, this base model."""
        return self.roles if self.base is None else (self.base, *self.roles)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its shards of the models."""
        return self.spread in ("fsdp", "fsdp2")

    @property
    def shards(self) -> int:
        """The number of processes over which each model is divided."""
        return self.processes if self.sharded else 1

    @property
    def own_rows(self) -> int:
        """The maximum number of texts that one process handles in an iteration."""
        return -(-self.rows // self.processes)

    def role(self, name: str) -> Role:
        """Return the role that has this name."""
        return next(role for role in self.roles if role.name == name)

    def trained(self) -> list[Role]:
        """Return the roles that have gradients."""
        return [role for role in self.roles if role.is_trained]

    def judges(self) -> list[Role]:
        """Return the roles that judge the texts before the update."""
        return [role for role in self.roles if role.name in self.judged]

    def prefilled(self) -> Shape:
        """Return the shape of the largest forward pass over prompts, in a run that generates responses."""
        assert self.generation is not None
        length, responses = self.generation.prompt_tokens, self.generation.sampling.responses
        rows = min(max(1, PREFILL_TOKENS // length), -(-self.own_rows // responses))
        return Shape(rows=rows, length=length, scored=0, half=self.half, gpu=not self.device.is_cpu)

    def shape(self, max_tokens: int, rows: int) -> Shape:
        """Return the shape of the largest micro-batch that is cut from rows of the maximum length.

        Args:
            max_tokens: The maximum number of tokens in the micro-batch, including padding; rows that stay together form
                a micro-batch even if they exceed it.
            rows: The number of rows from which the micro-batch is cut.
        """
        most = max(1, max_tokens // (self.length * self.together)) * self.together
        gpu = not self.device.is_cpu
        return Shape(rows=min(most, rows), length=self.length, scored=self.scored, half=self.half, gpu=gpu)


def setting_of(
    module: AlignmentModule,
    data: Any,
    *,
    device: Device,
    processes: int,
    strategy: str | Strategy,
    half: bool,
    recompute: bool,
    prompt_tokens: int | None = None,
) -> Setting:
    """Return the setting of a run.

    Args:
        module: The module; its models need not be loaded.
        data: The data module; its data are not read.
        device: The device of each process.
        processes: The number of processes.
        strategy: The Trainer's strategy, or its name.
        half: Whether matrix products are computed in bfloat16.
        recompute: Whether the backward pass recomputes the activations of the trained layers.
        prompt_tokens: The number of tokens in each prompt; None for the maximum that the data module allows. It
            is only used for modules that generate responses.

    Raises:
        UserError: if runs with the module's class or the strategy cannot be planned, if the data module does not fit
            the module, if the configuration or the tokenizer of a model or the configuration of an adapter cannot be
            loaded, if an adapter does not name its base model, or if a target module is not a linear layer or is the
            language-model head.
    """
    spread, offload = _spread(strategy, processes)
    base, roles = models_of(module)
    common: dict[str, Any] = {"method": type(module).__name__, "base": base, "roles": roles, "device": device}
    common |= {"processes": processes, "spread": spread, "offload": offload, "half": half, "recompute": recompute}
    expected = Prompts if isinstance(module, OnPolicy) else Demonstrations if isinstance(module, SFT) else Preferences
    if not isinstance(data, expected):
        given = type(data).__name__
        raise UserError(f"plan: {type(module).__name__} can be planned with {expected.__name__}, not with {given}")
    if isinstance(module, OnPolicy):
        return _of_responses(module, data, prompt_tokens, common)
    together = 1 if isinstance(module, SFT) else 2  # pairs
    length = data.encoder.max_tokens
    return Setting(
        rows=data.batch_size * together,
        responses=1,
        together=together,
        length=length,
        scored=length,
        max_tokens=module.max_tokens,
        max_tokens_option="model.max_tokens",
        epochs=1,
        minibatches=1,
        judged=("reference",) if isinstance(module, DPO) and module.cache_reference else (),
        full_kl=False,
        generation=None,
        **common,
    )


def _of_responses(module: OnPolicy, data: Any, prompt_tokens: int | None, common: dict[str, Any]) -> Setting:
    sampling, engine = module.sampling, module.engine
    longest = min(data.encoder.first_tokens or data.encoder.max_tokens, data.encoder.max_tokens)
    prompt = prompt_tokens or longest
    in_workers = isinstance(engine, Ahead) and engine.lag > 0 and engine.workers > 0 and not data.sources["validation"]
    engine = engine.engine if isinstance(engine, Ahead) else engine
    native = engine if isinstance(engine, NativeEngine) else NativeEngine()
    exact = module.engine.is_exact and not common["half"] and common["device"].is_cpu
    full_kl = module.reference_kl is not None and module.reference_kl.is_full
    needed = not exact or full_kl or module.critic_source == "shared"
    return Setting(
        rows=data.batch_size * sampling.responses,
        responses=sampling.responses,
        together=1,
        length=prompt + sampling.max_tokens,
        scored=sampling.max_tokens,
        max_tokens=module.update.max_tokens,
        max_tokens_option="model.update.max_tokens",
        epochs=module.update.epochs,
        minibatches=module.update.minibatches,
        judged=(*(["actor"] if needed else []), "critic", "reference", "reward"),
        full_kl=full_kl,
        averaged=module.averaging is not None,
        generation=None
        if in_workers or isinstance(engine, DetachedEngine)
        else Generation(
            prompt_tokens=prompt, sampling=sampling, cache_tokens=native.cache_tokens, compiled=native.compile
        ),
        **common,
    )


def _spread(strategy: str | Strategy, processes: int) -> tuple[Spread, bool]:
    if isinstance(strategy, FSDP2):
        return "fsdp2", strategy.cpu_offload
    if strategy == "fsdp2":
        return "fsdp2", False
    if strategy == "fsdp" or isinstance(strategy, FSDP):
        return "fsdp", False
    if processes == 1:
        return "one", False
    if isinstance(strategy, DDPStrategy) or str(strategy) == "auto" or str(strategy).startswith("ddp"):
        return "ddp", False
    raise UserError(f"plan: the strategy {strategy!r} cannot be planned; use ddp or fsdp2")
