"""Run two iterations of PPO with four models; each process writes the number of bytes that its tensors hold at the end.

python -m torch.distributed.run --nproc-per-node 2 tests/bytes_on_ranks.py STRATEGY TOKENIZER PROMPTS FOLDER [BASE]

With a BASE, the actor, the critic and the reference are this one with adapters, and there is no reward model.
"""

import gc
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch

from lit_rlhf import (
    LoRA,
    PolicyGradient,
    Prompts,
    RandomWeights,
    RewardFunction,
    RewardModel,
    Sampling,
    Update,
)

warnings.filterwarnings("ignore")
SHAPE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}  # fmt: skip


def lengths(responses):
    return [float(len(response)) for response in responses]


class CountBytes(lightning.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.bytes = count_bytes()  # the models, as they were loaded

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        outputs.clear()
        self.bytes = max(self.bytes, count_bytes())


def count_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x).__name__ != "DTensor"]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    tensors += [x._local_tensor for x in gc.get_objects() if type(x).__name__ == "DTensor"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def main(strategy, tokenizer, prompts, folder, base=None):
    source, rewards, adapted = RandomWeights(SHAPE, tokenizer), [RewardModel(RandomWeights(SHAPE, tokenizer))], {}
    if base is not None:
        source, rewards, adapted = base, [RewardFunction(f"{__file__}:lengths")], {"adapter": LoRA(rank=4)}
    torch.set_num_threads(1)
    count = CountBytes()
    lightning.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        use_distributed_sampler=False, default_root_dir=folder, callbacks=[count],
    ).fit(
        PolicyGradient(
            actor=source, rewards=rewards, **adapted,
            sampling=Sampling(max_tokens=8), update=Update(epochs=1, minibatches=2), iterations=2,
        ),
        datamodule=Prompts(train=prompts, batch_size=8),
    )  # fmt: skip
    (Path(folder) / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}").write_text(str(count.bytes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
