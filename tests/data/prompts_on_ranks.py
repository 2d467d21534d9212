"""Fit, on two processes, a module that only reads its prompts; each rank saves what it encoded and what it received.

python -m torch.distributed.run --nproc-per-node 2 tests/data/prompts_on_ranks.py MODEL PROMPTS FOLDER CACHE
"""

import json
import sys
import time
import warnings
from pathlib import Path

import datasets
import lightning
import torch
from transformers import AutoTokenizer

from lit_rlhf import Prompts
from lit_rlhf.data.prompts import PromptEncoder

encoded: list[int] = []
given: list[list[int]] = []


class Reader(lightning.LightningModule):
    """A module that reads its batches and learns nothing."""

    def __init__(self, model):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def training_step(self, batch, batch_idx):
        given.append(batch.columns["number"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(model, prompts, folder, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    warnings.filterwarnings("ignore")
    encode = PromptEncoder.__call__

    def counting(self, tokenizer, records, where):
        encoded.append(len(records))
        time.sleep(1)  # long enough for the other process to start encoding too if it did not wait
        return encode(self, tokenizer, records, where)

    PromptEncoder.__call__ = counting
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Reader(model), datamodule=Prompts(train=prompts, batch_size=8))
    found = {"encoded": sum(encoded), "given": given}
    (Path(folder) / f"{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
