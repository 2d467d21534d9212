"""Random wrong data files and configurations: each must be accepted, or refused in one line; none may crash or hang.

    python benchmarks/fuzz.py [--files 10000] [--configs 2000] [--seed 0] [--keep FOLDER]

A data file begins as good records (prompts, conversations, demonstrations, pairs, rankings), whose values are then
replaced, renamed and nested, and whose bytes are flipped, cut and repeated after they were written as JSONL, JSON, CSV
or Parquet. Prompts, Demonstrations or Preferences reads it, tokenizes it and makes all batches. A configuration begins
as a recipe, whose values, names and lines are changed; it goes through the parser and all checks, until the model, the
data and the Trainer exist. Prints a table, and exits with status 1 after a crash or a hang. The same seed gives the
same cases; ``--keep`` writes the cases that crash or hang to a folder.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

LIMIT = 10.0
"""The maximum number of seconds for one case."""
CHUNK = 50
"""The number of cases of one process, so that a crash of the interpreter ends only these."""
TEXTS = [
    "w1 w2",
    "",
    " ",
    "w" * 5000,
    "ünï ☃ 😀",
    "\ud800",
    "\0",
    "\x1b[2J",
    "{prompt}",
    "{{ 7 * 7 }}",
    "<eos>",
    "../x",
]
NUMBERS = [0, 1, -1, 5, 10**6, 10**19, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), True, None]
GOOD: dict[str, list[dict[str, Any]]] = {
    "Prompts": [
        {"prompt": "w1 w2", "answer": "w3"},
        {"question": "w1", "ground_truth": "w2"},
        {"instruction": "w1", "input": "w2", "output": "w3"},
        {"prompt": [{"role": "user", "content": "w1"}], "reward_model": {"ground_truth": "w2"}},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    ],
    "Demonstrations": [
        {"text": "w1 w2 w3"},
        {"prompt": "w1", "completion": " w2"},
        {"instruction": "w1", "input": "w2", "output": "w3"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    ],
    "Preferences": [
        {"prompt": "w1", "chosen": " w2", "rejected": " w3"},
        {"prompt": "w1", "responses": [" w2", " w3", " w4"]},
        {
            "chosen": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
            "rejected": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}],
        },
    ],
}
CLASSES = ["SFT", "DPO", "PolicyGradient", "Prompts", "GAE", "Nothing", "os.system", "lit_rlhf.GAE", "json.JSONDecoder"]
OPTIONS = ["class_path", "init_args", "actor", "rewards", "train", "epochs", "lr", "nothing", "max_tokens", "1", ""]


class TooSlow(BaseException):
    """A case has taken longer than `LIMIT`."""


@dataclass
class Case:
    """A file to read, and the kind of reader."""

    kind: str
    name: str
    data: bytes


@dataclass
class Tally:
    """The numbers of cases by their ends, and a description of each that crashed or hung."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def add(self, case: Case, end: str, detail: str, keep: Path | None) -> None:
        """Count a case, and keep its file if it crashed or hung."""
        self.ends[case.kind, end] += 1
        if end in ("crash", "hang"):
            self.found.append(f"{end} of {case.kind}, {case.name}: {detail}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{len(self.found)}-{case.kind}-{case.name}").write_bytes(case.data)


# ---------------------------------------------------------------------- the cases


def any_value(draw: random.Random, depth: int = 0) -> Any:
    """Return a random value: a text, a number, or a list or mapping of such values, sometimes nested deeply."""
    kind = draw.randrange(6 if depth < 3 else 4)
    if kind < 2:
        return draw.choice(TEXTS)
    if kind < 4:
        return draw.choice(NUMBERS)
    if kind == 4:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(["role", "content", "prompt", "a", ""]): any_value(draw, depth + 1)}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in list(parts):
        yield (*path, name)
        yield from places(part, (*path, name))


def change(value: Any, draw: random.Random, names: Sequence[str], values: Callable[[random.Random], Any]) -> None:
    """Change one random place inside a value: replace it, remove it, rename it, nest it, or copy another one to it."""
    paths = list(places(value))
    if not paths:
        return
    *outer, last = draw.choice(paths)
    owner = value
    for name in outer:
        owner = owner[name]
    how = draw.randrange(6)
    if how < 2:
        owner[last] = values(draw)
    elif how == 2:
        del owner[last]
    elif how == 3 and isinstance(owner, dict):
        owner[draw.choice(list(names))] = owner.pop(last)
    elif how == 4:
        for _ in range(draw.choice([1, 2, 40, 400])):
            owner[last] = [owner[last]] if draw.random() < 0.5 else {"a": owner[last]}
    else:
        copied: Any = value
        for name in draw.choice(paths):
            copied = copied[name]
        with contextlib.suppress(ValueError, RecursionError):
            owner[last] = json.loads(json.dumps(copied))


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert or repeat random bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        place, length = draw.randrange(len(changed) + 1), draw.randrange(1, 9)
        how = draw.randrange(5)
        if how == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << draw.randrange(8)
        elif how == 1:
            del changed[place:]
        elif how == 2:
            del changed[place : place + length]
        elif how == 3:
            changed[place:place] = changed[place : place + length] * draw.choice([1, 2, 99])
        else:
            changed[place:place] = draw.choice([b"\0", b"\xff", b"\n", b"\r", b"{", b"]", b'"', b"\\u", b"1e999", b","])
    return bytes(changed)


