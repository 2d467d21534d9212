"""The first process of a new run moves an older run's folder away, however the processes are started."""

import socket
import time

import preloaded
import pytest

ONE_HOST = ["--trainer.devices", "2"]
TWO_HOSTS = ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
LAUNCHERS = {
    "slurm": (ONE_HOST, {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train",
                         "SLURM_NODEID": "0", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}),
    "torchrun": (ONE_HOST, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x",
                            "RANK": "{rank}", "LOCAL_RANK": "{rank}"}),
    "one command a host": (TWO_HOSTS, {"NODE_RANK": "{rank}"}),
}  # fmt: skip


@pytest.fixture
def start(tiny_model, prompt_file, tmp_path):
    """Return a function that starts one of two processes, in a folder with an older run; it waits at the given port."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("older")
    started = []

    def process(launcher: str, rank: int, port: int) -> preloaded.Program:
        options, variables = LAUNCHERS[launcher]
        words = [
            *("-m", "lit_rlhf.cli", "fit"),
            *("--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))),
            '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "math:sqrt"}}]',
            *("--data", "Prompts", "--data.train", str(prompt_file), "--trainer.default_root_dir", "run"),
            *("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", *options),
        ]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        mine = {name: value.format(rank=rank) for name, value in variables.items()}
        started.append(preloaded.Program(*words, cwd=tmp_path, **meeting, **mine))
        return started[-1]

    yield process
    for running in started:
        running.kill()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_second_process_moves_nothing(start, tmp_path, launcher):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        start(launcher, rank=1, port=server.getsockname()[1])
        server.accept()  # it has reached the point where it waits for the first process
    assert (tmp_path / "run" / "config.yaml").read_text() == "older"
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_first_process_moves_the_folder(start, tmp_path, launcher):
    program, deadline = start(launcher, rank=0, port=preloaded.free_port()), time.monotonic() + 60
    while not (tmp_path / "run.1").exists() and program.is_running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "run.1" / "config.yaml").read_text() == "older"
