"""The host's memory while the four models of PPO are loaded, against the memory of the weights that each process keeps.

    python benchmarks/loading.py [--hidden 2048] [--layers 18] [--strategy fsdp2] [--processes 2] [--precision 32-true]

Writes a policy and a reward model of this shape (by default of a billion parameters) with random weights in bfloat16,
starts a run with actor, critic, reference and reward model on this many processes, and stops it before its first
iteration. Prints, for each process, the bytes of the weights that it holds then, and the peak of its anonymous memory
(RssAnon, which does not count pages of the files) above that before loading.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import lightning
import torch
from models import write_models
from safetensors.torch import load_file, save_file

from lit_rlhf import PolicyGradient, Prompts, RewardModel


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Loading(lightning.Callback):
    """A callback that samples the memory from a run's set-up until the models are loaded, and then ends the run."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Start to sample."""
        self.before = self.peak = anonymous_bytes()
        self.loaded = threading.Event()
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()

    def _sample(self) -> None:
        while not self.loaded.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the numbers to a file and end the process."""
        self.loaded.set()
        self.sampler.join()
        local = {id(p): getattr(p, "_local_tensor", p) for p in pl_module.parameters()}
        held = sum(tensor.nbytes for tensor in local.values())
        line = f"{trainer.global_rank} {held} {self.peak - self.before} {anonymous_bytes() - self.before}"
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.txt").write_text(line)
        trainer.strategy.barrier()
        os._exit(0)


def run_rank(arguments: argparse.Namespace) -> None:
    """Load the models in this process, one of those that torchrun started."""
    torch.set_num_threads(1)
    folder = Path(arguments.folder)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=arguments.processes, strategy=arguments.strategy, precision=arguments.precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        inference_mode=False, use_distributed_sampler=False, default_root_dir=folder, callbacks=[Loading()],
    )  # fmt: skip
    module = PolicyGradient(
        actor=f"{folder}/policy", rewards=[RewardModel(f"{folder}/reward")], critic="actor", iterations=1
    )
    trainer.fit(module, datamodule=Prompts(train=f"{folder}/prompts.jsonl", batch_size=8))


def main() -> None:
    """Write the models, start the processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the models, given to the processes
    arguments = parser.parse_args()
    if arguments.folder:
        run_rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), hidden=arguments.hidden, layers=arguments.layers)
        for path in Path(folder).glob("*/*.safetensors"):
            save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, {"format": "pt"})
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(arguments.processes), __file__, *sys.argv[1:], "--folder", folder]
        subprocess.run(launch, check=True)
        print("process  weights GiB  peak GiB  peak / weights  at the end GiB")
        for path in sorted(Path(folder).glob("[0-9]*.txt")):
            rank, held, peak, end = map(int, path.read_text().split())
            print(f"{rank:7d}{held / 2**30:13.2f}{peak / 2**30:10.2f}{peak / held:16.2f}{end / 2**30:16.2f}")


if __name__ == "__main__":
    main()
