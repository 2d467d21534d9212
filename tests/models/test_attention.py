import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_rlhf.models import attention, unpadded
from lit_rlhf.models.attention import UNPADDED
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.unpadded import is_unpadded, last_hidden_state, use_unpadded_attention
from lit_rlhf.types import shared_beginnings

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
LENGTHS = torch.tensor([11, 1, 7, 11, 4])
REAL = torch.arange(11) < LENGTHS[:, None]


def make_tokens(seed=0):
    return torch.randint(0, 38, (5, 11), generator=torch.Generator().manual_seed(seed))


def plain(trunk, tokens):
    """Return the hidden states of each text alone, computed by transformers' own attention, with 0 at padding."""
    before = trunk.config._attn_implementation
    trunk.set_attn_implementation("eager")
    rows = [
        trunk(input_ids=row[None, :n], use_cache=False).last_hidden_state[0]
        for row, n in zip(tokens, LENGTHS, strict=True)
    ]
    trunk.set_attn_implementation(before)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def hidden_states(trunk, tokens, real, positions=None, shared=None):
    """Return the last hidden state of each token, [B, S, H], with 0 at padding."""
    found = last_hidden_state(trunk, tokens, real, positions, shared)
    return found.states[found.places] * real[..., None]


def weighed(hidden):
    """Return a scalar that depends on every number with a different weight."""
    return (torch.linspace(-1, 2, hidden.numel()).view_as(hidden) * hidden).sum()


def gradients(trunk):
    found = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_computing_each_text_alone(tiny_model, architecture):
    model = load_model(str(tiny_model(architecture))).double()
    assert model.config._attn_implementation == UNPADDED
    trunk, tokens = model.base_model, make_tokens()
    expected, found = plain(trunk, tokens), hidden_states(trunk, tokens, REAL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weighed(expected).backward()
    wanted = gradients(trunk)
    weighed(found).backward()
    torch.testing.assert_close(gradients(trunk), wanted, atol=1e-5, rtol=1e-4)


GROUPS = torch.tensor([0, 0, 0, 1, 2, 2])
"""Six texts: three with a common beginning, one alone, and two, of which one is the beginning of the other."""
ENDS = torch.tensor([9, 6, 11, 5, 3, 7])


def make_groups():
    tokens = make_tokens(1)[[0, 1, 2, 3, 4, 4]]
    tokens[1:3, :5] = tokens[0, :5]
    tokens[:3, 5] = torch.tensor([6, 7, 8])
    return tokens, torch.arange(11) < ENDS[:, None], shared_beginnings(tokens, ENDS, GROUPS)


def test_shared_beginnings():
    tokens, _, shared = make_groups()
    assert shared.tolist() == [0, 5, 5, 0, 0, 3]
    tokens[2, 2] = (tokens[2, 2] + 1) % 38
    assert shared_beginnings(tokens, ENDS, GROUPS).tolist() == [0, 2, 2, 0, 0, 3]
    tokens[1, 0] = (tokens[1, 0] + 1) % 38
    assert shared_beginnings(tokens, ENDS, GROUPS).tolist() == [0, 0, 0, 0, 0, 3]
    assert shared_beginnings(tokens, ENDS, torch.arange(6)).tolist() == [0] * 6


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral"])
def test_a_shared_beginning_is_computed_once(tiny_model, architecture):
    windows = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}  # fmt: skip
    random = RandomWeights(config=windows, tokenizer=str(tiny_model("llama")))
    trunk = load_model(random if architecture == "mistral" else str(tiny_model(architecture))).double().base_model
    (tokens, real, shared), seen = make_groups(), []
    trunk.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.shape[1]))
    expected, found = (hidden_states(trunk, tokens, real, shared=once) for once in (None, shared))
    assert seen == [int(ENDS.sum()), int((ENDS - shared).sum())]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weighed(expected).backward()
    wanted = gradients(trunk)
    weighed(found).backward()
    torch.testing.assert_close(gradients(trunk), wanted, atol=1e-5, rtol=1e-4)  # a norm computes in float32


def test_nothing_is_shared_without_groups(tiny_model):
    trunk, tokens = load_model(str(tiny_model("llama"))).base_model, make_tokens()
    alone, shared = (hidden_states(trunk, tokens, REAL, shared=once) for once in (None, torch.zeros(5).long()))
    assert torch.equal(alone, shared)


