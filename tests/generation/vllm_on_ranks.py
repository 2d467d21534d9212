"""Generate with VLLMEngine on the processes that torchrun starts, or on this one; rank 0 saves what they return.

[python -m torch.distributed.run --nproc-per-node 2] tests/generation/vllm_on_ranks.py URL ACTOR WEIGHTS_DIR OUT
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling, VLLMEngine
from lit_rlhf.generation.engine import EngineContext, find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.models.sharding import shard, wrap
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

CPU = torch.device("cpu")


def main(url, folder, weights_dir, out):
    torch.set_num_threads(1)
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        dist.init_process_group("gloo")
    tokenizer = load_tokenizer(folder)
    engine = VLLMEngine(url=url, weights_dir=weights_dir, connections=4)
    context = EngineContext(
        load_actor=lambda: Actor(load_model(folder)),
        tokenizer=tokenizer,
        device=CPU,
        device_ids=(0,),
        process=0,
        precision="32-true",
    )
    engine.start(context)
    encoded = tokenizer([f"w{i} w{2 * i} w3"[: 3 + 2 * i] for i in range(4)], padding=True, return_tensors="pt")
    mine = torch.arange(4)[rank::count]
    prompts = PromptBatch(
        tokens=encoded.input_ids[mine], mask=encoded.attention_mask[mine].bool(), group=mine, prompts=[], columns={}
    )
    sampling = Sampling(max_tokens=6, responses=2)
    results = {}

    def generate(name, actor):
        special_tokens = find_special_tokens(actor, tokenizer, ["w4", "w9", "w11", "w21"])
        pending = engine.begin(actor, prompts, sampling, special_tokens, stream=Stream.ROLLOUT, iteration=1)
        pending.run()
        rollout = pending.result()
        rows = {}
        for number, row in enumerate(range(len(rollout.tokens))):
            key = (int(rollout.group[row]), number % 2)
            rows[key] = (rollout.tokens[row].tolist(), rollout.rollout_logprobs[row].tolist())
        everyone = [rows]
        if count > 1:
            everyone = [None] * count
            dist.all_gather_object(everyone, rows)
        results[name] = {key: row for part in everyone for key, row in part.items()}

    generate("whole", Actor(load_model(folder)))
    if count > 1:
        generate("fsdp2", shard(Actor(load_model(folder)), mesh=init_device_mesh("cpu", (count,))))
        generate("fsdp", wrap(Actor(load_model(folder)), device_id=CPU))
        engine.close()
        try:
            VLLMEngine(url="http://elsewhere:8000").start(context)  # rank 0 alone notices that this cannot work
        except UserError as error:
            results["error"] = [None] * count
            dist.all_gather_object(results["error"], str(error))
    if rank == 0:
        torch.save(results, out)
    if count > 1:
        dist.barrier()
        os._exit(0)  # once in ten times, a thread of torch's aborts a process that has used these groups while it ends


if __name__ == "__main__":
    main(*sys.argv[1:])
