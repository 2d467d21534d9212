"""From a checkpoint to a Hugging Face folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_model, load_tokenizer


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights (safetensors), configuration, generation configuration and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(run: Path, checkpoint: str = "last", out: Path | None = None) -> Path:
    """Write a checkpoint's actor as a Hugging Face folder.

    Args:
        run: The run's folder, with its ``config.yaml``.
        checkpoint: ``last``, ``best``, or a path.
        out: The folder to write; None: ``export`` in the run's folder.

    Returns:
        The folder written.

    Raises:
        UserError: if the run or the checkpoint does not exist, or holds no actor.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run} is no run's folder: it has no config.yaml")
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in ("last", "best") else Path(checkpoint)
    if not path.exists():
        there = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("*.ckpt"))) or "none"
        raise UserError(f"there is no checkpoint {path}; in {run / 'checkpoints'} there are: {there}")
    source = _actor_source(yaml.safe_load(config_file.read_text(encoding="utf-8")), config_file)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "actor.model."
    weights = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if not weights:
        raise UserError(f"{path} holds no actor")
    model = load_model(source, "causal", "model.actor")
    model.load_state_dict(weights)
    folder = out or run / "export"
    save_folder(model, load_tokenizer(source, "model.actor"), folder)
    return folder


def _actor_source(config: dict[str, Any], file: Path) -> ModelSource:
    source = config.get("model", {}).get("init_args", {}).get("actor")
    if not source:
        raise UserError(f"{file} names no model.actor")
    return RandomWeights(**source) if isinstance(source, dict) else source


def main(args: Sequence[str]) -> None:
    """The command ``lit-rlhf export``."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf export", description="Write a checkpoint's actor as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="the folder to write (default: RUN/export)")
    parsed = parser.parse_args(args)
    print(f"exported: {export(parsed.run, parsed.checkpoint, parsed.out)}")
