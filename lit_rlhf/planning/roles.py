"""The models of a run, built without weights to count their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.compat import watch_results
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_tokenizer, read_config
from lit_rlhf.models.sharding import decoder_layers
from lit_rlhf.modules import DPO, SFT, TRPO, RewardModeling
from lit_rlhf.modules.module import AlignmentModule
from lit_rlhf.modules.on_policy import OnPolicy
from lit_rlhf.planning.dry_run import LiveBytes, Outputs, Rounding, held_in_half
from lit_rlhf.rewards import RewardModel

FLOAT, HALF = 4, 2
"""The bytes of a number in float32, and of one in bfloat16."""


class Stepping(NamedTuple):
    """The bytes that an optimizer needs for each parameter."""

    state: float  # from the first step on
    temporary: float  # in addition, during a step on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A model and its part in a run.

    Args:
        name: ``actor``, ``critic``, ``reference`` or ``reward``.
        model: The model on the meta device; it may have a head that the role does not use.
        outputs: What the passes of the model compute.
        max_tokens: The maximum number of tokens in a pass, including padding.
        stepping: What the optimizer needs for each parameter; None for a frozen model.
    """

    name: str
    model: PreTrainedModel
    outputs: Outputs
    max_tokens: int
    stepping: Stepping | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the model has gradients."""
        return self.stepping is not None

    @property
    def parameters(self) -> int:
        """The number of parameters that the role uses, including those of a linear head for values."""
        head = self.model.config.hidden_size + 1 if self.outputs.values else 0
        return head + sum(parameter.numel() for parameter in _used(self).parameters())

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(list(decoder_layers(self.model)))

    @property
    def largest_layer(self) -> int:
        """The number of parameters of the largest decoder layer."""
        return max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(self.model))

    @property
    def multiplied(self) -> int:
        """The number of weights in the linear layers below the head, all of which a pass uses for every token."""
        return sum(weight.numel() for weight in _linear_weights(self.model.base_model))

    @property
    def head(self) -> int:
        """The number of weights in the head for logits, even if the embedding shares them; 0 without logits."""
        head: Any = self.model.get_output_embeddings() if self.outputs.logprobs else None
        return 0 if head is None else head.weight.numel()


def weight_bytes(role: Role, rounding: Rounding) -> int:
    """Return the bytes of a role's weights: bfloat16 for those that `held_in_half` returns, float32 for all others."""
    rounded = sum(parameter.numel() for parameter in held_in_half(_used(role), rounding))
    return FLOAT * (role.parameters - rounded) + HALF * rounded


def roles_of(module: AlignmentModule) -> tuple[Role, ...]:
    """Return the roles of a module; their models are built without weights.

    Raises:
        UserError: if a module of this kind cannot be planned, or a model's configuration or tokenizer cannot be loaded.
    """
    language, scores = Outputs(logprobs=True, values=False), Outputs(logprobs=False, values=True)
    steps = {name: stepping_of(make) for name, (make, _) in module.optimizer_factories.items()}
    if isinstance(module, SFT):
        return (_role("actor", module.source, language, module.max_tokens, steps["actor"]),)
    if isinstance(module, RewardModeling):
        return (_role("reward", module.source, scores, module.max_tokens, steps["model"]),)
    if isinstance(module, DPO):
        actor = _role("actor", module.source, language, module.max_tokens, steps["model"])
        reference = module.reference_source or module.source
        return (actor, _role("reference", reference, language, module.max_tokens))
    if isinstance(module, OnPolicy) and not isinstance(module, TRPO):
        return _on_policy(module, steps)
    raise UserError(f"plan: {type(module).__name__} is not among the modules that can be planned")


