"""The configuration in the folder of a run, and what a resumed run has changed in it, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from lit_rlhf.callbacks.logged_runs import log_config
from lit_rlhf.files import write_text
from lit_rlhf.modules.module import iteration_of

SHOWN = 10
"""The number of changes that are listed; of further ones, only the number is given."""
UNSAID = ("ckpt_path", "trainer.default_root_dir", "trainer.enable_", "plan.", "report.", "summary.")
"""The beginnings of the names of options that change nothing in the run but what it prints, or its folder."""
POSITION = "the position in the data is kept as a number of batches"
REMARKS = {
    "data.batch_size": POSITION,
    "data.train": POSITION,
    "AdaptiveKL.coef": "the adapted coefficient of the checkpoint continues",
    "EarlyStopping.patience": "Lightning keeps that of the checkpoint",
    "KLPenalty.beta": "if β is adaptive, that of the checkpoint continues",
}
"""What else there is to say about a change, by the name of the option, or by its class and its name there."""
LONGEST = 80
"""The largest number of characters of a value that is shown."""


class Change(NamedTuple):
    """An option with two different values, and the class that has the option, if a class was chosen."""

    name: str
    before: Any
    now: Any
    owner: str = ""


class SaveConfig(SaveConfigCallback):
    """A callback that writes the configuration to ``config.yaml`` in the run's folder, and to the loggers.

    If the run is resumed, the callback prints what differs from the configuration that the run had before, and keeps
    that file until the run has done an iteration: options with which it fails at once are not those of the run.
    """

    text = ""  # the configuration of a resumed run, until it is written

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Save the configuration of a new training run; the other commands must not overwrite it."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        if self.config.ckpt_path is None:
            write_text(Path(trainer.default_root_dir, "config.yaml"), text)
        log_config(trainer.loggers, yaml.safe_load(text))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print what differs from the earlier configuration of a resumed run, once its checkpoint is loaded."""
        if trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        file, self.text = Path(trainer.default_root_dir, "config.yaml"), self.parser.dump(self.config, skip_none=False)
        is_own = file.parent.resolve() in Path(trainer.ckpt_path).resolve().parents
        if is_own and file.is_file() and file.read_text(encoding="utf-8") != self.text:
            before, now = (yaml.safe_load(t) for t in (file.read_text(encoding="utf-8"), self.text))
            for line in describe_changes(before, now, iteration_of(pl_module)):
                print(line, flush=True)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save the configuration of a resumed run after its first iteration."""
        if self.text:
            write_text(Path(trainer.default_root_dir, "config.yaml"), self.text)
            self.text = ""

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save the configuration of a resumed run that has done no further iteration."""
        self.on_train_batch_end(trainer)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], iteration: int) -> list[str]:
    """Describe how the configuration of a resumed run differs from the one with which it ran before.

    Args:
        before: The earlier configuration.
        now: The present configuration.
        iteration: The number of iterations done with the earlier configuration.

    Returns:
        One line for each option that differs, up to ``SHOWN`` lines, and a line with the number of further ones.

    >>> before = {"seed_everything": 42, "model": {"class_path": "lit_rlhf.SFT", "init_args": {"max_tokens": 8192}}}
    >>> now = {"seed_everything": 42, "model": {"class_path": "lit_rlhf.SFT", "init_args": {"max_tokens": 4096}}}
    >>> describe_changes(before, now, 40)
    ['resume: model.max_tokens is 4096, was 8192 until iteration 40']
    """
    found = [change for change in _changes(before, now) if not change.name.startswith(UNSAID)]
    lines = [f"resume: {_described(change, iteration)}" for change in found[:SHOWN]]
    return lines + ([f"resume: {len(found) - SHOWN} more options differ"] if found[SHOWN:] else [])


def _described(change: Change, iteration: int) -> str:
    remark = REMARKS.get(change.name) or REMARKS.get(f"{change.owner}.{change.name.rpartition('.')[2]}")
    text = f"{change.name} is {_shown(change.now)}, was {_shown(change.before)} until iteration {iteration}"
    return f"{text}; {remark}" if remark else text


def _changes(before: Any, now: Any, name: str = "", owner: str = "") -> Iterator[Change]:
    """Yield the options with different values; an option that only one of the configurations has is left out."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if (chosen := now.get("class_path")) != before.get("class_path"):
            yield Change(name, before, now, owner)
            return
        for key in (key for key in now if key in before):
            inner = name if chosen and key == "init_args" else f"{name}.{key}".lstrip(".")
            yield from _changes(before[key], now[key], inner, _short(chosen) if chosen else owner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _changes(*pair, f"{name}[{number}]", owner)
    elif before != now:
        yield Change(name, before, now, owner)


def _shown(value: Any) -> str:
    """Return a short text for a value; of a class with its options, only the name."""
    if isinstance(value, Mapping) and value.get("class_path"):
        return _short(value["class_path"])
    if isinstance(value, list):
        value = f"[{', '.join(map(_shown, value))}]"
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _short(class_path: str) -> str:
    return str(class_path).rpartition(".")[2]