def data_case(seed: str) -> Case:
    """Return a random data file."""
    draw = random.Random(seed)
    kind, suffix = draw.choice(list(GOOD)), draw.choice(["jsonl", "jsonl", "jsonl", "json", "csv", "parquet"])
    good = draw.choice(GOOD[kind])
    records = [json.loads(json.dumps(good)) for _ in range(draw.randrange(1, 5))]
    columns = sorted({name for options in GOOD.values() for record in options for name in record})
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        with contextlib.suppress(TypeError, KeyError, IndexError, RecursionError):
            change(records, draw, columns, any_value)
    data = written(records, suffix)
    return Case(kind, f"{seed}.{suffix}", change_bytes(data, draw) if draw.random() < 0.4 else data)


def written(records: list[Any], suffix: str) -> bytes:
    """Return records in a format; as JSON, if the format cannot hold them."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(Exception):
        if suffix == "jsonl":
            return "".join(json.dumps(record) + "\n" for record in records).encode()
        if suffix == "json":
            return json.dumps(records).encode()
        import pandas

        frame = pandas.DataFrame(records)
        return frame.to_csv(index=False).encode() if suffix == "csv" else frame.to_parquet()
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(records).encode()
    return b"[" * 10**5


def config_case(seed: str) -> Case:
    """Return a random configuration."""
    from lit_rlhf import recipes

    draw = random.Random(seed)
    name = draw.choice([name for name in recipes.names() if "/" not in name])
    text = recipes.find_recipe(name).read_text(encoding="utf-8")
    if draw.random() < 0.8:
        config = yaml.safe_load(text)
        for _ in range(draw.choice([1, 1, 2, 4])):
            with contextlib.suppress(TypeError, KeyError, IndexError, RecursionError):
                change(config, draw, OPTIONS, config_value)
        with contextlib.suppress(RecursionError, yaml.YAMLError):
            text = yaml.safe_dump(config, allow_unicode=True)
    if draw.random() < 0.3:
        lines = text.splitlines(keepends=True)
        place = draw.randrange(len(lines) or 1)
        lines[place : place + 1] = draw.choice(
            [[], 2 * lines[place : place + 1], ["  ", *lines[place : place + 1]], ["x: &x [*x]\n"], ["- a\n"]]
        )
        text = "".join(lines)
    data = text.encode("utf-8", "surrogatepass")
    return Case("config", f"{seed}.yaml", change_bytes(data, draw) if draw.random() < 0.2 else data)


def config_value(draw: random.Random) -> Any:
    """Return a random value of an option."""
    return draw.choice(CLASSES) if draw.random() < 0.3 else any_value(draw)


# ---------------------------------------------------------------------- what each case goes through


def read_data(case: Case, folder: Path, tokenizer: Any) -> None:
    """Read a data file, tokenize it and make all batches, as a run does.

    Raises:
        UserError: if the file is refused.
    """
    from lit_rlhf import data

    path = folder / f"data{Path(case.name).suffix}"
    path.write_bytes(case.data)
    module = getattr(data, case.kind)(train=str(path), batch_size=1)
    lightning_module = SimpleNamespace(tokenizer=tokenizer)
    module.trainer = SimpleNamespace(
        lightning_module=lightning_module, is_global_zero=True, world_size=1, global_rank=0
    )
    module.setup("fit")
    for _ in module.train_dataloader():
        pass


def read_config(case: Case, folder: Path, tokenizer: Any) -> None:
    """Parse a configuration, and make the model, the data module and the Trainer.

    Raises:
        UserError: if a value is refused.
        SystemExit: if an option or the type of a value is.
    """
    from lit_rlhf import early_check, lightning_cli

    class Made(Exception):  # noqa: N818 (it is not an error)
        """Everything has been made."""

    class UntilTraining(lightning_cli.CLI):
        def before_fit(self) -> None:
            """End the command before the training."""
            raise Made

    path = folder / "config.yaml"
    path.write_bytes(case.data)
    words = ["fit", "--config", str(path), "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    early_check.check(words)
    with contextlib.suppress(Made):
        lightning_cli.run(words, UntilTraining)


def end_of(case: Case, folder: Path, tokenizer: Any) -> tuple[str, str]:
    """Return how a case ends (accepted, refused, crash or hang), and the message."""
    from lit_rlhf.errors import UserError, one_line

    def too_slow(*_: Any) -> None:
        raise TooSlow

    err = io.StringIO()
    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            (read_config if case.kind == "config" else read_data)(case, folder, tokenizer)
    except UserError as error:
        return ("refused", one_line(str(error))) if str(error).strip() else ("crash", "an empty message")
    except SystemExit as end:
        lines = err.getvalue().strip().splitlines()
        named = end.code == 2 and lines and lines[-1].startswith("lit-rlhf: error: ")
        return ("refused", lines[-1]) if named else ("crash", f"exit status {end.code}: {err.getvalue()[-500:]}")
    except TooSlow:
        return "hang", f"more than {LIMIT:g} s"
    except BaseException:
        return "crash", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return "accepted", ""


def try_all(cases: Sequence[Case], tokenizer: Any, keep: Path | None = None, show: bool = False) -> Tally:
    """Try cases in processes of their own, and return their ends.

    Args:
        cases: The cases.
        tokenizer: The tokenizer of the data files.
        keep: The folder for the files of cases that crash or hang.
        show: Whether to print the progress.
    """
    tally, waiting, start = Tally(), list(cases), time.monotonic()
    while waiting:
        ends = _in_a_process(waiting[:CHUNK], tokenizer)
        for case, (end, detail) in zip(waiting, ends, strict=False):
            tally.add(case, end, detail, keep)
        del waiting[: len(ends)]
        done = len(cases) - len(waiting)
        if show and sys.stderr.isatty():
            print(f"\r{done} cases, {done / (time.monotonic() - start):.0f} per second", end="", file=sys.stderr)
    return tally


def _in_a_process(cases: Sequence[Case], tokenizer: Any) -> list[tuple[str, str]]:
    """Try cases in a fork of this process; the last end returned is a crash or a hang if the process did not finish."""
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), Path(name, "results")
        pid = os.fork()
        if pid == 0:
            _try_each(cases, tokenizer, folder, results)
        deadline, status = time.monotonic() + 2 * LIMIT + LIMIT * len(cases), None
        seen, since = 0, time.monotonic()
        while status is None and time.monotonic() < deadline:
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
            size = results.stat().st_size if results.exists() else 0
            seen, since = (size, time.monotonic()) if size != seen else (seen, since)
            if status is None and time.monotonic() - since > 2 * LIMIT:
                break
            time.sleep(0.005)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        ends = [tuple(json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
        if len(ends) < len(cases):
            died = ("hang", "it does not react") if status is None else ("crash", f"the process died: status {status}")
            ends.append(died)
        return ends


def _try_each(cases: Sequence[Case], tokenizer: Any, folder: Path, results: Path) -> None:
    import datasets

    os.chdir(folder)
    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with results.open("w", buffering=1) as file:
        for case in cases:
            file.write(json.dumps(end_of(case, folder, tokenizer)) + "\n")
            shutil.rmtree(folder / "cache", ignore_errors=True)
    os._exit(0)


def cases_of(files: int, configs: int, seed: int) -> list[Case]:
    """Return random cases, the same for the same seed."""
    data = [data_case(f"{seed}-{number}") for number in range(files)]
    return data + [config_case(f"{seed}-{number}") for number in range(configs)]


def load_tokenizer() -> Any:
    """Return the tokenizer of a tiny model, with a chat template."""
    from lit_rlhf.models.loading import load_tokenizer
    from lit_rlhf.testing.models import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(str(make_tiny_model(Path(folder), chat=True)))


def main() -> None:
    """Try all cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="the number of data files")
    parser.add_argument("--configs", type=int, default=2_000, help="the number of configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="the folder for the cases that crash or hang")
    options = parser.parse_args()
    import lit_rlhf.lightning_cli  # noqa: F401 (imported before the forks)

    start = time.monotonic()
    tally = try_all(cases_of(options.files, options.configs, options.seed), load_tokenizer(), options.keep, show=True)
    seconds = time.monotonic() - start
    print(f"\n\nseed {options.seed}, {seconds:.0f} s")
    print(f"{'kind':<16}{'cases':>8}{'refused':>9}{'accepted':>10}{'crashes':>9}{'hangs':>7}")
    for kind in (*GOOD, "config"):
        ends = [tally.ends[kind, end] for end in ("refused", "accepted", "crash", "hang")]
        print(f"{kind:<16}{sum(ends):>8}{ends[0]:>9}{ends[1]:>10}{ends[2]:>9}{ends[3]:>7}")
    for found in tally.found:
        print(f"\n{found}")
    sys.exit(1 if tally.found else 0)


if __name__ == "__main__":
    main()
