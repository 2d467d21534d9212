"""Weights of frozen models in bfloat16, and the precisions that are refused."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.precision import check_precision, store_in_bfloat16
from lit_rlhf.models.scoring import freeze, load_reward_model

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox"]
BFLOAT16 = {"dtype": torch.bfloat16, "cache_enabled": False}


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Return the outputs of an actor or a reward model under autocast."""
    tokens = torch.randint(6, 38, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", **BFLOAT16):
        if isinstance(model, Actor):
            scored = torch.arange(9).expand(3, 9) > 3
            return [*model(tokens, scored)[:2], model.logits(model.hidden(tokens, torch.ones_like(scored)).states)]
        return [model(tokens, torch.tensor([9, 5, 7]))]


@pytest.mark.parametrize("task", ["causal", "score"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_output_is_the_same_under_autocast(tiny_model, architecture, task):
    folder = str(tiny_model(architecture, task=task))
    model = Actor(load_model(folder)) if task == "causal" else load_reward_model(folder)
    freeze(model)
    before = outputs(model)
    store_in_bfloat16(model, all_weights=False)
    for one, two in zip(before, outputs(model), strict=True):
        assert torch.equal(one, two)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            rounded = type(module) in (nn.Linear, Conv1D) and id(parameter) not in embeddings
            assert parameter.dtype == (torch.bfloat16 if rounded else torch.float32)


def test_classes_derived_from_linear_keep_their_weights():
    """Some of them, such as Falcon's, add their bias outside autocast."""

    class Derived(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Derived(2, 2)).requires_grad_(False)
    store_in_bfloat16(model, all_weights=False)
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]


def test_with_all_weights_in_bfloat16_buffers_stay_in_float32(tiny_model):
    model = freeze(load_model(str(tiny_model("llama"))))
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    store_in_bfloat16(model, all_weights=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before
    assert torch.float32 in before.values()


@pytest.mark.parametrize("precision", ["32-true", "32", 32, "bf16-mixed", "bf16"])
def test_supported_precisions(precision):
    check_precision(precision)


@pytest.mark.parametrize(
    "precision", ["bf16-true", "16-true", "16-mixed", "64-true", "transformer-engine", "transformer-engine-float16", 16]
)
def test_other_precisions_are_refused(precision):
    with pytest.raises(UserError, match=rf"^trainer.precision must be 32-true or bf16-mixed, not '{precision}'$"):
        check_precision(precision)
