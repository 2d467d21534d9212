"""Base models with the adapters of several roles, which a run with `LoRA` loads in place of whole models."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from transformers import PreTrainedModel

from lit_rlhf.compat import select_adapters
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import new_value_head
from lit_rlhf.models.adapter_folders import SavedAdapter, add_saved_adapter, base_of, find_adapter, read_adapter
from lit_rlhf.models.adapters import SOURCE, LoRA, adapted_layers, adapter_parameters, add_adapter, import_peft
from lit_rlhf.models.loading import ModelSource, load_model
from lit_rlhf.models.scoring import ScalarModel, saved_head
from lit_rlhf.models.weights import weights_at_once


def starts_from(source: ModelSource, lora: LoRA) -> tuple[str, ...]:
    """Return the names of the frozen adapters below the trained ones: `SOURCE` for a stacked source, or none."""
    return (SOURCE,) if find_adapter(source) and lora.chained == "stacked" else ()


def load_adapted(
    source: ModelSource,
    lora: LoRA,
    field: str,
    *,
    trained: Sequence[str],
    copies: Sequence[str] = (),
    saved: Mapping[str, SavedAdapter] | None = None,
) -> PreTrainedModel:
    """Load a frozen base with the adapters of several roles; select the first trained adapter and those below it.

    Args:
        source: The folder or the hub id of a whole model or of an adapter; ``lora.chained`` says what happens to an
            adapter.
        lora: The options of the new adapters.
        field: The name of the configuration field of the source, for error messages.
        trained: The names of the new adapters that are trained.
        copies: The names of further new adapters, which are not trained.
        saved: Saved adapters of the same base, by name; they are not trained.

    Raises:
        UserError: if the model or an adapter cannot be loaded, if the model has no layers for the new adapters, if the
            source is random weights, or if the source is an adapter and either it or the new adapters use DoRA.

    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_tiny_model(folder)
    ...     model = load_adapted(folder, LoRA(rank=2), "model.actor", trained=["actor", "critic"])
    >>> sum(parameter.requires_grad for parameter in model.parameters()) == 2 * 2 * len(adapted_layers(model))
    True
    """
    if not isinstance(source, str):
        raise UserError(f"{field}: an adapter needs a base with weights: a folder or a hub id, not random weights")
    import_peft()
    starts = starts_from(source, lora)
    start = read_adapter(source, field) if find_adapter(source) else None
    if start is not None and (lora.dora or start.config.use_dora):
        raise UserError(
            f"{field}: DoRA cannot be combined with another adapter; first merge {source} (lit-rlhf export --merge)"
        )
    with weights_at_once() if lora.dora else nullcontext():  # DoRA starts from the norms of the weights
        model = load_model(base_of(source) if starts else source, "causal", field, lora.quantization)
    config = lora.config(model)
    for number, name in enumerate((*trained, *copies)):
        add_adapter(model, name, config, number)
    for name, adapter in {**(saved or {}), **({SOURCE: start} if starts and start is not None else {})}.items():
        add_saved_adapter(model, name, adapter, field)
    select_adapters(adapted_layers(model), (*starts, trained[0]))
    for name in trained:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(True)
    return model.eval()


def load_adapted_reward_model(source: ModelSource, lora: LoRA, field: str) -> ScalarModel:
    """Load a base with a new adapter and a scalar head, both of which are trained.

    Args:
        source: The folder or the hub id of a whole language model or of an adapter. If the adapter is a reward model's,
            its head is trained further; otherwise, a new head is initialised to 0.
        lora: The options of the new adapter.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the base or an adapter cannot be loaded (see `load_adapted`), or if a saved head does not have
            exactly one output.
    """
    model = load_adapted(source, lora, field, trained=["reward"])
    start = read_adapter(str(source), field) if find_adapter(source) else None
    has_head = start is not None and start.head is not None
    head = saved_head(start, field) if start is not None and has_head else new_value_head(model, bias=False)
    return ScalarModel(model.base_model, head, adapter="reward")
