"""No operation computes logits for more than an eighth of a micro-batch's tokens, or decodes with large tensors."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf.algorithms.kl import FixedKL, ReferenceKL
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.generation.engine import SpecialTokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.modules import Update
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

VOCABULARY, MAX_TOKENS = 16_384, 1024


class Largest(TorchDispatchMode):
    """Records the largest number of elements in any operation's result, except results of a weight's shape."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.elements = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and tuple(x.shape) not in self.shapes:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("kl", [ReferenceKL("reward", "k1"), ReferenceKL("loss", "full")], ids=["k1", "full"])
def test_largest_tensor(tiny_model, make_module, fit, kl):
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": VOCABULARY}  # fmt: skip
    module = make_module(
        actor=RandomWeights(config=config, tokenizer=str(tiny_model("llama"))),
        critic="shared",
        sampling=Sampling(max_tokens=30),
        kl=FixedKL(0.1),
        reference_kl=kl,
        update=Update(epochs=1, minibatches=1, max_tokens=MAX_TOKENS, entropy_coef=0.01),
        iterations=1,
    )
    module.configure_model()
    shapes = {s for p in module.parameters() for s in (tuple(p.shape), tuple(p.shape[::-1]))}
    with Largest(shapes) as largest:
        fit(module, batch_size=16)
    assert 16 * VOCABULARY <= largest.elements <= MAX_TOKENS // 8 * VOCABULARY


@pytest.mark.parametrize("vocabulary", [38, VOCABULARY])
def test_largest_tensor_of_decoding(tiny_model, monkeypatch, vocabulary):
    """The logits of one token for each row, or the mask of a few prompts."""
    config = {"model_type": "llama", "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": vocabulary}  # fmt: skip
    actor = Actor(load_model(RandomWeights(config=config, tokenizer=str(tiny_model("llama")))))
    rows, width, prefill_tokens = 24, 100, 256
    mask = torch.arange(width) >= torch.arange(rows)[:, None]  # padded on the left
    prompts = PromptBatch(tokens=mask.long(), mask=mask, group=torch.arange(rows), prompts=[""] * rows, columns={})
    monkeypatch.setattr("lit_rlhf.generation.native.PREFILL_TOKENS", prefill_tokens)
    with Largest({s for p in actor.parameters() for s in (tuple(p.shape), tuple(p.shape[::-1]))}) as largest:
        sampling, special_tokens = Sampling(max_tokens=3), SpecialTokens(stop=(0,), pad=0)
        NativeEngine().generate(actor, prompts, sampling, special_tokens, stream=Stream.ROLLOUT, iteration=0)
    assert rows * vocabulary <= largest.elements <= max(rows * vocabulary, prefill_tokens * width)
