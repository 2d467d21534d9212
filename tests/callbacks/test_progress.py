import os
import pty
import re
import sys
import threading
import time
from functools import partial

import pytest
from rich.console import Console

from lit_rlhf import DPO, ProgressBar, RewardFunction, RewardModeling, Summary
from lit_rlhf.callbacks.terminal import Bars, Course, Lines, clock
from lit_rlhf.generation import NativeEngine
from lit_rlhf.modules import Update
from lit_rlhf.progress import Progress, _listeners, listen, stop_listening, tell, track

CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r)|(\n)")


def screens(output: str, columns: int) -> tuple[list[str], list[str]]:
    """Return all lines that a terminal ever showed, and the lines on it at the end."""
    lines, row, column, shown, at = [""], 0, 0, [], 0
    for match in [*CONTROL.finditer(output), None]:
        text = output[at : match.start() if match else len(output)]
        at = match.end() if match else at
        assert column + len(text) < columns or text.startswith("data: "), f"wraps: {text!r}"
        lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
        column += len(text)
        shown += [lines[row]] if text else []
        if match is None:
            break
        number, letter, returned, newline = match.groups()
        if returned:
            column = 0
        elif newline:
            row += 1
            lines += [""] * (row == len(lines))
        elif letter == "A":
            row -= int(number or 1)
        elif letter == "K":
            lines[row] = ""
    return shown, [line.rstrip() for line in lines if line.strip()]


@pytest.fixture(params=[80, 140])
def terminal(request, monkeypatch):
    """Return a file that writes to a pseudo terminal, its width, and a function that returns what was written."""
    master, slave = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    file = os.fdopen(slave, "w", encoding="utf-8")
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TERM", "xterm-256color")

    def written() -> str:
        file.flush()
        time.sleep(0.2)
        return b"".join(chunks).decode()

    yield file, request.param, written
    file.close()
    os.close(master)


def test_bars_in_a_terminal(terminal, make_module, fit, tmp_path, monkeypatch):
    file, columns, written = terminal
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.REFRESH_PER_SECOND", 60)
    module = make_module(update=Update(epochs=3, minibatches=4, max_tokens=64), iterations=4)
    fit(
        module,
        [ProgressBar(), Summary()],
        validation=True,
        enable_progress_bar=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    shown, left = screens(written(), columns)
    left = [line for line in left if not line.startswith(("data: ", "rewards: "))]
    assert any(re.match(r"iteration 0/4 +━+ 0:0\d", line) for line in shown)
    assert any(re.match(r"iteration 3/4 +━+ 0:0\d left  score [\d.]+  KL -?[\d.e-]+", line) for line in shown)
    assert any(re.match(r"generate +━+ \d+/8 responses  [\d,]+ tokens/s", line) for line in shown)
    assert any(re.match(r"judge +━+ \d/\d micro-batches", line) for line in shown)
    assert any(re.match(r"update +━+ [5-9]/12 minibatches", line) for line in shown)
    assert any(re.match(r"validation +━+ \d/\d batches  generate \d+/\d+ responses", line) for line in shown)
    labels = [line.split()[0] for line in left]  # nothing of the bars
    assert labels == ["done", "score", "KL", "length", "win"]
    assert _listeners == []


def says(responses):
    print("half a line, ", end="")
    print(f"and {len(responses)} responses")
    return [0.0 for _ in responses]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_a_reward_prints_is_above_the_bars(terminal, make_module, fit, monkeypatch, timeout):
    """In a thread of its own, too."""
    file, columns, written = terminal
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.REFRESH_PER_SECOND", 60)
    module = make_module(rewards=[RewardFunction(says, timeout=timeout)], iterations=3)
    fit(module, [ProgressBar()], enable_progress_bar=True)
    shown, left = screens(written(), columns)
    assert any(re.match(r"update +━+ \d/4 minibatches", line) for line in shown)
    left = [line for line in left if not line.startswith(("data: ", "rewards: "))]
    assert left == ["half a line, and 8 responses"] * 3


def test_lines_of_another_thread_stay_while_the_second_bar_comes_and_goes(terminal, monkeypatch, request):
    file, columns, written = terminal
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.REFRESH_PER_SECOND", 1000)
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    course = Course("iteration", 0, 10)
    bars = Bars(course, Console(file=file, force_terminal=True, width=columns))
    bars.open()
    printer = threading.Thread(target=lambda: [print(f"line {number}") for number in range(300)])
    printer.start()
    while printer.is_alive():
        course.hear(Progress("update", 1, 4, "minibatches"))
        time.sleep(0.001)
        course.work = None
        time.sleep(0.001)
    bars.close()
    _, left = screens(written(), columns)
    assert left == [f"line {number}" for number in range(300)]


@pytest.mark.parametrize(
    ("module", "role", "label"),
    [(DPO, "actor", "cache the reference"), (RewardModeling, "reward", "measure the scores")],
)
def test_bars_of_work_before_and_after_the_iterations(
    terminal, tiny_model, fit_preferences, monkeypatch, module, role, label
):
    file, columns, written = terminal
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.REFRESH_PER_SECOND", 60)
    pairs = [{"prompt": "w1", "chosen": f" w{n % 9 + 3}", "rejected": " w2 w2"} for n in range(96)]
    made = module(**{role: str(tiny_model("llama"))}, iterations=1)
    fit_preferences(made, pairs, None, [ProgressBar()], enable_progress_bar=True)
    shown, _ = screens(written(), columns)
    assert any(re.match(rf"{label} +━+ \d+/12 batches", line) for line in shown)


def test_lines_where_there_is_no_terminal(make_module, fit, capsys):
    """Many iterations are a few lines; the validation has one, and the summary is plain text."""
    fit(
        make_module(iterations=6),
        [ProgressBar(every=600.0), Summary()],
        validation=True,
        enable_progress_bar=True,
        max_epochs=-1,
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("data: ", "rewards: "))]
    assert [line.split("  ")[0] for line in lines[:3]] == ["iteration 1/6", "iteration 6/6", "iteration 6/6"]
    assert lines[2].startswith("iteration 6/6  validation: score ")
    assert lines[3].startswith("done      PolicyGradient, 6 iterations in 0:")
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_lines_of_iterations_are_apart_in_time(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.time.monotonic", lambda: now)
    course = Course("iteration", 0, 100)
    lines = Lines(course, every=10.0)
    for done in range(1, 101):
        now += 3.0
        course.advance(done, ["loss 1.5", "val loss 2"])
        lines.advanced()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "iteration 1/100  loss 1.5  3 s/iteration  4:57 left",
        "iteration 5/100  loss 1.5  3 s/iteration  4:45 left",
    ]
    assert printed[-1] == "iteration 100/100  loss 1.5  3 s/iteration  0:00 left"
    assert len(printed) == 26
    now += 59.0
    course.hear(lines.course.work or next(iter(progress_of("cache the reference", 7, 90, "batches"))))
    lines.heard()
    assert capsys.readouterr().out == ""
    now += 2.0
    lines.heard()
    assert capsys.readouterr().out == "iteration 100/100: cache the reference 7/90 batches\n"


