"""All checks that need a GPU: exactness, speed and memory, with the bound beside each number.

    python benchmarks/gpu.py [--json gpu.json] [--only exact 0.5B] [--minutes 19.5]
    python benchmarks/gpu.py --device cpu --small

Needs one GPU with 80 GB and no network; takes at most 20 minutes. Each check runs in its own process. If a check
raises, takes too long or runs out of memory, the reason is recorded, and the others still run. Prints a table, writes
the JSON file after each check, and exits with status 1 if a check failed or a bound does not hold. The second command
runs the same code in miniature; numbers that mean something only on a GPU are then left out.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gpu_exact
import gpu_speed
import torch
from gpu_runs import Number, Setting
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NUMBERS, REASON, LOG = "numbers.jsonl", "reason.txt", "messages.txt"
"""The files in which a check's process leaves its numbers, the reason for which it failed, and its messages."""
SECONDS_ON_CPU = 300
"""The limit of each check on a CPU, whose speed and other work are not known."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@dataclass(frozen=True)
class Check:
    """A check: its name, the function that yields its numbers, and the number of seconds that it may take on a GPU."""

    name: str
    run: Callable[[Setting], Iterator[Number]]
    seconds: float


@dataclass
class Result:
    """What a check measured, the seconds that it took, and why it failed (None if it did not), with its messages."""

    check: str
    seconds: float = 0.0
    error: str | None = None
    numbers: list[Number] = field(default_factory=list)
    messages: str = ""

    @property
    def holds(self) -> bool:
        """Whether the check ended without an error, and none of its bounds is broken."""
        return self.error is None and not any(number.holds is False for number in self.numbers)


def checks(small: bool) -> list[Check]:
    """Return the checks in the order in which they run."""
    found = [
        Check("device", gpu_speed.device, 60),
        Check("exact: log-probabilities, values and gradients", gpu_exact.logprobs, 120),
        Check("exact: first iteration", gpu_exact.first_iteration, 120),
        Check("exact: fsdp2 on one process", gpu_exact.fsdp2, 90),
        Check("exact: killed and resumed", gpu_exact.resume, 180),
        Check("NCCL", gpu_exact.nccl, 60),
        Check("decoding: waits for the device", gpu_speed.waits, 90),
    ]
    if small:
        return [*found, *_speed_checks("tiny", ["recomputed, compiled", "fsdp2"])]
    found += _speed_checks("0.5B", ["", "compiled", "recomputed", "recomputed, compiled", "fsdp2"])
    return found + _speed_checks("1.5B", ["recomputed", "recomputed, compiled"])  # the others do not fit


def _speed_checks(size: str, variants: Sequence[str]) -> list[Check]:
    """Return the checks of decoding and of these variants of the update; the first one writes the models."""
    found = [
        Check(f"{size}: decoding", partial(gpu_speed.decode, size=size, compiled=False), 180),
        Check(f"{size}: decoding, compiled", partial(gpu_speed.decode, size=size, compiled=True), 180),
    ]
    for variant in variants:
        options = {"compiled": "compiled" in variant, "recomputed": "recomputed" in variant}
        run = partial(gpu_speed.update, size=size, strategy="fsdp2" if variant == "fsdp2" else "auto", **options)
        found.append(Check(f"{size}: update, {variant or 'plain'}", run, 180 if options["compiled"] else 120))
    return found


def measure(name: str, setting: Setting, seconds: float) -> Result:
    """Run a check in its own process for at most this many seconds, and return what it measured."""
    out, reason, log = (setting.folder / file for file in (NUMBERS, REASON, LOG))
    for file in (out, reason):
        file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--check", name, "--folder", str(setting.folder), "--device", setting.device]
    result, began = Result(name), time.perf_counter()
    with log.open("w") as messages:  # not a pipe, which processes that outlive the check would keep open
        process = subprocess.Popen(
            command + ["--small"] * setting.small,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=os.environ | {"HF_DATASETS_CACHE": str(setting.folder / "datasets")},
            start_new_session=True,
        )
        try:
            if process.wait(seconds):
                result.error = reason.read_text() if reason.exists() else f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            result.error = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # also the processes that it has started
                process.wait()
    result.seconds = time.perf_counter() - began
    if out.exists():
        result.numbers = [Number(**json.loads(line)) for line in out.read_text().splitlines()]
    if result.error is not None:
        result.messages = log.read_text(errors="replace")[-4000:]
    return result


def run_one(name: str, setting: Setting) -> None:
    """Run a check in this process; write each number as soon as it is known, and one line about an exception."""
    try:
        (check,) = (check for check in checks(setting.small) if check.name == name)
        for number in check.run(setting):
            with (setting.folder / NUMBERS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(number)) + "\n")
    except Exception as error:
        (setting.folder / REASON).write_text(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        raise


def run_all(setting: Setting, chosen: Sequence[Check], seconds: float, path: Path | None) -> list[Result]:
    """Run checks one after the other while there is time, and keep the JSON file up to date."""
    results: list[Result] = []
    began = time.perf_counter()
    for check in chosen:
        left = seconds - (time.perf_counter() - began)
        if left > 0:
            limit = check.seconds if setting.device == "cuda" else SECONDS_ON_CPU
            results.append(measure(check.name, setting, min(limit, left)))
        else:
            results.append(Result(check.name, error="not run: the time is used up"))
        last = results[-1]
        print(f"{last.check}: {last.error or f'{last.seconds:.0f} s'}", file=sys.stderr, flush=True)
        if path is not None:
            write_json(path, setting, results)
    return results


def write_json(path: Path, setting: Setting, results: Sequence[Result]) -> None:
    """Write the results, with whether each bound holds."""
    records = [
        dataclasses.asdict(result)
        | {
            "holds": result.holds,
            "numbers": [dataclasses.asdict(number) | {"holds": number.holds} for number in result.numbers],
        }
        for result in results
    ]
    written = {"date": time.strftime("%Y-%m-%d"), "device": setting.device, "small": setting.small, "results": records}
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def table(results: Sequence[Result]) -> Table:
    """Return the table of the results, with a row for each check and for each of its numbers."""
    made = Table("check", "measured", "must hold", "verdict")
    for result in results:
        made.add_row(f"[bold]{result.check}", f"{result.seconds:.0f} s", "", "" if result.error is None else "FAILED")
        for number in result.numbers:
            verdict = {None: "—", True: "holds", False: "BROKEN"}[number.holds]
            made.add_row(f"  {number.name}", shown(number.value, number.unit), bounds(number), verdict)
        if result.error is not None:
            made.add_row(escape(f"  {result.error}"))
        made.add_section()
    return made


def shown(value: float | str | None, unit: str = "") -> str:
    """Return a number with its unit, a fact as it is, and a dash for None."""
    if value is None or isinstance(value, str):
        return value or "—"
    return f"{value:.3g} {unit}".strip() if abs(value) < 1000 else f"{value:.0f} {unit}".strip()


def bounds(number: Number) -> str:
    """Return the bounds of a number in words."""
    limits = (("≥", number.at_least), ("≤", number.at_most))
    return " and ".join(f"{sign} {shown(limit, number.unit)}" for sign, limit in limits if limit is not None) or "—"


def main() -> None:
    """Run the chosen checks and print the table, or run one check in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="run the checks in miniature, on tiny models")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only the checks whose names contain one of these")
    parser.add_argument("--minutes", type=float, default=19.5, help="the largest number of minutes for all checks")
    parser.add_argument("--json", type=Path, help="the file for the results")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # the one to run in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        run_one(options.check, Setting(options.device, options.small, options.folder))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --small runs the checks in miniature")
    for name, value in (ENVIRONMENT | ({"OMP_NUM_THREADS": "1"} if options.small else {})).items():
        os.environ.setdefault(name, value)
    chosen = [c for c in checks(options.small) if not options.only or any(text in c.name for text in options.only)]
    with tempfile.TemporaryDirectory(prefix="lit-rlhf-gpu-") as folder:
        setting = Setting(options.device, options.small, Path(folder))
        results = run_all(setting, chosen, 60.0 * options.minutes, options.json)
    Console(width=120).print(table(results))
    sys.exit(0 if all(result.holds for result in results) else 1)


if __name__ == "__main__":
    main()