def test_shared_beginnings_in_half_precision(tiny_model):
    trunk, (tokens, real, shared) = load_model(str(tiny_model("llama"))).base_model, make_groups()
    exact = hidden_states(trunk, tokens, real)
    with torch.autocast("cpu", torch.bfloat16):
        alone, found = (hidden_states(trunk, tokens, real, shared=once) for once in (None, shared))
    assert 0 < (found - exact).abs().max() < 2 * (alone - exact).abs().max()


def test_a_model_that_cannot_continue_a_beginning_keeps_its_attention(tiny_model, monkeypatch):
    model = load_model(str(tiny_model("llama")))
    model.set_attn_implementation("sdpa")
    attend = attention._attend_within
    monkeypatch.setattr(attention, "_attend_within", lambda *inputs: attend(*inputs[:-1], None))  # without keys
    monkeypatch.setattr(unpadded, "_fits", {})
    use_unpadded_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_on_a_cpu(tiny_model, architecture):
    trunk, tokens = load_model(str(tiny_model(architecture))).base_model, make_tokens()
    exact = plain(trunk, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = hidden_states(trunk, tokens, REAL), plain(trunk, tokens)
    error, usual = (found.float() - exact).abs().max(), (theirs.float() - exact).abs().max()
    assert 0 < error < 2 * usual
    weighed(found.float()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(trunk).values())


def test_only_real_tokens_are_computed(tiny_model):
    trunk, tokens, seen = load_model(str(tiny_model("llama"))).base_model, make_tokens(), []
    trunk.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1]))
    hidden_states(trunk, tokens, REAL)
    assert seen == [(1, int(LENGTHS.sum()))]


def test_several_texts_in_a_row(tiny_model):
    trunk, tokens = load_model(str(tiny_model("qwen3"))).base_model, make_tokens()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0]]).expand(5, -1)
    real = torch.arange(11) < 8
    found = hidden_states(trunk, tokens, real.expand(5, -1), positions)
    for part in (slice(0, 5), slice(5, 8)):
        alone = trunk(input_ids=tokens[:, part], use_cache=False).last_hidden_state
        torch.testing.assert_close(found[:, part], alone, atol=1e-5, rtol=1e-5)


def test_sliding_windows(tiny_model):
    config = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}  # fmt: skip
    model = load_model(RandomWeights(config=config, tokenizer=str(tiny_model("llama"))))
    tokens = make_tokens()
    assert is_unpadded(model.base_model)
    expected = plain(model.base_model, tokens)
    torch.testing.assert_close(hidden_states(model.base_model, tokens, REAL), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = hidden_states(model.base_model, tokens, REAL)
    assert (half.float() - expected).abs().max() < 0.05
    model.config.sliding_window = None
    for layer in model.base_model.layers:
        layer.self_attn.sliding_window = None
    wide = hidden_states(model.base_model, tokens, REAL)
    assert (wide - expected).abs().max() > 0.01


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon"])
def test_other_architectures_keep_their_attention_and_padding(tiny_model, model_type):
    config = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "d_model": 32, "alibi": True}  # fmt: skip
    model = load_model(RandomWeights(config=config, tokenizer=str(tiny_model("llama"))))
    assert not is_unpadded(model.base_model)
    tokens = make_tokens()
    found = hidden_states(model.base_model, tokens, REAL)
    for row, (text, n) in enumerate(zip(tokens, LENGTHS, strict=True)):
        alone = model.base_model(input_ids=text[None, :n], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found[row, :n], alone, atol=1e-5, rtol=1e-4)


