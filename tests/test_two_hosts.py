"""Training on two hosts: network namespaces joined by a virtual cable, with one torchrun each (gloo)."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import preloaded
import pytest
import torch

WORKER = Path(__file__).parent / "modules" / "fit_on_ranks.py"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Yield the names and cables of two namespaces with the addresses 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip (package iproute2) is not installed")
    tag = uuid.uuid4().hex[:6]
    names, cables = [f"lit-{tag}-{i}" for i in "ab"], [f"v{tag}{i}" for i in "ab"]
    created = []
    try:
        for name in names:
            ip("netns", "add", name)
            created.append(name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (subprocess.CalledProcessError, PermissionError) as error:
        for name in created:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}".strip())
    yield list(zip(names, cables, strict=True))
    for name in names:
        ip("netns", "del", name)


@pytest.mark.long
def test_two_hosts_give_the_same_weights_as_one(hosts, tiny_model, prompt_file, tmp_path):
    kinds = {}, {"seed": 1}, {"task": "score", "seed": 2}
    models = [str(tiny_model("llama", **kind)) for kind in kinds]

    def words(strategy: str, out: str) -> tuple[str, ...]:
        return str(WORKER), strategy, *models, str(prompt_file), str(tmp_path / out), "three"

    started = []
    for rank, (name, cable) in enumerate(hosts):
        run = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
        run += ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29511"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": cable}
        run += words("fsdp2", "two.pt")
        started.append(subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True))
    (done,) = preloaded.torchrun(1, *words("ddp", "one.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    for process in started:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors[-3000:]
    one, two = (torch.load(tmp_path / name)["three"]["weights"] for name in ("one.pt", "two.pt"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-6, atol=1e-6, msg=name)
