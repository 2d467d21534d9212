"""The start of a run with a million records: seconds from the process's start to the end of its first iteration.

    python benchmarks/data_at_size.py [--records 1000000] [--kinds prompts.jsonl prompts.parquet pairs.jsonl]

For each kind of data, `lit-rlhf fit` is started three times on a tiny model: with 1,000 records, with all records, and
with all records again, when the tokens are in the cache. Prompts, responses and texts have 30 words. Prints the
seconds, the peak resident memory of the main process (RSS, which counts memory-mapped pages that the process has
touched), the peak of the anonymous part of this memory (RssAnon), and the peak of all processes together (PSS, which
divides a shared page among the processes).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from models import WORDS, write_models

KINDS = ("prompts.jsonl", "prompts.parquet", "pairs.jsonl", "texts.jsonl")
VOCABULARY = 4096


def records(kind: str, count: int) -> Iterator[dict[str, str]]:
    """Yield random records."""
    draw, words = random.Random(0), [f"t{i}" for i in range(WORDS, VOCABULARY)]

    def text() -> str:
        return " ".join(draw.choices(words, k=30))

    for _ in range(count):
        if kind.startswith("prompts"):
            yield {"prompt": text()}
        elif kind.startswith("pairs"):
            yield {"prompt": text(), "chosen": " " + text(), "rejected": " " + text()}
        else:
            yield {"text": text()}


def write(path: Path, count: int) -> Path:
    """Write the records, and return the path."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(path.name, count))
    else:
        import pandas

        pandas.DataFrame(records(path.name, count)).to_parquet(path)
    return path


def fit_options(path: Path, models: Path) -> list[str]:
    """Return the options of a run that ends only when it is stopped."""
    if path.name.startswith("prompts"):
        model = ["PolicyGradient", "--model.actor", f"{models}/policy", "--model.sampling.max_tokens", "2"]
        model += ['--model.rewards=[{"class_path": "RewardFunction", '
                  '"init_args": {"function": "lit_rlhf.data.reviews:reward"}}]']  # fmt: skip
        return ["--model", *model, "--data", "Prompts"]
    if path.name.startswith("pairs"):
        return ["--model", "RewardModeling", "--model.reward", f"{models}/reward", "--data", "Preferences"]
    return ["--model", "SFT", "--model.actor", f"{models}/policy", "--data", "Demonstrations"]


def start(path: Path, models: Path, folder: Path) -> dict[str, float]:
    """Start a run, stop it after its first iteration, and return its seconds and peaks in MB."""
    command = [sys.executable, "-m", "lit_rlhf.cli", "fit", *fit_options(path, models), "--data.train", str(path)]
    command += ["--data.batch_size", "8", "--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks = {"rss": 0.0, "anonymous": 0.0, "all": 0.0}
    while not _has_a_row(folder / "metrics.csv"):
        if process.poll() is not None:
            raise SystemExit(f"{path.name} failed:\n{process.stderr.read()[-2000:]}")  # type: ignore[union-attr]
        usage = [_memory(number) for number in (process.pid, *_descendants(process.pid))]
        now = {"rss": usage[0][0], "anonymous": usage[0][1], "all": sum(pss for _, _, pss in usage)}
        peaks = {name: max(peak, now[name]) for name, peak in peaks.items()}
        time.sleep(0.1)
    seconds = time.monotonic() - began
    process.kill()
    process.communicate()
    return {"seconds": seconds, **peaks}


def _has_a_row(path: Path) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= 2


def _memory(process: int) -> list[float]:
    """Return RSS, RssAnon and PSS in MB; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text() + Path(f"/proc/{process}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return [0.0] * 3
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return [int(fields.get(name, "0 kB").split()[0]) / 1000 for name in ("VmRSS", "RssAnon", "Pss")]


def _descendants(process: int) -> list[int]:
    try:
        children = [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [number for child in children for number in (child, *_descendants(child))]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    print("| | seconds | RSS MB | RssAnon MB | PSS of all processes MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        models = write_models(folder / "models", hidden=32, layers=1, vocabulary=VOCABULARY, mean_length=8.0)
        for kind in options.kinds:
            for count, label in ((1000, "1,000 records"), (options.records, "first start"), (0, "second start")):
                if count:
                    path = write(folder / kind, count)
                measured = start(path, models, Path(tempfile.mkdtemp(dir=folder)))
                cells = [f"{measured['seconds']:.1f}", *(f"{measured[n]:.0f}" for n in ("rss", "anonymous", "all"))]
                print(f"| {kind}, {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
