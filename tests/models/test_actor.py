import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_rlhf.algorithms.trust_region import flatten, hessian_product
from lit_rlhf.errors import UserError
from lit_rlhf.models import actor as actor_module
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.types import shared_beginnings

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}  # fmt: skip
LENGTHS = torch.tensor([9, 5, 7])


def make_batch(seed=0):
    """Return random tokens [3, 9] and a mask of the chosen ones, which excludes the first position and the padding."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 38, (3, 9), generator=g)
    place = torch.arange(9)
    return tokens, (torch.rand(3, 9, generator=g) < 0.7) & (place > 0) & (place < LENGTHS[:, None])


def plain(model, tokens, temperature):
    """Return log-probabilities and entropies at positions 1 to S − 1, computed at once by the model's own forward."""
    distribution = torch.distributions.Categorical(logits=model(input_ids=tokens).logits[:, :-1] / temperature)
    return distribution.log_prob(tokens[:, 1:]), distribution.entropy()


def weighed(logprobs, entropy):
    """Return a scalar that depends on every number with a different weight."""
    w = torch.linspace(-1, 2, logprobs.numel())
    return (w * logprobs).sum() + (w.flip(0) * entropy).sum()


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("temperature", "chunk_rows"), [(1.0, 1000), (0.7, 4), (1.5, 1)])
def test_equals_a_plain_forward(tiny_model, monkeypatch, architecture, temperature, chunk_rows):
    monkeypatch.setattr(actor_module, "chunk_rows", lambda *_: chunk_rows)
    actor = Actor(load_model(str(tiny_model(architecture))), temperature)
    tokens, chosen = make_batch()
    logprobs, entropy = plain(actor.model, tokens, temperature)
    weighed(logprobs[chosen[:, 1:]], entropy[chosen[:, 1:]]).backward()
    expected = gradients(actor.model)

    stats = actor(tokens, chosen)
    torch.testing.assert_close(stats.logprobs[chosen], logprobs[chosen[:, 1:]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy[chosen], entropy[chosen[:, 1:]], atol=1e-5, rtol=1e-5)
    assert (stats.logprobs[~chosen] == 0).all()
    assert (stats.entropy[~chosen] == 0).all()
    assert stats.values is None
    weighed(stats.logprobs[chosen], stats.entropy[chosen]).backward()
    torch.testing.assert_close(gradients(actor.model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_result_does_not_depend_on_the_padding(tiny_model, architecture):
    actor = Actor(load_model(str(tiny_model(architecture))), 0.7, shared_critic=True)
    torch.nn.init.normal_(actor.value_head.weight)
    tokens, chosen = make_batch()
    real = torch.arange(9) < LENGTHS[:, None]
    seen = []
    for padding in (0, 1, 37):
        stats = actor(torch.where(real, tokens, padding), chosen)
        weighed(stats.logprobs[chosen], stats.values[real].square().mean()).backward()
        seen.append((stats.logprobs, stats.entropy, stats.values[real], gradients(actor)))
    assert len(seen[0][3]) == len(list(actor.parameters()))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], atol=1e-6, rtol=1e-6)


def test_the_logits_of_all_tokens_are_not_kept_for_the_backward_pass(tiny_model, monkeypatch):
    monkeypatch.setattr(actor_module, "chunk_rows", lambda *_: 4)
    actor = Actor(load_model(str(tiny_model("llama"))))
    tokens, chosen = make_batch()
    for forward, held in ((lambda: actor(tokens, chosen), False), (lambda: plain(actor.model, tokens, 1.0), True)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            forward()
        assert any(x.shape[-1:] == (38,) and x.numel() >= 38 * 4 for x in saved) == held


def test_without_chosen_tokens(tiny_model):
    tokens, chosen = make_batch()
    stats = Actor(load_model(str(tiny_model("llama"))), shared_critic=True)(tokens, torch.zeros_like(chosen))
    assert (stats.logprobs == 0).all()
    assert stats.values.shape == tokens.shape


def test_the_outputs_are_float32_for_any_dtype_of_the_weights(tiny_model):
    actor = Actor(load_model(str(tiny_model("llama"))).bfloat16(), shared_critic=True)
    actor.value_head.bfloat16()
    stats = actor(*make_batch())
    assert {stats.logprobs.dtype, stats.entropy.dtype, stats.values.dtype} == {torch.float32}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "granite", "logits_scaling": 4.0},
        {"model_type": "cohere", "logit_scale": 0.25},
        {"model_type": "gemma2", "final_logit_softcapping": 2.0},
    ],
    ids=lambda config: config["model_type"],
)
def test_models_that_scale_their_logits(tiny_model, config):
    actor = Actor(load_model(RandomWeights(config=SHAPE | config, tokenizer=str(tiny_model("llama")))))
    tokens, chosen = make_batch()
    logprobs, _ = plain(actor.model, tokens, 1.0)
    torch.testing.assert_close(actor(tokens, chosen).logprobs[chosen], logprobs[chosen[:, 1:]], atol=1e-5, rtol=1e-5)


