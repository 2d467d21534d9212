import pytest
import torch

from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.precision import store_in_bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_layers_share_their_input_with_their_adapters(tiny_model, dora):
    """In bfloat16, the adapters of query, key and value keep one input for the backward pass, without any copy."""
    model = load_adapted(str(tiny_model()), LoRA(rank=2, dora=dora), "model.actor", trained=["actor"])
    store_in_bfloat16(model, all_weights=False)
    attention, kept = model.model.layers[0].self_attn, []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        x = torch.randn(1, 5, attention.q_proj.in_features, dtype=torch.bfloat16, requires_grad=True)
        outputs = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    inputs = {tensor.data_ptr() for tensor in kept if tensor.shape[-1] == x.shape[-1] and tensor.numel() == x.numel()}
    assert (inputs == {x.data_ptr()}) is not dora
    assert all(output.dtype == torch.bfloat16 for output in outputs)