def progress_of(*fields):
    heard = []
    listen(heard.append)
    tell(*fields)
    stop_listening(heard.append)
    return heard


def test_the_time_left_does_not_grow_while_an_iteration_goes_on(monkeypatch):
    now = 0.0
    monkeypatch.setattr("lit_rlhf.callbacks.terminal.time.monotonic", lambda: now)
    course = Course("iteration", 10, 20)
    now = 100.0
    assert course.duration() == "1:40"
    course.begin()  # after a long preparation
    now = 130.0
    course.advance(12, [])
    assert course.duration() == "2:00 left"
    now = 140.0
    assert course.duration() == "1:50 left"
    assert clock(3675.4) == "1:01:15"


def test_bars_on_a_narrow_terminal_leave_metrics_out():
    from rich.console import Console

    course = Course("iteration", 0, 12345)
    course.advance(1234, ["score 0.123", "KL 12.3", "1,234 tokens/s", "val score 0.456"])
    for width in (20, 40, 60, 80, 100, 140):
        lines = Bars(course, Console(width=width)).render().plain.splitlines()
        assert all(len(line) < width for line in lines)
        assert ("val score 0.456" in lines[0]) == (width >= 140)


def test_an_engine_tells_only_what_the_host_knows(make_module, fit):
    heard = []
    listen(heard.append)
    try:
        fit(make_module(engine=NativeEngine(cache_tokens=60), iterations=1))
    finally:
        stop_listening(heard.append)
    decoded = [progress for progress in heard if progress.work == "generate" and progress.total is not None]
    assert [progress.done for progress in decoded] == sorted(progress.done for progress in decoded)
    assert (decoded[-1].done, decoded[-1].total) == (8, 8)
    assert decoded[-1].tokens >= 8
    assert [p.done for p in heard if p.work == "update" and p.total is not None][-1] == 4


def test_track_costs_nothing_if_nobody_listens():
    items = [1, 2]
    assert track(items, "add", "numbers") is items


def test_wrong_interval():
    with pytest.raises(ValueError, match="every must be 0 or more seconds, not -1"):
        ProgressBar(every=-1)
