"""Run commands of lit-rlhf one after another, each in new forks of this process, which imports the libraries once.

python tests/forked_runs.py FOLDER < RUNS

FOLDER becomes the working directory. RUNS is a JSON list of objects: ``words``, the command; ``processes``, their
number; ``environment``, further variables. The exit codes of each run's processes are printed as one line of JSON, and
what the processes write goes to ``NUMBER.log``.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401 (as all others that are not used here: imported once for all runs)
import peft  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
import transformers.pytorch_utils  # noqa: F401

from lit_rlhf.callbacks import PrintPlan
from lit_rlhf.cli import main


def in_child(words, environment, log):
    """Run a command in this process, and end the process."""
    code = 0
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    PrintPlan.on_fit_start = lambda *words: None  # it would take longer than the run
    try:
        main(words)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(words, processes, environment, log):
    """Return the exit codes of a command's processes, which are negative for those that a signal has killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            ranks = address | {"LOCAL_RANK": str(rank)} if processes > 1 else {}
            in_child(words, environment | ranks, log)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    for number, options in enumerate(json.load(sys.stdin)):
        print(json.dumps(run(**options, log=Path(f"{number}.log"))), flush=True)
