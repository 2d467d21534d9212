"""Loading of Hugging Face models and tokenizers from a folder, a hub id, or a configuration for random weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapter_folders import base_of, find_adapter, merge_adapter, read_adapter
from lit_rlhf.models.quantization import Quantization, prepare_quantized, quantization_config
from lit_rlhf.models.unpadded import use_unpadded_attention
from lit_rlhf.models.weights import (
    current_unread_weights,
    local_folder,
    parameters_on_meta,
    weights_at_once,
    with_weights,
)
from lit_rlhf.references import is_reference, load_reference

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
MOST_ADDED_TOKENS = 50_000
"""The maximum number of tokens that a folder's tokenizer adds to its vocabulary; many more take minutes to load."""


@dataclass(frozen=True)
class RandomWeights:
    """The description of a model with random weights.

    Args:
        config: The fields of a transformers configuration, including ``model_type``. The vocabulary size and the
            special token ids are the tokenizer's unless these fields give them.
        tokenizer: A folder, a hub id, or ``module:function`` for a function that returns a tokenizer.
        seed: The seed of the weights, which depend only on the seed and the configuration.

    >>> shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
    >>> model = load_model(RandomWeights(config=shape, tokenizer="lit_rlhf.data.reviews:tokenizer"))
    >>> model.config.n_embd
    8
    """

    config: dict[str, Any]
    tokenizer: str
    seed: int = 0


ModelSource: TypeAlias = str | RandomWeights
"""A folder or a hub id, of a whole model or of an adapter, or a configuration for random weights."""
Task: TypeAlias = Literal["causal", "score"]
_AUTO = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}


def load_tokenizer(source: ModelSource, field: str = "model") -> PreTrainedTokenizerBase:
    """Load a tokenizer, and make it pad with the end-of-sequence token if it has no padding token.

    Args:
        source: A folder, a hub id, or a configuration for random weights, which names its tokenizer. If an adapter has
            no tokenizer, the tokenizer of its base is loaded.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the tokenizer cannot be loaded, or has no end-of-sequence token.
    """
    path = source if isinstance(source, str) else source.tokenizer
    if find_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path)
    if is_reference(path):
        tokenizer = load_reference(path, field)()
    else:
        check_exists(path, field)
        _check_added_tokens(Path(path), field)
        try:
            tokenizer = _tokenizer_class(path).from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers raises exceptions of many types here
            if os.path.isdir(path):
                reason = f": {OWN_CODE}" if _needs_own_code(error) else ""
                message = f"{field}: the folder {path} has no tokenizer that transformers can load{reason}"
                raise UserError(message) from error
            raise _unreachable(path, field, error) from error
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers made up an empty tokenizer
            raise UserError(f"{field}: the folder {path} has no tokenizer that transformers can load")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{field}: the tokenizer of {path} has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: ModelSource, task: Task = "causal", field: str = "model", quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load a model in float32 on the CPU and in eval mode, because dropout is off in every stage.

    The CPU is used whatever the default device is. Random weights are therefore the same on every device, and
    transformers does not use the default device as a ``device_map``, which would require the accelerate package.
    Lightning makes its device the default in ``configure_model``; the models are moved to it afterwards. Inside
    `unread_weights`, the parameters of a model that is read from files are on the meta device where possible. Quantized
    models are an exception: they are loaded on the default device, where transformers quantizes their weights.

    Args:
        source: A folder, a hub id, or a configuration for random weights. An adapter is merged into its base.
        task: ``causal`` for a language model, ``score`` for a sequence classifier with one label; the base of an
            adapter is always loaded as a language model.
        field: The name of the configuration field, for error messages.
        quantization: The format to which the linear layers of a whole model from a folder or the hub are quantized;
            None to leave them as they are.

    Raises:
        UserError: if the model, or the tokenizer that random weights need, cannot be loaded, if a sequence classifier
            does not have exactly one label, or if the model is quantized in a way that is not supported.
    """
    device = torch.get_default_device() if quantization or _is_quantized(source, field) else torch.device("cpu")
    with torch.device("cpu"):
        if isinstance(source, RandomWeights):
            model = _random_model(source, task, field)
        elif find_adapter(source):
            return _merged_model(source, field)
        else:
            unread = None if quantization else _unread_model(source, task, field)
            model = unread or _pretrained_model(source, task, field, quantization, device)
        if task == "score" and model.config.num_labels != 1:
            raise UserError(f"{field}: a reward model has one label, but {source} has {model.config.num_labels}")
        model.eval()
        use_unpadded_attention(model)
    return model


def check_exists(path: str, field: str) -> None:
    """Check that a path is an existing folder, unless the path could be a hub id.

    Args:
        path: The path or the hub id.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the path is a file, or does not exist and cannot be a hub id.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_absolute()
    if not os.path.isdir(path) and (looks_local or os.path.exists(path)):
        what = "is a file, not a model folder" if os.path.isfile(path) else "does not exist"
        raise UserError(f"{field}: the model folder {path} {what}")


def read_config(source: ModelSource, field: str = "model") -> PretrainedConfig:
    """Load the configuration of a model or, for an adapter, of the adapter's base.

    Args:
        source: A folder, a hub id, or a configuration for random weights.
        field: The name of the configuration field, for error messages.

    Raises:
        UserError: if the configuration cannot be loaded, or its ``model_type`` is missing or unknown to transformers.
    """
    if isinstance(source, str):
        check_exists(source, field)
        source = base_of(source)
        check_exists(source, field)
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            if os.path.isdir(source):
                what = f"{source} has no config.json that transformers can load"
                raise UserError(f"{field}: {what}: {_reason(error)}") from error
            raise _unreachable(source, field, error) from error
    if "model_type" not in source.config:
        raise UserError(f"{field}.config: model_type is missing (llama, qwen3, gpt2, …)")
    try:
        return AutoConfig.for_model(**source.config)
    except Exception as error:  # ValueError, or a validation error of another type
        raise UserError(f"{field}.config: {_reason(error)}") from error


