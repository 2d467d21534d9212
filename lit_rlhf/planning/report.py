"""Functions that show a plan as tables or in two lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lit_rlhf.planning.hardware import GB
from lit_rlhf.planning.memory import held
from lit_rlhf.planning.plan import RESERVED, Plan, available
from lit_rlhf.planning.setting import Setting
from lit_rlhf.planning.speed import BANDWIDTH, LAUNCH_SECONDS, UTILISATION


def show(plan: Plan, console: Console) -> None:
    """Print a plan: its models, phases, work and assumptions, and the verdict."""
    console.print(f"{plan.setting.method} on {_place(plan.setting)}", style="bold", highlight=False)
    for table in (_models(plan), _phases(plan), _work(plan)):
        console.print(table)
    if not plan.setting.device.is_cpu:
        console.print(f"Models in the memory of each host, at most: {_size(plan.host)}.", highlight=False)
    console.print(_assumptions(plan.setting), highlight=False)
    console.print(verdict(plan), style="bold", highlight=False)


def summary(plan: Plan) -> tuple[str, str]:
    """Return two lines: one on the models, the devices and an iteration, and one with the verdict."""
    roles = ", ".join(f"{role.name} {_number(role.parameters)}" for role in plan.setting.models if role.parameters)
    seconds = _total([work.seconds for work in plan.work])
    time = "" if seconds is None else f", about {seconds:.2g} s"
    flops = _number(sum(work.flops for work in plan.work), "G")
    iteration = f"an iteration of at most {_number(plan.tokens)} tokens: {flops}FLOP{time}"
    return f"plan: {roles} parameters on {_place(plan.setting)}; {iteration}", f"plan: {verdict(plan)}"


def verdict(plan: Plan) -> str:
    """Return a text that says whether the run fits and, if it does not, which change helps most."""
    numbers = f"{_size(plan.peak.bytes)} of {_size(available(plan.setting))} at the peak ({plan.peak.name})"
    if plan.checkpointing_added:
        numbers += " with ActivationCheckpointing, which fit turns on"
    if plan.advice is None:
        return f"It fits: {numbers}."
    after = "fits" if plan.advice.suffices else "does not fit either, but no other single change helps more"
    return f"It does not fit: {numbers}. With {plan.advice.text} the peak is {_size(plan.advice.bytes)}, which {after}."


def _models(plan: Plan) -> Table:
    table = _table("model", "parameters", "weights", "gradients", "optimizer")
    for role in plan.setting.models:
        table.add_row(role.name, _number(role.parameters), *(_size(part) for part in held(plan.setting, role)))
    return table


def _phases(plan: Plan) -> Table:
    table = _table("phase", "a process", "of which")
    for phase in plan.phases:
        parts = ", ".join(f"{part.name} {_size(part.bytes)}" for part in phase.parts if part.bytes >= phase.bytes / 100)
        table.add_row(phase.name, _size(phase.bytes), parts)
    return table


def _work(plan: Plan) -> Table:
    table = _table("iteration", "FLOP", "seconds")
    for work in plan.work:
        table.add_row(work.phase, _number(work.flops, "G"), _seconds(work.seconds))
    total = _total([work.seconds for work in plan.work])
    table.add_row(
        f"{_number(plan.tokens)} tokens", _number(sum(work.flops for work in plan.work), "G"), _seconds(total)
    )
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "of which" else "right")
    return table


def _place(setting: Setting) -> str:
    precision = "bf16-mixed" if setting.half else "32-true"
    spread = "" if setting.spread == "one" else f", {setting.spread}"
    return f"{setting.processes} x {setting.device.name} of {_size(setting.device.memory)}{spread}, {precision}"


def _assumptions(setting: Setting) -> str:
    device = setting.device
    if device.bandwidth is None or device.half is None or device.single is None:
        speed = f"The rates of {device.name} are not known, so no times are given."
    else:
        peak = (device.half if setting.half else device.single) / 1e12
        speed = (
            f"Times assume {UTILISATION:.0%} of {peak:,.3g} TFLOP/s, {BANDWIDTH:.0%} of {device.bandwidth / 1e9:,.0f} "
            f"GB/s, {LAUNCH_SECONDS * 1e6:.0f} µs to launch an operation on a GPU, and no time for communication."
        )
    length = f"Each text has {setting.length} tokens, {setting.scored} of them scored, the most that the options allow."
    return f"{length} {speed} {_size(RESERVED)} of each device are left to CUDA, libraries and gaps between tensors."


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else _number(seconds)


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [number for number in seconds if number is not None]
    return sum(known) if len(known) == len(seconds) else None


def _size(size: float) -> str:
    """Return a number of bytes as text, in GB, MB or kB (powers of 1,000 bytes); 0 for less than 1 kB."""
    for unit, name in ((GB, "GB"), (GB / 1e3, "MB"), (GB / 1e6, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return "0"


def _number(x: float, billion: str = "B") -> str:
    """Return a number as text: three significant digits and a prefix such as k or M, or two digits if it is below 1."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g} {prefix}"
    return f"{x:.3g}" if x >= 1 else f"{x:.2g}"
