"""From a run to a Hugging Face folder: weights, tokenizer, generation configuration, model card."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import lit_rlhf
from lit_rlhf.checkpoints import read_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_model, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel, load_critic, to_classifier, under

Role = Literal["actor", "critic", "reward"]


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Weights (safetensors), configuration, generation configuration, tokenizer and model card.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where.
        card: The model card, in Markdown.
        weights: The model's whole ``state_dict``; None: what it holds.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def export(run: Path, checkpoint: str = "last", out: Path | None = None, role: Role | None = None) -> Path:
    """Write a checkpoint's model as a Hugging Face folder.

    Args:
        run: The run's folder, with its ``config.yaml``.
        checkpoint: ``last``, ``best``, or a path.
        out: The folder to write; None: ``export`` in the run's folder, or ``export_ROLE`` for another than its own.
        role: ``actor``, ``critic`` or ``reward``; None: what the run trained.

    Returns:
        The folder written.

    Raises:
        UserError: if the run or the checkpoint does not exist, or holds no such model.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run} is no run's folder: it has no config.yaml")
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in ("last", "best") else Path(checkpoint)
    if not path.exists():
        there = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("*.ckpt"))) or "none"
        raise UserError(f"there is no checkpoint {path}; in {run / 'checkpoints'} there are: {there}")
    options = yaml.safe_load(config_file.read_text(encoding="utf-8")).get("model", {}).get("init_args", {})
    state = read_checkpoint(path)["state_dict"]
    own: Role = "reward" if "reward" in options else "actor"
    role = role or own
    source = _source(options, own, config_file)
    tokenizer = load_tokenizer(source, f"model.{own}")
    if role == "actor":
        model = _actor(source, state, path)
    else:
        model = to_classifier(_scalar(options, source, state, path, role), tokenizer)
        if "score_std" in state and torch.isfinite(state["score_std"]):
            model.config.score_mean, model.config.score_std = float(state["score_mean"]), float(state["score_std"])
    folder = out or run / ("export" if role == own else f"export_{role}")
    save_folder(model, tokenizer, folder, model_card(run, role, int(state["iteration"])))
    return folder


def model_card(run: Path, role: str, iterations: int) -> str:
    """What a folder's model is and how it was trained, in Markdown.

    Args:
        run: The run's folder; its ``config.yaml`` is quoted, if it has one.
        role: ``actor``, ``critic`` or ``reward``.
        iterations: How many the model has seen.
    """
    file = run / "config.yaml"
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = config.get("model", {})
    method = str(model.get("class_path", "lit-rlhf")).rpartition(".")[2]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if role == "actor" else "text-classification",
        "tags": ["lit-rlhf", method],
    }
    said = {
        "actor": "A language model, `AutoModelForCausalLM`",
        "critic": "A critic, `AutoModelForSequenceClassification`: it predicts the return from the last token on, "
        "less `config.value_bias`",
        "reward": "A reward model, `AutoModelForSequenceClassification`: it scores a prompt with its response",
    }[role]
    quoted = yaml.safe_dump(
        {k: config[k] for k in ("seed_everything", "model", "data") if k in config}, sort_keys=False
    )
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {run.name}: {role}\n\n"
        f"{said}, trained by `{method}` of lit-rlhf {lit_rlhf.__version__} (torch {torch.__version__}, transformers "
        f"{transformers.__version__}) for {iterations} iterations.\n\n## Configuration\n\n```yaml\n{quoted}```\n"
    )


def _actor(source: ModelSource, state: dict[str, Tensor], path: Path) -> PreTrainedModel:
    model = load_model(source, "causal", "model.actor")
    model.load_state_dict(_under("actor.model.", state, path, "actor"))
    return model


def _scalar(
    options: dict[str, Any], source: ModelSource, state: dict[str, Tensor], path: Path, role: str
) -> ScalarModel:
    if role == "critic" and options.get("critic") == "shared":
        trunk = Actor(_actor(source, state, path), shared_critic=True)
        assert trunk.value_head is not None
        trunk.value_head.load_state_dict(_under("actor.value_head.", state, path, role))
        return ScalarModel(trunk.model.base_model, trunk.value_head)
    weights = _under(f"{role}.", state, path, role)
    start = options.get(role)
    if role == "critic" and start == "actor":
        start = source
    elif role == "critic" and start == "reward":
        models = [r["init_args"]["model"] for r in options["rewards"] if r["class_path"].endswith("RewardModel")]
        start = models[0]
    scalar = load_critic(_as_source(start), f"model.{role}", bias="head.bias" in weights)
    if "head.bias" in weights and scalar.head.bias is None:  # a critic in the units of a normalised reward model
        scalar.head.bias = nn.Parameter(torch.zeros(1))
    scalar.load_state_dict(weights)
    return scalar


def _under(prefix: str, state: dict[str, Tensor], path: Path, role: str) -> dict[str, Tensor]:
    weights = under(prefix, state)
    if not weights:
        raise UserError(f"{path} holds no {role}")
    return weights


def _source(options: dict[str, Any], role: str, file: Path) -> ModelSource:
    if not options.get(role):
        raise UserError(f"{file} names no model.{role}")
    return _as_source(options[role])


def _as_source(value: Any) -> ModelSource:
    return RandomWeights(**value) if isinstance(value, dict) else value


def main(args: Sequence[str]) -> None:
    """The command ``lit-rlhf export``."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf export", description="Write a checkpoint's model as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path (default: %(default)s)")
    parser.add_argument("--role", choices=get_args(Role), default=None, help="which model (default: what was trained)")
    parser.add_argument("--out", type=Path, default=None, help="the folder to write (default: RUN/export)")
    parsed = parser.parse_args(args)
    transformers_logging.disable_progress_bar()
    print(f"exported: {export(parsed.run, parsed.checkpoint, parsed.out, parsed.role)}")