def test_models_with_soft_caps_keep_their_attention(tiny_model):
    config = {"model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = load_model(RandomWeights(config=config, tokenizer=str(tiny_model("llama"))))
    assert not is_unpadded(model.base_model)


def test_the_attention_is_tried_once_for_each_configuration(tiny_model, monkeypatch):
    tried = []
    monkeypatch.setattr(unpadded, "_fits", {})
    monkeypatch.setattr(unpadded, "keeps_texts_apart", lambda model, attention: tried.append(type(model).__name__))
    for task, seed in (("causal", 0), ("causal", 1), ("score", 2)):
        load_model(str(tiny_model("llama", task=task, seed=seed)), task)
    assert tried == ["LlamaForCausalLM", "LlamaForSequenceClassification"]


def test_leaving_out_padding_twice_changes_nothing(tiny_model):
    model = load_model(str(tiny_model("llama")))
    use_unpadded_attention(model)
    assert model.config._attn_implementation == UNPADDED


def test_the_attention_is_not_exported(tiny_model, tmp_path):
    load_model(str(tiny_model("llama"))).save_pretrained(tmp_path)
    assert UNPADDED not in (tmp_path / "config.json").read_text()


def test_twice_differentiable_by_the_math_kernel(tiny_model):
    trunk, tokens = load_model(str(tiny_model("gpt2"))).double().base_model, make_tokens()
    weight = trunk.wte.weight
    with sdpa_kernel(SDPBackend.MATH):
        loss = hidden_states(trunk, tokens, REAL).square().sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.abs().sum() > 0


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """Compute what ``varlen_attn`` did before it had ``enable_gqa``: [N, heads, D] → [N, heads, D], in a loop."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert (len(query), len(key)) == (cu_seq_q[-1], cu_seq_k[-1])
    splits = (query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k)
    outputs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(bounds.diff().tolist(), 1) for x, bounds in splits), strict=True):
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
    return torch.cat(outputs, 1).transpose(0, 1)


def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    bounds = cu_seq_q, cu_seq_k, max_q, max_k
    return of_2_11(query, key, value, *bounds, scale=scale, window_size=window_size)


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="earlier versions have fewer options")
def test_the_installed_version_has_the_options_of_its_stand_in():
    assert attention._options_of(of_2_12) <= attention._options_of(attention.varlen_attn)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("it has neither scale nor window_size")


@pytest.mark.parametrize("varlen", [of_2_11, of_2_12, of_2_10, None], ids=["2.11", "2.12", "2.10", "2.9"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_every_version_of_flash_attention(monkeypatch, varlen, window, shared):
    """A GPU would use flash attention for half precision; here each version of its function has a stand-in."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=g, dtype=torch.float16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 6, 12]).int()
    texts = {"scale": 0.3, "sliding_window": window, "bounds": (bounds, bounds), "longest": (6, 6), "keys": None}
    if shared:  # the second and the third segment continue the first one
        keys = torch.tensor([*range(5), *range(6), *range(5), *range(6, 12)])
        texts |= {"bounds": (bounds, torch.tensor([0, 5, 11, 22]).int()), "longest": (6, 11), "keys": keys}
    expected = attention._attend_within(query.float(), key.float(), value.float(), **texts)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    assert attention._has_varlen(query, value) == (varlen in (of_2_11, of_2_12))
    if attention._has_varlen(query, value):
        found = attention._by_varlen(query, key, value, *texts.values())
        torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("size", "of_values", "expected"), [(256, 256, True), (24, 16, False), (264, 264, False), (12, 12, False)]
)
def test_heads_that_flash_attention_does_not_take(monkeypatch, size, of_values, expected):
    """Values of another size than queries (DeepSeek-V2), and large heads (Gemma 4)."""
    monkeypatch.setattr(attention, "varlen_attn", of_2_12)
    query, value = (torch.zeros(1, 2, 3, n, dtype=torch.bfloat16) for n in (size, of_values))
    assert attention._has_varlen(query, value) == expected


def test_a_compiled_decoding_step_does_not_repeat_keys(tiny_model):
    """Queries that share keys are grouped, so that no tensor is as large as the keys repeated for each query."""
    trunk = load_model(str(tiny_model("llama"))).base_model
    config, sizes = trunk.config, []
    groups = config.num_attention_heads // config.num_key_value_heads
    assert groups > 1
    shape = (3, config.num_key_value_heads, 50, config.hidden_size // config.num_attention_heads)
    query, keys = torch.randn(3, config.num_attention_heads, 1, shape[3]), torch.randn(shape)
    mask = torch.rand(3, 1, 1, 50) < 0.7

    def attend(query, keys):
        attention_layer = trunk.layers[0].self_attn
        return attention._attend(attention_layer, query, keys, keys, mask, scaling=0.3)[0]

    def record(graph, inputs):
        sizes.extend(node.meta["example_value"].numel() for node in graph.graph.nodes if "example_value" in node.meta)
        return graph

    torch.compiler.reset()
    found = torch.compile(attend, backend=record)(query, keys)
    assert max(sizes) == keys.numel()
    repeated = keys.repeat_interleave(groups, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("mask", [None, torch.arange(50) > 20, torch.arange(50).float().neg()])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_of_one_query_by_products(mask, scale):
    query, key, value = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 50, 8), torch.randn(3, 4, 50, 8)
    mask = None if mask is None else mask.expand(3, 1, 1, 50)
    found = attention._one_query_by_products(query, key, value, mask, scale)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
