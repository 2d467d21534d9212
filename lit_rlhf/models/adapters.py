"""Low-rank adapters (LoRA) on a frozen base model, which several roles may share in memory.

A base carries one or more named adapters, and its linear layers add the outputs of the selected ones. The model that
owns the base, the actor in most methods, selects its own adapters; every other role uses the same base through an
`AdapterView` or an `AdaptedTrunk`, which selects that role's adapters during its forward passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.compat import select_adapters, selected_adapters, share_inputs
from lit_rlhf.errors import UserError
from lit_rlhf.models.quantization import Quantization
from lit_rlhf.randomness import Stream, generator

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

SOURCE = "source"
"""The name of the frozen adapter that the trained model started from."""


@dataclass(frozen=True)
class LoRA:
    """The options of a low-rank adapter: linear layers compute W x + scaling · B A x, and only A and B are trained.

    W, [out, in], is the frozen weight of a linear layer of the base; A is [rank, in], and B is [out, rank]. A has
    Kaiming uniform initialisation and B is initialised to 0, so that an untrained adapter changes nothing. There is
    no dropout, because log-probabilities could not be reproduced with it.

    Source: Hu et al. 2021 (arXiv 2106.09685), equation 3; rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732), equation 5;
    DoRA: Liu et al. 2024 (arXiv 2402.09353), equation 5; NF4: Dettmers et al. 2023 (arXiv 2305.14314), equations 5, 6.

    Args:
        rank: The rank r of B A (``r`` in peft).
        alpha: The numerator of the scaling alpha / rank (``lora_alpha`` in peft); None for twice the rank.
        target_modules: The linear layers to adapt: ``all-linear`` for all except the head, or the last parts of their
            names, such as ``[q_proj, v_proj]``.
        rslora: Whether the scaling is alpha / √rank, which keeps the size of the updates independent of the rank.
        dora: Whether the norms of the rows of the adapted weight are trained as well, as a separate vector.
        chained: The treatment of a source that is itself an adapter: ``stacked`` keeps it as a frozen adapter below the
            new one, and ``merged`` adds it to the base's weights.
        quantization: The format of the frozen weights of the base's linear layers, except the head: ``nf4`` for 4 bits
            (with the package bitsandbytes), ``int8`` for 8 bits (with torchao); None to keep the files' format. An
            exported adapter has the same form in each case, but works best with the base on which it was trained.

    Raises:
        UserError: if a number is out of range, no target module is given, or an adapter would be merged into a
            quantized base.

    >>> LoRA(rank=8, target_modules=["q_proj", "v_proj"]).scaling
    2.0
    >>> LoRA(rank=8, alpha=8).scaling
    1.0
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    chained: Literal["stacked", "merged"] = "stacked"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"model.adapter.rank must be 1 or more, not {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError(f"model.adapter.alpha must be positive, not {self.alpha}")
        if not self.target_modules:
            raise UserError("model.adapter.target_modules is empty: use all-linear, or the names of linear layers")
        if self.quantization is not None and self.chained == "merged":
            raise UserError("model.adapter.chained must be stacked if quantization is set, not merged")

    @property
    def numerator(self) -> float:
        """The numerator of the scaling: alpha, or twice the rank if alpha is None."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """The factor of B A: the numerator divided by the rank or, with rsLoRA, by the square root of the rank."""
        return self.numerator / (self.rank**0.5 if self.rslora else self.rank)

    def config(self, model: PreTrainedModel) -> LoraConfig:
        """Return these options as peft's configuration, in which the target modules are listed by name.

        Args:
            model: A model without adapters.

        Raises:
            UserError: if a target module is not a linear layer of the model, or is its head.
        """
        from peft import LoraConfig

        targets = target_names(model, self.target_modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.numerator,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )


def import_peft() -> None:
    """Import peft with the CPU as the default device, because peft makes a tensor while it is imported."""
    with torch.device("cpu"):
        import peft  # noqa: F401


def target_names(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Return the last parts of the names of the linear layers to adapt, in alphabetical order.

    Args:
        model: A model without adapters.
        targets: ``all-linear`` for all linear layers except the head, or the last parts of the names of linear layers.

    Raises:
        UserError: if a name belongs to no linear layer, or to the head.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **shape))
    >>> target_names(model, "all-linear")
    ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if module is not head and is_linear(module)]
    last_parts = sorted({name.rpartition(".")[2] for name in linear})
    if targets == "all-linear":
        return last_parts
    chosen = [targets] if isinstance(targets, str) else list(targets)
    for target in chosen:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(
                f"model.adapter.target_modules: {target} is not a linear layer of {type(model).__name__} that can be "
                f"adapted; it has {', '.join(last_parts)}"
            )
    return sorted(chosen)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, quantized or not."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes' layers derive from nn.Linear


def add_adapter(model: PreTrainedModel, name: str, config: LoraConfig, number: int = 0) -> None:
    """Add an adapter to a model in place; the adapter's output is 0 at first, and all parameters are frozen.

    Args:
        model: The model, which may have other adapters, and whose weights need not have been read yet.
        name: The adapter's name.
        config: The adapter's options, in which the target modules are listed by name.
        number: The number of the adapter in the run, which seeds the adapter's initial weights.

    Raises:
        UserError: if peft cannot adapt one of the layers.
    """
    from peft import inject_adapter_in_model

    from lit_rlhf.models.adapted_linear import use_sums

    with torch.device("cpu"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft recognises GPT-2
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # about earlier roles
        try:
            inject_adapter_in_model(config, model, name)
        except ValueError as error:
            raise UserError(f"model.adapter: {' '.join(str(error).split())[:300]}") from error
        torch.manual_seed(generator(Stream.ADAPTERS, number).initial_seed())
        _initialize(model, name)
    use_sums(model)
    share_inputs(adapted_layers(model))
    model.requires_grad_(False)


def _initialize(model: nn.Module, name: str) -> None:
    """Draw the initial weights of an adapter, which are the same whether or not the base's weights have been read.

    DoRA's magnitudes get memory, but no values, if the base's weights have not been read: a saved adapter has its own.
    """
    for layer in adapted_layers(model):
        if name not in layer.lora_A:
            continue
        for part in (layer.lora_A[name], layer.lora_B[name], *layer.lora_magnitude_vector.values()):
            if any(parameter.is_meta for parameter in part.parameters()):  # because the base's weights are
                part.to_empty(device="cpu")
        layer.reset_lora_parameters(name, True)


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the layers of a model that carry adapters; an empty list if the model has no adapters."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]  # type: ignore[misc]


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter, by the names that they have in the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name and adapter in name.split(".")
    }


class Owner(Protocol):
    """The attributes of the base's owner, an `Actor`, that a view uses."""

    model: Any

    def run_trunk(self, **inputs: Any) -> Any:
        """Return the output of the base's trunk with the adapters that are selected."""