def _on_policy(module: OnPolicy, steps: dict[str, Stepping]) -> tuple[Role, ...]:
    rewards = [reward for reward in module.scores.rewards if isinstance(reward, RewardModel)]
    shared, tokens = module.critic_source == "shared", module.update.max_tokens
    language, scores = Outputs(logprobs=True, values=False), Outputs(logprobs=False, values=True)
    actor = _role("actor", module.source, Outputs(logprobs=True, values=shared), tokens, steps["policy"])
    roles = [actor]
    if module.critic_source is not None and not shared:
        first_reward = rewards[0].source if rewards else module.source
        sources = {"actor": module.source, "reward": first_reward}
        source = sources.get(str(module.critic_source), module.critic_source)
        roles.append(_role("critic", source, scores, tokens, steps["value"]))
    roles.append(_role("reference", module.reference_source or module.source, language, tokens))
    for reward in rewards:
        roles.append(_role("reward", reward.source, scores, reward.max_tokens))
    return tuple(roles)


def _role(name: str, source: ModelSource, outputs: Outputs, max_tokens: int, stepping: Stepping | None = None) -> Role:
    model = without_weights(source, f"model.{name}", outputs)
    return Role(name=name, model=model, outputs=outputs, max_tokens=max_tokens, stepping=stepping)


def without_weights(source: ModelSource, field: str, outputs: Outputs) -> PreTrainedModel:
    """Build a model on the meta device, where its tensors have no memory.

    Args:
        source: A folder, a hub id, or a configuration for random weights.
        field: The name of the configuration field, for error messages.
        outputs: What the model is to compute. If this includes no log-probabilities, and the configuration is that of a
            sequence classifier, the result is a sequence classifier; otherwise, it is a causal language model.

    Raises:
        UserError: if the configuration or the tokenizer of random weights cannot be loaded, or if the configuration is
            that of another kind of model.

    >>> shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
    >>> source = RandomWeights(config=shape, tokenizer="lit_rlhf.data.reviews:tokenizer")
    >>> without_weights(source, "model.actor", Outputs(logprobs=True, values=False)).device
    device(type='meta')
    """
    config: Any = read_config(source, field)
    if isinstance(source, RandomWeights):
        _set_tokens(config, source, field)
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    kind: Any = AutoModelForSequenceClassification if classifier and not outputs.logprobs else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=torch.float32).eval()
    except ValueError as error:
        raise UserError(f"{field}: not a language model: {' '.join(str(error).split())[:300]}") from error


def stepping_of(make_optimizer: OptimizerCallable) -> Stepping:
    """Measure the bytes that an optimizer needs for each parameter, by two steps on 4,096 parameters.

    The steps are done on the CPU, but in the way in which the optimizer would do them on a GPU: with all parameters at
    once (``foreach``), if the optimizer supports this and its options do not say otherwise.

    Args:
        make_optimizer: The function that makes the optimizer from a list of parameters.

    >>> stepping_of(torch.optim.AdamW), stepping_of(lambda p: torch.optim.AdamW(p, fused=True))
    (Stepping(state=8.0, temporary=4.0), Stepping(state=8.0, temporary=0.0))
    >>> stepping_of(torch.optim.SGD)
    Stepping(state=0.0, temporary=0.0)
    """
    parameter = nn.Parameter(torch.zeros(64, 64, device="cpu"))
    optimizer: Any = make_optimizer([parameter])
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    live = LiveBytes()
    for x in (parameter, parameter.grad, *_tensors(optimizer.state[parameter])):
        live.see(x, 0)
    with watch_results(live.see):
        optimizer.step()
    state = sum(x.nbytes for x in _tensors(optimizer.state[parameter]) if x.ndim > 0)
    return Stepping(state / parameter.numel(), float(live.peak // parameter.nbytes * FLOAT))


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [x for x in state.values() if isinstance(x, Tensor)]


def _set_tokens(config: Any, source: RandomWeights, field: str) -> None:
    """Set the size of the vocabulary and the special tokens as `load_model` does."""
    tokenizer = load_tokenizer(source, field)
    found = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in {"vocab_size": len(tokenizer), **found}.items():
        if name not in source.config:
            setattr(config, name, value)


def _used(role: Role) -> nn.Module:
    return role.model if role.outputs.logprobs else role.model.base_model


def _linear_weights(module: nn.Module) -> list[Tensor]:
    return list({id(m.weight): m.weight for m in module.modules() if isinstance(m, nn.Linear | Conv1D)}.values())
