import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.sharding import shard, unsharded, wrap

pytestmark = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")

TOKENS = torch.randint(6, 38, (2, 7), generator=torch.Generator().manual_seed(0))
CHOSEN = torch.arange(7).expand(2, -1) > 0
HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


@pytest.fixture
def process_group():
    """Start a process group that contains only this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=["fsdp", "fsdp2"])
def sharded(request, process_group, tiny_model):
    """Return a half-precision actor that is sharded over one process."""
    actor = Actor(load_model(str(tiny_model("llama"))))
    if request.param == "fsdp":
        return wrap(actor, device_id=torch.device("cpu"), mixed_precision=MixedPrecision(**HALF))
    return shard(actor, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(**HALF))


def measure(actor):
    with torch.no_grad(), unsharded(actor):
        return actor(TOKENS, CHOSEN).logprobs


def test_gathered_weights_are_those_of_the_last_step(sharded):
    """Autocast caches its casts by parameter, but a sharded parameter gets new weights each time."""
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        before = measure(sharded)
        sharded(TOKENS, CHOSEN).logprobs.sum().backward()
        optimizer.step()
        after = measure(sharded)
    with torch.autocast("cpu", torch.bfloat16):
        expected = measure(sharded)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_gathered_weights_are_rounded_as_in_a_training_step(sharded):
    """The probability ratio to the policy that made the rollout is therefore 1 before the first step."""
    weights = {name: weight.clone() for name, weight in sharded.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        torch.testing.assert_close(sharded(TOKENS, CHOSEN).logprobs, measure(sharded), rtol=0, atol=0)
    for name, weight in sharded.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_the_outer_of_two_contexts_holds_the_weights(sharded):
    """As for two views of the same base."""
    before = measure(sharded)
    with torch.no_grad(), unsharded(sharded):
        assert torch.equal(measure(sharded), before)
        after = sharded(TOKENS, CHOSEN).logprobs
        size = sharded.get_submodule("model").get_output_embeddings().weight.numel()
    assert torch.equal(after, before)
    assert size == 38 * 32


def fsdp_events(compute):
    """Return how often FSDP2 did something before or after a forward pass of a module."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        compute()
    return sum(event.name.startswith("FSDP::") for event in profile.events())


@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_fsdp2_does_nothing_in_forward_passes_with_gathered_weights(sharded):
    """In decoding, its hooks would run for each layer and token."""
    calls = []
    layer = sharded.model.base_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: calls.append(module))

    def compute():
        sharded(TOKENS, CHOSEN)
        sharded.hidden(TOKENS, CHOSEN)

    before = fsdp_events(compute)
    assert before > 0
    with unsharded(sharded, None, sharded):
        assert fsdp_events(compute) == 0
    assert fsdp_events(compute) == before
    assert calls == [layer] * 6
