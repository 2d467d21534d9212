"""A model and its part in a run; models are built without weights to count their parameters."""

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
from lit_rlhf.models.adapters import adapter_parameters
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_tokenizer, read_config
from lit_rlhf.models.sharding import decoder_layers
from lit_rlhf.planning.dry_run import LiveBytes, Outputs, Rounding, held_in_half

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
        name: ``actor``, ``critic``, ``reference``, ``reward`` or, for a shared base model, ``base``.
        model: The model on the meta device; it may have a head that the role does not use.
        outputs: The outputs that the passes of the model compute.
        max_tokens: The maximum number of tokens in a pass, including padding.
        stepping: The bytes that the optimizer needs for each trained parameter; None for a frozen model.
        own: With a shared base model, the names of those adapters that no other role has; None for a whole model.
    """

    name: str
    model: PreTrainedModel
    outputs: Outputs
    max_tokens: int
    stepping: Stepping | None = None
    own: tuple[str, ...] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the model has gradients."""
        return self.stepping is not None

    @property
    def parameters(self) -> int:
        """The number of parameters that only this role uses, including those of its value head."""
        return self.value_head + sum(parameter.numel() for parameter in _own_parameters(self))

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        if self.stepping is None:
            return 0
        return self.value_head + sum(x.numel() for x in _own_parameters(self) if x.requires_grad)

    @property
    def value_head(self) -> int:
        """The number of parameters of the value head; 0 if the role computes no values."""
        return self.model.config.hidden_size + 1 if self.outputs.values else 0

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(list(decoder_layers(self.model)))

    @property
    def largest_layer(self) -> int:
        """The number of parameters of the largest decoder layer, including its adapters."""
        return max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(self.model))

    @property
    def largest_trained_layer(self) -> int:
        """The number of trained parameters of the decoder layer that has the most."""
        layers = decoder_layers(self.model)
        return max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)

    @property
    def multiplied(self) -> int:
        """The number of weights in the linear layers below the head, all of which a pass uses for every token."""
        return sum(weight.numel() for weight in _linear_weights(self.model.base_model))

    @property
    def head(self) -> int:
        """The number of weights in the language-model head, even if tied to the embedding; 0 if it is not used."""
        head: Any = self.model.get_output_embeddings() if self.outputs.logprobs else None
        return 0 if head is None else head.weight.numel()


def weight_bytes(role: Role, rounding: Rounding) -> int:
    """Return the bytes of a role's weights: bfloat16 for those that `held_in_half` returns, float32 for all others."""
    own = {id(parameter) for parameter in _own_parameters(role)}
    rounded = sum(x.numel() for x in held_in_half(_used(role), rounding) if id(x) in own)
    return FLOAT * (role.parameters - rounded) + HALF * rounded


def whole(name: str, source: ModelSource, outputs: Outputs, max_tokens: int, stepping: Stepping | None = None) -> Role:
    """Return a role with a model of its own; the arguments are those of `Role`, with ``source`` instead of ``model``.

    Raises:
        UserError: if the model's configuration or tokenizer cannot be loaded.
    """
    model = without_weights(source, f"model.{name}", outputs)
    return Role(name=name, model=model, outputs=outputs, max_tokens=max_tokens, stepping=stepping)


def without_weights(source: ModelSource, field: str, outputs: Outputs) -> PreTrainedModel:
    """Build a model on the meta device, where its tensors have no memory.

    Args:
        source: A folder, a hub id, or a configuration for random weights.
        field: The name of the configuration field, for error messages.
        outputs: The outputs that the model is to compute. If they include no log-probabilities, and the configuration
            is that of a sequence classifier, the result is a sequence classifier; otherwise, it is a causal language
            model.

    Raises:
        UserError: if the configuration, or the tokenizer of random weights, cannot be loaded, or if the configuration
            is not that of a language model.

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
            return kind.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
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
    """Set the vocabulary size and the special tokens in a configuration, as `load_model` does."""
    tokenizer = load_tokenizer(source, field)
    found = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in {"vocab_size": len(tokenizer), **found}.items():
        if name not in source.config:
            setattr(config, name, value)


def _own_parameters(role: Role) -> list[nn.Parameter]:
    if role.own is None:
        return list(_used(role).parameters())
    return [x for name in role.own for x in adapter_parameters(role.model, name).values()]


def _used(role: Role) -> nn.Module:
    return role.model if role.outputs.logprobs else role.model.base_model


def _linear_weights(module: nn.Module) -> list[Tensor]:
    return list({id(m.weight): m.weight for m in module.modules() if isinstance(m, nn.Linear | Conv1D)}.values())