def _tokenizer_class(path: str) -> Any:
    """Return the generic tokenizer class if the folder's tokenizer configuration names it, otherwise AutoTokenizer.

    AutoTokenizer chooses by model type: in the folder of a Qwen model, it would read any tokenizer.json as Qwen's.
    """
    config = Path(path) / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else None
    return PreTrainedTokenizerFast if named in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


def _pretrained_model(
    path: str, task: Task, field: str, quantization: Quantization | None, device: torch.device
) -> PreTrainedModel:
    config = read_config(path, field)
    options = _quantized_options(config, quantization, path, device)
    if os.path.isdir(path) and not any(any(Path(path).glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{field}: the folder {path} has a config.json but no weights")
    role = "language model" if task == "causal" else "sequence classifier"
    try:
        model, report = _AUTO[task].from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except OSError as error:
        raise _unreachable(path, field, error) from error
    except Exception as error:  # another kind of model, or a damaged weights file
        raise UserError(f"{field}: {path} cannot be loaded as a {role}: {_reason(error)}") from error
    if report["mismatched_keys"]:
        name, shape, expected = min(report["mismatched_keys"])
        raise UserError(
            f"{field}: {name} of {path} has shape {list(shape)}; by its config.json it should be {list(expected)}"
        )
    if report["missing_keys"]:
        raise UserError(f"{field}: {path} is not a {role}: it has no {min(report['missing_keys'])}")
    if options:
        prepare_quantized(model, field)
    return model


def _is_quantized(source: ModelSource, field: str) -> bool:
    """Return whether the source is a whole model whose files hold quantized weights."""
    if not isinstance(source, str) or find_adapter(source):
        return False
    return getattr(read_config(source, field), "quantization_config", None) is not None


def _quantized_options(
    config: Any, quantization: Quantization | None, path: str, device: torch.device
) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` for a quantized model; an empty dictionary if it is not quantized.

    Raises:
        UserError: if the model is to be quantized, but the package is missing, or the files are quantized already.
    """
    in_files = getattr(config, "quantization_config", None) is not None
    if quantization is None:
        return {"device_map": {"": device}} if in_files else {}
    if in_files:
        raise UserError(f"model.adapter.quantization is {quantization}, but {path} is quantized already: leave it out")
    return {"device_map": {"": device}, "quantization_config": quantization_config(quantization)}


def _merged_model(source: str, field: str) -> PreTrainedModel:
    """Load the base of an adapter as a causal language model, and add the adapter to its weights."""
    saved = read_adapter(source, field)
    with weights_at_once():
        return merge_adapter(load_model(saved.base, "causal", field), saved, field).eval()


def _unread_model(path: str, task: Task, field: str) -> PreTrainedModel | None:
    """Build a model whose weights are read later, through the active `unread_weights`.

    Return None if no such context is active, or if the weights cannot be read later.

    Raises:
        UserError: if such a context is active and the model's configuration cannot be loaded.
    """
    unread = current_unread_weights()
    if unread is None:
        return None
    config = read_config(path, field)
    try:
        folder = local_folder(path)
        with parameters_on_meta():
            model = _AUTO[task].from_config(config, dtype=torch.float32, trust_remote_code=False)
        with_weights(model)  # an error should occur here, not in later checks of the architecture
    except Exception:  # loading the model with its weights will give the reason
        return None
    known_head = task == "causal" or isinstance(getattr(model, "score", None), nn.Linear)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized or not known_head or not unread.add(model, folder):
        return None
    if task == "score":
        unread.read_now(model.score)  # the head is small, and a critic that starts from this model rescales it
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _random_model(source: RandomWeights, task: Task, field: str) -> PreTrainedModel:
    tokenizer = load_tokenizer(source, field)
    config = read_config(source, field)
    if "vocab_size" not in source.config:
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in source.config:
            setattr(config, name, getattr(tokenizer, name))
    if task == "score":
        config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        try:
            return _AUTO[task].from_config(config, dtype=torch.float32, trust_remote_code=False)
        except ValueError as error:
            role = "language model" if task == "causal" else "sequence classifier"
            raise UserError(f"{field}.config: not a {role}: {_reason(error)}") from error


def _unreachable(path: str, field: str, error: Exception) -> UserError:
    return UserError(f"{field}: {path!r} is neither a folder nor a model that the hub provides: {_reason(error)}")


OWN_CODE = (
    "it needs Python code of its own (auto_map), which lit-rlhf never executes; use a model of an architecture that "
    "transformers knows"
)
"""Why a model or a tokenizer is refused that comes with code."""


def _needs_own_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _check_added_tokens(folder: Path, field: str) -> None:
    """Check that the tokenizer in a folder does not add too many tokens; nothing is checked if there is no such folder.

    Raises:
        UserError: if it does.
    """
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if path.is_file() and (count := path.read_bytes().count(b'"lstrip"')) > MOST_ADDED_TOKENS:
            raise UserError(f"{field}: {path} adds {count} tokens; the maximum is {MOST_ADDED_TOKENS}")


def _reason(error: Exception, longest: int = 300) -> str:
    """Return an error's message (or its type, if there is no message) on one line, cut to ``longest`` characters."""
    if _needs_own_code(error):
        return OWN_CODE
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} …"
