"""With a large vocabulary, no operation computes logits for more than an eighth of a micro-batch's tokens."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf.algorithms.kl import FixedKL, ReferenceKL
from lit_rlhf.generation import Sampling
from lit_rlhf.models.loading import RandomWeights
from lit_rlhf.modules import Update

VOCABULARY, MAX_TOKENS = 131_072, 1024


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
