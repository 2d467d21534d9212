"""Servers that a run starts, and that end with it, however it ends (real processes)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling, VLLMEngine, keeper, weights_folder
from lit_rlhf.generation.engine import EngineContext, SpecialTokens
from lit_rlhf.generation.weights_folder import WeightsFolder
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

HERE = Path(__file__).parent


def running(process: int) -> bool:
    """Return whether a process runs; one that has ended, and that nobody asked about, does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


# ----------------------------------------------------------------------- the keeper

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def start_keeper(folder, *command, program=keeper.__file__):
    words = [sys.executable, "-I", "-S", str(program), str(os.getpid()), str(folder), *command]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_keeper_ends_everything_when_asked(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    process = start_keeper(folder, sys.executable, "-c", STUBBORN.replace("SIG_IGN", "SIG_DFL"))
    processes = [int(word) for word in process.stdout.readline().split()]
    assert all(map(running, processes))
    process.stdin.close()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert not any(map(running, processes))
    assert not folder.exists()


def test_the_keeper_uses_force_after_a_while(tmp_path):
    """After one second here, and otherwise after five."""
    program = tmp_path / "keeper.py"
    program.write_text(re.sub(r"(PATIENCE_SECONDS =) 5\.0", r"\1 1.0", Path(keeper.__file__).read_text()))
    process = start_keeper(tmp_path / "nothing", sys.executable, "-c", STUBBORN, program=program)
    processes = [int(word) for word in process.stdout.readline().split()]
    start = time.monotonic()
    process.terminate()
    process.wait(20)
    assert 1 <= time.monotonic() - start < 4 < keeper.PATIENCE_SECONDS
    assert not any(map(running, processes))


def test_the_keeper_ends_with_the_command(tmp_path):
    process = start_keeper(tmp_path / "nothing", sys.executable, "-c", "import sys; sys.exit(5)")
    assert process.wait(10) == 5


def test_the_keeper_needs_only_the_standard_library():
    imported = "import sys; sys.argv = ['', '0', '', 'true']; import runpy; runpy.run_path(%r); print(len(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", imported % keeper.__file__], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150


# ----------------------------------------------------------------------- the server


