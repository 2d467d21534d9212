"""Hugging Face models and tokenizers by folder, hub id, or a configuration for random weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_rlhf.errors import UserError
from lit_rlhf.models.attention import use_unpadded_attention
from lit_rlhf.references import is_reference, load_reference

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class RandomWeights:
    """A model built from a configuration, with random weights.

    Args:
        config: The fields of a transformers configuration, ``model_type`` among them; vocabulary size and special
            token ids are the tokenizer's unless given.
        tokenizer: A folder, a hub id, or ``module:function`` that returns a tokenizer.
        seed: The weights are a function of this number and the configuration.
    """

    config: dict[str, Any]
    tokenizer: str
    seed: int = 0


ModelSource: TypeAlias = str | RandomWeights
"""A folder or hub id, or a configuration for random weights."""
Task: TypeAlias = Literal["causal", "score"]
_AUTO = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}


def load_tokenizer(source: ModelSource, field: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-sequence token where it has none).

    Args:
        source: Folder or hub id, or random weights, which name their tokenizer.
        field: The configuration field, for messages.

    Raises:
        UserError: if the folder is missing, has no tokenizer, or the tokenizer no end-of-sequence token.
    """
    path = source if isinstance(source, str) else source.tokenizer
    if is_reference(path):
        tokenizer = load_reference(path, field)()
    else:
        check_exists(path, field)
        try:
            tokenizer = _tokenizer_class(path).from_pretrained(path)
        except Exception as error:  # transformers raises many types here
            if os.path.isdir(path):
                raise UserError(f"{field}: the folder {path} has no tokenizer that transformers can load") from error
            raise _unreachable(path, field, error) from error
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # without its files, transformers makes one up
            raise UserError(f"{field}: the folder {path} has no tokenizer that transformers can load")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{field}: the tokenizer of {path} has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: ModelSource, task: Task = "causal", field: str = "model") -> PreTrainedModel:
    """The model in float32 on the CPU, in eval mode: dropout stays off in every stage.

    On the CPU whatever the default device is, so that random weights are the same on every device, and because
    transformers takes a default device for a ``device_map``, which needs the package accelerate. Lightning makes its
    device the default in ``configure_model``, and moves the models there afterwards.

    Args:
        source: Folder, hub id, or random weights.
        task: ``causal`` for a language model, ``score`` for a sequence classifier with one label.
        field: The configuration field, for messages.

    Raises:
        UserError: if there is no such model, or a reward model has not exactly one label.
    """
    with torch.device("cpu"):
        if isinstance(source, RandomWeights):
            model = _random_model(source, task, field)
        else:
            model = _pretrained_model(source, task, field)
        if task == "score" and model.config.num_labels != 1:
            raise UserError(f"{field}: a reward model has one label, {source} has {model.config.num_labels}")
        model.eval()
        use_unpadded_attention(model)
    return model


def check_exists(path: str, field: str) -> None:
    """Tell a missing folder from a hub id.

    Raises:
        UserError: if the path can only be a folder, and there is none.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_absolute()
    if not os.path.isdir(path) and (looks_local or os.path.exists(path)):
        what = "is a file, not a model folder" if os.path.isfile(path) else "does not exist"
        raise UserError(f"{field}: the model folder {path} {what}")


def read_config(source: ModelSource, field: str = "model") -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: if there is none, or its model_type is unknown to transformers.
    """
    if isinstance(source, str):
        check_exists(source, field)
        try:
            return AutoConfig.from_pretrained(source)
        except Exception as error:
            if os.path.isdir(source):
                what = f"{source} has no config.json that transformers can load"
                raise UserError(f"{field}: {what}: {_reason(error)}") from error
            raise _unreachable(source, field, error) from error
    if "model_type" not in source.config:
        raise UserError(f"{field}.config: model_type is missing (llama, qwen3, gpt2, …)")
    try:
        return AutoConfig.for_model(**source.config)
    except Exception as error:  # ValueError, and a validation error that is none
        raise UserError(f"{field}.config: {_reason(error)}") from error


def _tokenizer_class(path: str) -> Any:
    """The class a folder names, where it names the general one; else AutoTokenizer's choice.

    AutoTokenizer chooses by the model's type: beside a Qwen model it would read any tokenizer.json as Qwen's own.
    """
    config = Path(path) / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else None
    return PreTrainedTokenizerFast if named in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


def _pretrained_model(path: str, task: Task, field: str) -> PreTrainedModel:
    config = read_config(path, field)
    if os.path.isdir(path) and not any(any(Path(path).glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{field}: the folder {path} has a config.json but no weights")
    role = "language model" if task == "causal" else "sequence classifier"
    try:
        model, report = _AUTO[task].from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except OSError as error:
        raise _unreachable(path, field, error) from error
    except Exception as error:  # the wrong kind of model, or a broken file of weights
        raise UserError(f"{field}: {path} cannot be loaded as a {role}: {_reason(error)}") from error
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise UserError(f"{field}: {name} of {path} is {list(found)}, by its config.json it should be {list(expected)}")
    if report["missing_keys"]:
        raise UserError(f"{field}: {path} is no {role}: it has no {min(report['missing_keys'])}")
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
            return _AUTO[task].from_config(config, dtype=torch.float32)
        except ValueError as error:
            role = "language model" if task == "causal" else "sequence classifier"
            raise UserError(f"{field}.config: no {role}: {_reason(error)}") from error


def _unreachable(path: str, field: str, error: Exception) -> UserError:
    return UserError(f"{field}: {path!r} is neither a folder nor a model that the hub gave: {_reason(error)}")


def _reason(error: Exception, longest: int = 300) -> str:
    """What the error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} …"
