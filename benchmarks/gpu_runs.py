"""What the checks of gpu.py share: measured numbers with their bounds, models of known shapes, and runs of the Trainer.

The models have random weights. They are written to files in bfloat16 when a check first needs them, so that every run
loads its models from files.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from models import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification

from lit_rlhf import PolicyGradient, Prompts, RandomWeights, Sampling
from lit_rlhf.models.loading import load_model

VOCABULARY = 512  # words of the tokenizer, and tokens of the small models
_SHARED = {"model_type": "qwen2", "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 1}
_SMALL = {"tie_word_embeddings": False, "initializer_range": 0.04, "vocab_size": VOCABULARY}
_LARGE = {"tie_word_embeddings": True, "rope_theta": 1e6, "vocab_size": 151_936}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, **_SMALL, **_SHARED},
    "exact": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, **_SMALL, **_SHARED},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, **_LARGE, **_SHARED},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, **_LARGE, **_SHARED},
}  # fmt: skip
"""The models; the last two have the shapes of Qwen2.5-0.5B and Qwen2.5-1.5B."""
STOP = tuple(f"t{i}" for i in range(WORDS, WORDS + 16))
"""Words that end a response: with the small models, one token in 32 is one of them."""


@dataclass(frozen=True)
class Number:
    """A measured number, or a fact in words, with the bounds that must hold.

    Args:
        name: What was measured.
        value: The number; None if it means nothing on this device.
        at_most: The largest value that is right; None for no bound.
        at_least: The smallest value that is right; None for no bound.
        unit: The unit of the value and of the bounds.
    """

    name: str
    value: float | str | None
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the number is within its bounds; None if there is no number or no bound."""
        if self.value is None or isinstance(self.value, str) or (self.at_most is None and self.at_least is None):
            return None
        enough = self.at_least is None or self.value >= self.at_least
        return enough and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and on which models.

    Args:
        device: ``cuda`` or ``cpu``.
        small: Whether to run the checks in miniature, on tiny models only.
        folder: The folder of models, prompts and runs.
    """

    device: str
    small: bool
    folder: Path

    @property
    def exact(self) -> str:
        """The name of the model for the checks of exactness."""
        return "tiny" if self.small else "exact"

    def on_gpu(self, value: float) -> float | None:
        """Return a value that means something only on a GPU, or None on another device."""
        return value if self.device == "cuda" else None


def write_models(setting: Setting, size: str) -> Path:
    """Write ``policy`` and ``reward`` of a size, unless an earlier check has done so, and return their folder."""
    folder = setting.folder / "models" / size
    if folder.exists():
        return folder
    part = folder.with_name(f"{size}-part")
    word_tokenizer(VOCABULARY).save_pretrained(part / "policy")
    policy = load_model(RandomWeights(config=SHAPES[size], tokenizer=str(part / "policy"))).bfloat16()
    policy.save_pretrained(part / "policy")
    options: dict[str, Any] = {"num_labels": 1, "dtype": torch.bfloat16}
    reward = AutoModelForSequenceClassification.from_pretrained(part / "policy", **options)
    torch.nn.init.normal_(reward.score.weight, std=0.02)
    reward.save_pretrained(part / "reward")
    word_tokenizer(VOCABULARY).save_pretrained(part / "reward")
    part.rename(folder)
    return folder


def write_prompts(setting: Setting, count: int, shortest: int, longest: int) -> str:
    """Write prompts of random words with lengths in this range, unless they exist, and return the file."""
    path = setting.folder / f"prompts-{count}-{shortest}-{longest}.jsonl"
    if not path.exists():
        drawn = torch.Generator().manual_seed(1)
        lengths = torch.randint(shortest, longest + 1, (count,), generator=drawn).tolist()
        rows = [torch.randint(WORDS, VOCABULARY, (length,), generator=drawn).tolist() for length in lengths]
        lines = (json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) for row in rows)
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def trainer(setting: Setting, *, device: str | None = None, **options: Any) -> lightning.Trainer:
    """Return a Trainer for one process on a device, by default the setting's, that writes no checkpoints."""
    warnings.filterwarnings("ignore")
    lightning.seed_everything(1, verbose=False)
    return lightning.Trainer(
        accelerator="gpu" if (device or setting.device) == "cuda" else "cpu",
        devices=1,
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit_exact(
    setting: Setting, callbacks: Sequence[lightning.Callback], *, options: dict[str, Any], **trainer_options: Any
) -> None:
    """Train the small model with PPO on 16 prompts of 1 to 24 tokens, with responses of random lengths.

    Args:
        setting: The device, and the size of the model.
        callbacks: The callbacks of the Trainer.
        options: Options of `PolicyGradient` in place of those below.
        trainer_options: Options of the Trainer, and ``device`` for a device that is not the setting's.
    """
    models = write_models(setting, setting.exact)
    sampling = Sampling(max_tokens=24 if setting.small else 64, stop=STOP)
    defaults = {"actor": f"{models}/policy", "critic": "reward", "sampling": sampling, "iterations": 1}
    made = trainer(setting, callbacks=list(callbacks), **trainer_options)
    made.fit(
        PolicyGradient(**(defaults | options)),
        datamodule=Prompts(train=write_prompts(setting, 64, 1, 24), batch_size=16),
    )