@pytest.fixture
def python(tmp_path):
    """Return a program that runs the tests' server instead of vLLM."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "vllm_server.py"} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def started(tiny_model, tmp_path, python):
    """Return a function that starts an engine with a server of its own."""
    engines = []

    def start(**options):
        folder = str(tiny_model("gpt2"))  # with tied embeddings
        engine = VLLMEngine(python=options.pop("python", python), weights_dir=str(tmp_path / "weights"), **options)
        engines.append(engine)
        engine.start(
            EngineContext(
                load_actor=lambda: Actor(load_model(folder)),
                tokenizer=load_tokenizer(folder),
                device=torch.device("cpu"),
                device_ids=(0,),
                process=0,
                precision="32-true",
            )
        )
        return engine

    yield start
    for engine in engines:
        engine.close()
    assert not list((tmp_path / "weights").glob("*"))


def generate(engine, folder):
    tokens = torch.tensor([[2, 6, 7], [2, 8, 9]])
    prompts = PromptBatch(tokens=tokens, mask=tokens > 0, group=torch.arange(2), prompts=["", ""], columns={})
    return engine.generate(
        Actor(load_model(str(folder))),
        prompts,
        Sampling(max_tokens=6, responses=3),
        SpecialTokens(stop=(1,), pad=0),
        stream=Stream.ROLLOUT,
        iteration=0,
    )


def processes_in(log):
    return [int(word) for word in re.search(r"processes: (\d+) (\d+)", Path(log).read_text()).groups()]


def error_of(function):
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_of_the_runs_own(started, tiny_model, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    engine = started(devices=[2, 0], max_model_len=32, server_args=["--extra", "argument"])
    assert len(generate(engine, tiny_model("gpt2")).tokens) == 6
    log = engine._server.log.read_text()
    assert "settings: 7,4 None -m vllm.entrypoints.openai.api_server --model" in log
    for words in ("--max-model-len 32", "--dtype float32", "--tensor-parallel-size 2", "--host 127.0.0.1"):
        assert words in log
    assert log.splitlines()[0].endswith("--extra argument")
    processes = processes_in(engine._server.log)
    assert all(map(running, processes))
    engine.close()
    assert not any(map(running, processes))
    engine.close()  # a second time, which does nothing


def test_a_server_that_does_not_start(started):
    message = error_of(lambda: started(server_args=["--fail", "start"]))
    assert re.fullmatch(
        r"model.engine: the vLLM server has ended \(exit code 3\): ValueError: no memory for the cache bye \(log: .*\)",
        message,
    )
    assert Path(message.rpartition("log: ")[2].removesuffix(")")).is_file()


def test_a_server_that_never_answers(started):
    message = error_of(lambda: started(server_args=["--fail", "slow"], startup_timeout=1))
    assert message.startswith("model.engine: the vLLM server did not come up within startup_timeout=1 s: ")
    assert "--fail slow (log: " in message


def test_no_such_program(started):
    assert error_of(lambda: started(python="/no/python")) == "model.engine.python: there is no program /no/python"


def test_a_gpu_that_this_process_may_not_use(started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    message = error_of(lambda: started(devices=[2]))
    assert message == "model.engine.devices: there is no GPU 2, because CUDA_VISIBLE_DEVICES=0,1"


def test_a_server_that_ends_while_it_generates(started, tiny_model):
    engine, start = started(server_args=["--fail", "completion"], connections=2), time.monotonic()
    message = error_of(lambda: generate(engine, tiny_model("gpt2")))
    assert time.monotonic() - start < 5
    assert "the vLLM server has ended (exit code 7): RuntimeError: out of memory (log: " in message


def test_a_server_that_is_killed(started, tiny_model):
    engine = started(server_args=["--fail", "hang"])
    server, child = processes_in(engine._server.log)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {server}"])
    start = time.monotonic()
    message = error_of(lambda: generate(engine, tiny_model("gpt2")))
    assert time.monotonic() - start < 5
    assert message.startswith("model.engine: the vLLM server has ended (killed by signal 9): ")
    assert not running(child)


# ------------------------------------------------------------------ the end of a run


@pytest.mark.parametrize("end", ["error", pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_nothing_is_left_of_a_run(python, tiny_model, tmp_path, end):
    failure = end if isinstance(end, str) else "hang"
    words = [str(HERE / "vllm_trainer.py"), python, str(tiny_model("gpt2")), str(tmp_path / "weights"), failure]
    process = preloaded.Program(*words)
    wait_until(lambda: process.output().endswith("\n") or not process.is_running(), seconds=60)
    log = process.output().strip()
    assert log, process.wait().stderr
    processes = processes_in(log)
    if not isinstance(end, str):
        wait_until(lambda: len(list((tmp_path / "weights").glob("*/*"))) == 2)
        os.killpg(process.pid, end)  # as Ctrl-C does
    start = time.monotonic()
    process.wait(timeout=20)
    assert time.monotonic() - start < 10
    wait_until(lambda: not any(map(running, processes)))
    wait_until(lambda: not list((tmp_path / "weights").glob("*")))


# --------------------------------------------------------------- folders for weights


def test_the_folder_of_a_process_that_was_killed_is_removed_later(tmp_path):
    script = "import os, sys; from lit_rlhf.generation.weights_folder import WeightsFolder; "
    script += "folder = WeightsFolder(sys.argv[1], 0); print(folder.path, flush=True); os.kill(os.getpid(), 9)"
    program = tmp_path / "program.py"
    program.write_text(script)
    killed = preloaded.run(str(program), str(tmp_path))
    program.unlink()
    stale = Path(killed.stdout.strip())
    assert stale.is_dir()
    others = tmp_path / "lit-rlhf-weights-elsewhere-1-1-x"
    others.mkdir()
    own = WeightsFolder(str(tmp_path), 0)
    again = WeightsFolder(str(tmp_path), 0)
    assert not stale.exists()
    assert others.is_dir()
    assert own.path.is_dir()
    own.close()
    assert again.path.is_dir()
    again.close()
    assert list(tmp_path.iterdir()) == [others]


def test_weights_go_where_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_folder, "SHARED_MEMORY", tmp_path)
    for size, parent in ((1, tmp_path), (2**60, Path(weights_folder.tempfile.gettempdir()))):
        folder = WeightsFolder(None, size)
        assert folder.path.parent == parent
        folder.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    message = error_of(lambda: WeightsFolder(str(tmp_path / "file" / "below"), 0))
    assert message.startswith(f"model.engine.weights_dir: no folder for weights can be made in {tmp_path}/file/below (")
