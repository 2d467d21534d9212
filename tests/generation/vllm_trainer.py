"""A process that generates with a server of its own, for tests that end it: PYTHON ACTOR WEIGHTS_DIR FAILURE."""

import os
import sys

import torch

from lit_rlhf.generation import Sampling, VLLMEngine
from lit_rlhf.generation.engine import EngineContext, SpecialTokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch


def main(python, folder, weights_dir, failure):
    os.setsid()  # signals can then be sent to this process and all that it starts
    engine = VLLMEngine(python=python, weights_dir=weights_dir, server_args=["--fail", failure])
    context = EngineContext(
        load_actor=lambda: Actor(load_model(folder)),
        tokenizer=load_tokenizer(folder),
        device=torch.device("cpu"),
        device_ids=(0,),
        process=0,
        precision="32-true",
    )
    engine.start(context)
    print(engine._server.log, flush=True)
    tokens = torch.tensor([[2, 6, 7], [2, 8, 9]])
    prompts = PromptBatch(tokens=tokens, mask=tokens > 0, group=torch.arange(2), prompts=["", ""], columns={})
    special_tokens = SpecialTokens(stop=(1,), pad=0)
    engine.generate(
        context.load_actor(), prompts, Sampling(max_tokens=6), special_tokens, stream=Stream.ROLLOUT, iteration=0
    )
    if failure == "error":
        raise RuntimeError("a mistake")


if __name__ == "__main__":
    main(*sys.argv[1:])