def test_an_unknown_head_is_refused(tiny_model):
    model = load_model(str(tiny_model("llama")))
    forward = model.forward

    def doubled(*args, **options):
        output = forward(*args, **options)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(UserError, match="LlamaForCausalLM changes its logits"):
        Actor(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_critic(tiny_model, architecture):
    actor = Actor(load_model(str(tiny_model(architecture))), shared_critic=True)
    tokens, chosen = make_batch()
    assert (actor(tokens, chosen).values == 0).all()
    torch.nn.init.normal_(actor.value_head.weight)
    torch.nn.init.ones_(actor.value_head.bias)
    hidden = actor.model.base_model(input_ids=tokens).last_hidden_state
    expected = hidden @ actor.value_head.weight[0] + 1
    seen = chosen.flip(1).cummax(1).values.flip(1)  # up to the last chosen token
    torch.testing.assert_close(actor(tokens, chosen).values[seen], expected[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_beginning_changes_nothing(tiny_model, architecture):
    """Four responses to one prompt and one to another have the same outputs and gradients as each text alone."""
    actor = Actor(load_model(str(tiny_model(architecture))), temperature=0.8, shared_critic=True)
    torch.nn.init.normal_(actor.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    other = Actor(load_model(str(tiny_model(architecture, seed=1))))
    tokens = torch.randint(6, 38, (5, 12), generator=torch.Generator().manual_seed(0))
    tokens[1:4, :7] = tokens[0, :7]
    ends = torch.tensor([12, 9, 8, 11, 10])
    chosen = (torch.arange(12) >= 7) & (torch.arange(12) < ends[:, None])
    shared = shared_beginnings(tokens, ends, torch.tensor([0, 0, 0, 0, 1]))
    assert shared.tolist() == [0, 7, 7, 7, 0]
    results = []
    for once in (None, shared):
        stats = actor(tokens, chosen, other, shared=once)
        outputs = stats.logprobs, stats.entropy, stats.full_kl, torch.where(chosen, stats.values, 0.0)
        (sum((output * (1 + torch.arange(60).view(5, 12) / 60)).sum() for output in outputs) / 60).backward()
        results.append(([output.detach() for output in outputs], gradients(actor)))
        actor.zero_grad()
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_value_grad_scale(tiny_model, scale):
    tokens, chosen = make_batch()
    results = []
    for factor in (1.0, scale):
        actor = Actor(load_model(str(tiny_model("llama"))), shared_critic=True, value_grad_scale=factor)
        torch.nn.init.constant_(actor.value_head.weight, 0.1)
        values = actor(tokens, chosen).values
        values.square().sum().backward()
        results.append((values.detach(), gradients(actor.value_head), gradients(actor.model.base_model)))
    (values, head, trunk), (scaled_values, scaled_head, scaled_trunk) = results
    torch.testing.assert_close((scaled_values, scaled_head), (values, head))
    assert all(gradient.abs().sum() > 0 for gradient in trunk.values())
    torch.testing.assert_close(scaled_trunk, {name: scale * gradient for name, gradient in trunk.items()})


def double(tiny_model, architecture="gpt2", **options):
    """Return a tiny actor in float64 (some architectures normalise in float32 even if the weights are float64)."""
    return Actor(load_model(str(tiny_model(architecture))), **options).double()


def some_tokens(seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 38, (3, 9), generator=g)
    chosen = torch.arange(9)[None] >= torch.tensor([[4], [3], [6]])
    return tokens, chosen & (torch.arange(9)[None] < torch.tensor([[9], [7], [8]]))


@pytest.mark.parametrize("chunk", [1000, 5])
def test_full_kl_to_another_actor(tiny_model, monkeypatch, chunk):
    monkeypatch.setattr(actor_module, "chunk_rows", lambda *_: chunk)
    actor, other = double(tiny_model, temperature=0.7), double(tiny_model, temperature=1.3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens, chosen = some_tokens()
    found = actor(tokens, chosen, other).full_kl
    for row, place in chosen.nonzero().tolist():
        p, q = (
            torch.log_softmax(a.model(input_ids=tokens[row : row + 1, :place]).logits[0, -1] / a.temperature, -1)
            for a in (actor, other)
        )
        assert found[row, place].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-12)
    assert (found[~chosen] == 0).all()
    assert actor(tokens, chosen).full_kl is None
    found.sum().backward()
    assert all(p.grad is None for p in other.parameters())
    assert sum(p.grad.abs().sum() for p in actor.parameters()) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kl_to_itself_has_the_fisher_matrix_as_its_hessian(tiny_model, architecture):
    """F v = Σₛ Σₐ π(a|s) ∇log π(a|s) (∇log π(a|s) · v), summed over every state and every token of the vocabulary."""
    actor = double(tiny_model, architecture)
    parameters = list(actor.parameters())
    tokens, chosen = some_tokens()
    tokens, chosen = tokens[:1, :7], chosen[:1, :7]
    v = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        kl = actor(tokens, chosen, actor).full_kl
        assert kl.abs().max() < 1e-12
        product = hessian_product(kl.sum(), parameters, v)
    expected = torch.zeros_like(v)
    states = actor.hidden(tokens, torch.ones_like(chosen)).before(chosen[:, 1:])
    for logprobs in torch.log_softmax(actor.logits(states), -1):
        for logprob in logprobs:
            gradient = flatten(torch.autograd.grad(logprob, parameters, retain_graph=True, materialize_grads=True))
            expected += logprob.exp().detach() * gradient * (gradient @ v)
    assert float((product - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_of_one_row_do_not_see_each_other(tiny_model, architecture):
    actor = Actor(load_model(str(tiny_model(architecture))))
    tokens, _ = make_batch()
    packed = torch.cat([tokens[0, :5], tokens[1, :4], tokens[2, :6]])[None]
    positions = torch.cat([torch.arange(5), torch.arange(4), torch.arange(6)])[None]
    chosen = positions > 0
    together = actor(packed, chosen, positions=positions).logprobs[0].split([5, 4, 6])
    for row, length, found in zip(tokens, (5, 4, 6), together, strict=True):
        alone = actor(row[None, :length], torch.arange(length)[None] > 0).logprobs[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