class AdaptedTrunk(nn.Module):
    """The trunk of a base with a role's adapters; it has no parameters of its own.

    Args:
        owner: The model that owns the base. It runs the trunk, so that a strategy can gather sharded weights.
        adapters: The names of the role's adapters; empty for the base alone.
    """

    def __init__(self, owner: Owner, adapters: Sequence[str]) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that the owner does not become a submodule
        self.adapters = tuple(adapters)
        self.layers = tuple(adapted_layers(owner.model))

    @property
    def owner(self) -> Any:
        """The model that owns the base."""
        return self._owner[0]

    @property
    def config(self) -> Any:
        """The configuration of the base."""
        return self.owner.model.config

    def forward(self, **inputs: Any) -> Any:
        """Return the trunk's output with the role's adapters; the arguments are those of the trunk."""
        with selected(self.layers, self.adapters):
            return self.owner.run_trunk(**inputs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's input embedding."""
        return self.owner.model.get_input_embeddings()


class AdapterView(nn.Module):
    """A base with a role's adapters, used in place of a causal language model; it has no parameters of its own.

    Args:
        owner: The model that owns the base.
        adapters: The names of the role's adapters; empty for the base alone.

    >>> from lit_rlhf.models.actor import Actor
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).eval()
    >>> add_adapter(model, "actor", LoRA(rank=2).config(model))
    >>> actor = Actor(model)
    >>> reference = Actor(AdapterView(actor, adapters=()))
    >>> tokens, mask = torch.tensor([[2, 6, 7]]), torch.tensor([[False, False, True]])
    >>> torch.equal(reference(tokens, mask).logprobs, actor(tokens, mask).logprobs)  # B is 0
    True
    """

    def __init__(self, owner: Owner, adapters: Sequence[str]) -> None:
        super().__init__()
        self.base_model = AdaptedTrunk(owner, adapters)

    @property
    def base(self) -> PreTrainedModel:
        """The base, with the adapters of all roles."""
        return self.base_model.owner.model

    @property
    def config(self) -> Any:
        """The configuration of the base."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return self.base.device

    @property
    def generation_config(self) -> Any:
        """The generation configuration of the base."""
        return getattr(self.base, "generation_config", None)

    def get_output_embeddings(self) -> Any:
        """Return the base's language-model head."""
        return self.base.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        """Return the base's input embedding."""
        return self.base.get_input_embeddings()


def active_adapters(model: Any) -> tuple[str, ...]:
    """Return the names of the selected adapters of a model with adapters, or of the adapters of a view."""
    return model.base_model.adapters if isinstance(model, AdapterView) else selected_adapters(adapted_layers(model)[0])


def whole_model(model: Any) -> Any:
    """Return a view's base, which carries the adapters of all roles, or the model itself if it is not a view."""
    return model.base if isinstance(model, AdapterView) else model


@contextmanager
def selected(layers: Sequence[LoraLayer], adapters: Sequence[str]) -> Iterator[None]:
    """Select only the given adapters in a model's layers inside this context.

    Nothing is copied, and whether a parameter is trained does not change.

    Args:
        layers: The adapted layers of the model, at least one.
        adapters: The names of the adapters; empty for the base alone.
    """
    before = selected_adapters(layers[0])
    select_adapters(layers, adapters)
    try:
        yield
    finally:
        select_adapters(layers, before)


def selected_by(model: Any) -> AbstractContextManager[None]:
    """Return a context in which a view's adapters are selected, or one without effect if the model is not a view."""
    if isinstance(model, AdapterView):
        return selected(model.base_model.layers, model.base_model.adapters)
    return nullcontext()


@contextmanager
def merged_weight(layer: LoraLayer) -> Iterator[Tensor]:
    """Yield a layer's weight with its selected adapters added to it; after the context, the layer is as before."""
    from lit_rlhf.models.adapted_linear import AdaptedLinear

    base: Any = layer.get_base_layer()
    adapters = [name for name in selected_adapters(layer) if name in layer.lora_A]
    if isinstance(layer, AdaptedLinear) and layer.has_plain(adapters):  # peft's way takes several times as long
        yield layer.summed_weight(adapters).detach()
        return
    weight = base.weight.data
    layer.merge(safe_merge=True, adapter_names=adapters)
    try:
        yield base.weight.data
    finally:
        base.weight.data = weight
        layer.merged_adapters.clear()
