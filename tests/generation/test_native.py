import gc
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.generation.cache import RowCache, _Layer
from lit_rlhf.generation.engine import SpecialTokens, find_special_tokens, join_responses
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.loading import RandomWeights, load_model, load_tokenizer
from lit_rlhf.randomness import Stream
from lit_rlhf.types import PromptBatch

MODELS = [(a, "distinct") for a in ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox")]
MODELS += [(a, special) for a in ("llama", "gpt2") for special in ("bos_is_eos", "pad_is_eos")]
TEMPERATURE = 0.7
LONGEST = 16
WORDS = [f"w{i}" for i in range(32)]
STOP = ("w4", "w9")  # in addition to <eos>, so that some responses end early and some do not, on every model


@dataclass
class Subject:
    """A model with its tokenizer, and methods that make prompts and generate responses."""

    actor: Actor
    tokenizer: object

    def special_tokens(self, stop=()) -> SpecialTokens:
        return find_special_tokens(self.actor, self.tokenizer, stop)

    def prompts(self, count=16, seed=0) -> PromptBatch:
        g = torch.Generator().manual_seed(seed)
        texts = [" ".join(WORDS[i] for i in torch.randint(32, (1 + n % 6,), generator=g)) for n in range(count)]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        return PromptBatch(
            tokens=encoded.input_ids,
            mask=encoded.attention_mask.bool(),
            group=torch.arange(count),
            prompts=texts,
            columns={},
        )

    def generate(self, prompts=None, engine=NativeEngine(), stream=Stream.ROLLOUT, iteration=0, **sampling):
        sampling = Sampling(**{"max_tokens": LONGEST, "temperature": TEMPERATURE, "stop": STOP} | sampling)
        prompts = prompts or self.prompts()
        special_tokens = self.special_tokens(sampling.stop)
        return engine.generate(self.actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)


@pytest.fixture(scope="module")
def load(tiny_model):
    @cache
    def make(architecture="llama", special="distinct"):
        seed = 25 if architecture == "gpt2" else 14  # some responses must end early, also with older initialisations
        folder = str(tiny_model(architecture, special=special, seed=seed))
        return Subject(Actor(load_model(folder), TEMPERATURE), load_tokenizer(folder))

    return make


@pytest.fixture(params=MODELS, ids="-".join)
def subject(load, request):
    return load(*request.param)


@pytest.fixture
def llama(load):
    return load()


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")


def part(prompts, rows):
    rows = list(rows)
    tensors = {name: getattr(prompts, name)[rows] for name in ("tokens", "mask", "group")}
    return replace(prompts, prompts=[prompts.prompts[i] for i in rows], **tensors)


def responses(rollout):
    found = rollout.at_responses(rollout.tokens)
    return [row[mask].tolist() for row, mask in zip(found, rollout.response_mask, strict=True)]


def assert_some_end_early(rollout):
    assert 0 < rollout.terminated.sum() < len(rollout.terminated)
    assert rollout.response_lengths.unique().numel() > 2
    assert rollout.response_lengths.max() == LONGEST


def test_greedy_equals_transformers(subject):
    prompts = subject.prompts()
    assert not prompts.mask.all()
    theirs = subject.actor.model.generate(
        prompts.tokens, attention_mask=prompts.mask.long(), do_sample=False, max_new_tokens=40
    )[:, prompts.tokens.shape[1] :].tolist()
    eos = subject.tokenizer.eos_token_id
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in theirs]
    assert len({len(row) for row in cut}) > 2
    assert responses(subject.generate(temperature=0, max_tokens=40, stop=())) == cut


def test_a_rollout_is_contiguous_and_right_padded(subject):
    prompts, special_tokens = subject.prompts(), subject.special_tokens(STOP)
    rollout = subject.generate(prompts)
    assert_some_end_early(rollout)
    assert rollout.tokens.shape[1] == rollout.lengths.max()
    assert rollout.response_mask.shape == rollout.rollout_logprobs.shape == (16, rollout.response_lengths.max())
    assert torch.equal(rollout.prompt_lengths, prompts.mask.sum(1))
    assert torch.equal(rollout.response_mask.sum(1), rollout.response_lengths)
    assert torch.equal(rollout.group, prompts.group)
    assert (rollout.rollout_logprobs[~rollout.response_mask] == 0).all()
    for row, response in enumerate(responses(rollout)):
        prompt = prompts.tokens[row, prompts.mask[row]].tolist()
        padding = [special_tokens.pad] * (rollout.tokens.shape[1] - len(prompt) - len(response))
        assert rollout.tokens[row].tolist() == prompt + response + padding
        assert rollout.response_mask[row].tolist() == [True] * len(response) + [False] * (LONGEST - len(response))
        assert not set(response[:-1]) & set(special_tokens.stop)
        assert rollout.terminated[row] == (response[-1] in special_tokens.stop)
        assert rollout.terminated[row] or len(response) == LONGEST


@pytest.mark.parametrize("cache_tokens", [None, 150])
def test_logprobs_and_entropies_are_the_actors_own(subject, cache_tokens):
    engine = NativeEngine(cache_tokens)
    assert engine.is_exact
    rollout = subject.generate(engine=engine, top_k=10, top_p=0.9, min_tokens=2)
    assert_some_end_early(rollout)
    mask, stats = rollout.response_mask, subject.actor(rollout.tokens, rollout.response_tokens_mask)
    for found, own in ((rollout.rollout_logprobs, stats.logprobs), (rollout.rollout_entropy, stats.entropy)):
        assert found.dtype == torch.float32
        assert (found[~mask] == 0).all()
        torch.testing.assert_close(found[mask], rollout.at_responses(own)[mask], atol=1e-5, rtol=1e-5)


def test_a_compiled_step_draws_the_same(llama):
    torch.compiler.reset()
    counters.clear()
    prompts = llama.prompts(count=24)
    expected = responses(llama.generate(prompts, max_tokens=100))
    assert not counters["stats"]["unique_graphs"]
    assert len({len(response) for response in expected}) > 10
    for cache_tokens in (None, 600):
        found = llama.generate(prompts, NativeEngine(cache_tokens, compile=True), max_tokens=100)
        assert responses(found) == expected
    assert counters["stats"]["unique_graphs"] == 1  # whatever the number of rows and columns


@pytest.fixture
def uncompiled(monkeypatch):
    """Compute the decoding steps of fixed shape without ``torch.compile``."""
    monkeypatch.setattr("lit_rlhf.generation.static._compiled_next_logits", lambda: Actor.next_logits)


@pytest.fixture
def replayed(uncompiled, monkeypatch):
    """Replay each decoding step of fixed shape from recorded operations, as a GPU does with a CUDA graph.

    Return the list of the masks' shapes in the recorded steps.
    """
    shapes = []

    def record(step, device):
        shapes.append(tuple(step.args[2].shape))
        return make_fx(step)()

    monkeypatch.setattr("lit_rlhf.generation.static.capture", record)
    return shapes


@pytest.mark.parametrize(
    ("architecture", "cache_tokens"), [("llama", None), ("llama", 700), ("gpt2", None), ("qwen3", None)]
)
def test_a_step_of_fixed_shape_can_be_replayed(load, replayed, monkeypatch, architecture, cache_tokens):
    subject = load(architecture)
    monkeypatch.setattr("lit_rlhf.generation.native.INITIAL_COLUMNS", 8)
    prompts = subject.prompts(count=32)
    expected = subject.generate(prompts, max_tokens=60)
    found = subject.generate(prompts, NativeEngine(cache_tokens, compile=True), max_tokens=60)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=0)
    assert 2 < len(replayed) < 12
    assert len({rows for rows, _ in replayed}) > 1
    assert len({columns for _, columns in replayed}) > 1
    assert all(columns % 8 == 0 for _, columns in replayed)


def test_sliding_windows(tiny_model, replayed):
    config = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}  # fmt: skip
    folder = str(tiny_model("llama"))
    model = load_model(RandomWeights(config=config, tokenizer=folder))
    subject = Subject(Actor(model, TEMPERATURE), load_tokenizer(folder))
    for prompts in (subject.prompts(), part(subject.prompts(), [2, 8])):  # the second without padding
        expected = subject.generate(prompts)
        found = subject.actor(expected.tokens, expected.response_tokens_mask).logprobs
        mask = expected.response_mask
        torch.testing.assert_close(expected.rollout_logprobs[mask], expected.at_responses(found)[mask])
        assert torch.equal(subject.generate(prompts, NativeEngine(compile=True)).tokens, expected.tokens)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [range(16), [2, 8]], ids=["padded", "unpadded"])
def test_the_host_rarely_waits_for_a_gpu(llama, uncompiled, monkeypatch, compiled, rows):
    prompts, copies, tolist = part(llama.prompts(), rows), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append(x) or tolist(x))
    monkeypatch.setattr(_Layer, "is_compileable", True)  # as on a GPU
    monkeypatch.setattr("lit_rlhf.generation.native.CHECK_ENDED_EVERY_CPU", 8)
    with HostReads() as reads:
        rollout = llama.generate(prompts, NativeEngine(compile=compiled), max_tokens=64, min_tokens=64)
    once_per_generation = 6
    assert reads.count + len(copies) <= 64 // 8 + once_per_generation
    assert (rollout.response_lengths == 64).all()


def test_a_step_on_another_device_reads_nothing(subject):
    """Tensors on the meta device have no values that could be read."""
    tokens, cache, prefilled = torch.ones(3, 5, dtype=torch.long), RowCache(4, 12, end=8), DynamicCache()
    subject.actor.next_logits(tokens, tokens > 0, tokens, prefilled)
    cache.insert(prefilled, 1)
    cache.start = 3
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    actor, new = deepcopy(subject.actor).to("meta"), tokens[:, :1].to("meta")
    mask = torch.ones(3, 6, dtype=torch.bool, device="meta")
    assert actor.next_logits(new, mask, new, cache).shape == (3, 38)


def test_attention_does_not_use_cudnn(llama):
    """For each number of keys, cuDNN would make a plan, which takes longer than a token."""
    enabled, step = [], llama.actor.next_logits

    def seen(*inputs):
        cuda = torch.backends.cuda
        enabled.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return step(*inputs)

    llama.actor.next_logits = seen
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        llama.generate()
    finally:
        del llama.actor.next_logits
    assert set(enabled) == {(False, True, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_the_cache_is_freed_without_the_garbage_collector(llama, uncompiled, monkeypatch, compiled):
    alive, update = [], _Layer.update

    def updated(layer, *others, **options):
        alive.extend(weakref.ref(states) for states in (layer.keys, layer.values))
        return update(layer, *others, **options)

    monkeypatch.setattr(_Layer, "update", updated)
    gc.disable()
    try:
        llama.generate(engine=NativeEngine(compile=compiled))
        assert alive
        assert not any(states() is not None for states in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("cache_tokens", [None, 300])
def test_prefill_is_divided_into_chunks(llama, monkeypatch, cache_tokens):
    prompts = llama.prompts(count=24)
    engine = NativeEngine(cache_tokens)
    expected = llama.generate(prompts, engine, responses=2)
    shapes, step = [], llama.actor.next_logits

    def seen(tokens, *others):
        shapes.append(tuple(tokens.shape))
        return step(tokens, *others)

    monkeypatch.setattr("lit_rlhf.generation.native.PREFILL_TOKENS", 20)
    llama.actor.next_logits = seen
    try:
        found = llama.generate(prompts, engine, responses=2)
    finally:
        del llama.actor.next_logits
    prefilled = [shape for shape in shapes if shape[1] > 1]
    assert len(prefilled) > 4
    assert all(rows * width <= 20 for rows, width in prefilled)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_samples_do_not_depend_on_batching(subject, n):
    prompts = subject.prompts(8)
    whole = responses(subject.generate(prompts, responses=n))
    for cache_tokens in (1, 150 * n):  # one prompt at a time, and a few rows that are refilled
        assert responses(subject.generate(prompts, NativeEngine(cache_tokens), responses=n)) == whole
    halves = [subject.generate(part(prompts, rows), responses=n) for rows in (range(4), range(4, 8))]
    assert [response for half in halves for response in responses(half)] == whole
    backwards = responses(subject.generate(part(prompts, reversed(range(8))), responses=n))
    assert [r for i in reversed(range(8)) for r in backwards[i * n : (i + 1) * n]] == whole


@pytest.mark.parametrize("cache_tokens", [None, 300, 700])
@pytest.mark.parametrize("first_columns", [1, 3])
def test_the_cache_grows_and_is_shifted(llama, monkeypatch, cache_tokens, first_columns):
    """The cache starts small, grows for the rows that are still active, and is shifted to the left when full."""
    prompts = llama.prompts(count=24)
    expected = responses(llama.generate(prompts, max_tokens=60))
    assert max(map(len, expected)) > 30
    monkeypatch.setattr("lit_rlhf.generation.native.INITIAL_COLUMNS", first_columns)
    assert responses(llama.generate(prompts, NativeEngine(cache_tokens), max_tokens=60)) == expected


@pytest.mark.parametrize("check_every", [3, 8])
def test_checking_less_often_gives_the_same_responses(subject, monkeypatch, check_every):
    """On a GPU, for example, rows that have ended are computed until the next check."""
    prompts = subject.prompts()
    expected = subject.generate(prompts)
    monkeypatch.setattr("lit_rlhf.generation.native.CHECK_ENDED_EVERY_CPU", check_every)
    for engine in (NativeEngine(), NativeEngine(cache_tokens=150)):
        found = subject.generate(prompts, engine)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.response_mask, expected.response_mask)
        assert torch.equal(found.terminated, expected.terminated)
        torch.testing.assert_close(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=1e-5)


def test_rows_that_have_ended_are_not_computed(llama):
    rows, step = [], llama.actor.next_logits

    def counted(tokens, *others):
        rows.append(len(tokens))
        return step(tokens, *others)

    llama.actor.next_logits = counted
    try:
        rollout = llama.generate(max_tokens=60)
        assert sum(rows) == 16 + int((rollout.response_lengths - 1).sum())  # the prompts, then each token but the last
        rows.clear()
        llama.generate(max_tokens=60, engine=NativeEngine(cache_tokens=700))
        assert 1 < max(rows) < 16
    finally:
        del llama.actor.next_logits


def test_each_prompt_is_computed_once_for_all_its_responses(llama):
    shapes, step = [], llama.actor.next_logits

    def seen(tokens, *others):
        shapes.append(tuple(tokens.shape))
        return step(tokens, *others)

    llama.actor.next_logits = seen
    try:
        llama.generate(responses=5)
    finally:
        del llama.actor.next_logits
    (prompts, _), (rows, width) = shapes[:2]
    assert prompts == 16
    assert 16 < rows <= 80
    assert width == 1
    assert all(width == 1 for _, width in shapes[1:])


class CastsOf(TorchDispatchMode):
    """Count every cast of a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.weight.data_ptr():
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 has linear layers of its own kind
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_casts_the_weights_once_per_generation(load, uncompiled, monkeypatch, architecture, compiled):
    subject, engine = load(architecture), NativeEngine(compile=compiled)
    if compiled:  # compiled operations do not use autocast's cache
        monkeypatch.setattr("lit_rlhf.generation.native._autocast_cache", nullcontext)
    *_, first_weight = (p for name, p in subject.actor.named_parameters() if "attn" in name and p.dim() == 2)
    for weight in (first_weight, subject.actor.model.get_output_embeddings().weight):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with CastsOf(weight) as casts:
                first = subject.generate(engine=engine)
            assert first.response_lengths.max() > 5
            assert casts.count == 1
            assert not torch.is_autocast_cache_enabled()
            assert torch.equal(subject.generate(engine=engine).tokens, first.tokens)
            with torch.no_grad():
                weight.neg_()  # a stale copy would miss this change
            changed = subject.generate(engine=engine)
            with torch.no_grad():
                weight.neg_()
        assert not torch.equal(changed.tokens, first.tokens)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in subject.actor.parameters())


def test_a_model_that_keeps_more_than_keys_and_values(tiny_model):
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    folder = str(tiny_model("llama"))
    actor = Actor(load_model(RandomWeights(config=config, tokenizer=folder)))
    with pytest.raises(UserError, match=r"model\.engine: .* keys and values"):
        Subject(actor, load_tokenizer(folder)).generate()


def test_several_responses_per_prompt(subject):
    prompts = subject.prompts()
    rollout = subject.generate(prompts, responses=3, min_tokens=3)
    assert_some_end_early(rollout)
    assert rollout.group.tolist() == [i for i in range(16) for _ in range(3)]
    assert torch.equal(rollout.prompt_lengths, prompts.mask.sum(1).repeat_interleave(3))
    found = responses(rollout)
    for i in range(16):
        assert len({tuple(r) for r in found[3 * i : 3 * i + 3]}) == 3
    for k in range(3):  # response k of prompt i is row 3 i + k of the global batch
        alone = subject.generate(replace(prompts, group=3 * prompts.group + k), min_tokens=3)
        assert responses(alone) == found[k::3]


def test_additional_padding_of_the_prompts_changes_nothing(llama):
    prompts = llama.prompts()
    wider = replace(
        prompts,
        tokens=torch.nn.functional.pad(prompts.tokens, (5, 0), value=9),
        mask=torch.nn.functional.pad(prompts.mask, (5, 0), value=False),
    )
    first, second = llama.generate(prompts), llama.generate(wider)
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.rollout_logprobs, second.rollout_logprobs, atol=1e-5, rtol=0)


def test_tokens_follow_the_distribution(llama):
    """The frequencies of the first tokens of 3,000 responses to one prompt match the softmax."""
    prompts = part(llama.prompts(), [3])
    rollout = llama.generate(prompts, responses=3000, max_tokens=1, top_k=8)
    drawn = rollout.at_responses(rollout.tokens)[:, 0].bincount(minlength=38) / 3000
    with torch.no_grad():
        logits = llama.actor.model(prompts.tokens[prompts.mask][None]).logits[0, -1] / TEMPERATURE
    expected = torch.zeros(38).index_copy(0, logits.topk(8).indices, logits.topk(8).values.softmax(0))
    torch.testing.assert_close(drawn, expected, atol=0.035, rtol=0)  # at most 4 standard deviations
    assert (drawn[expected == 0] == 0).all()


def test_min_tokens(llama):
    free, bound = llama.generate(), llama.generate(min_tokens=4)
    assert free.response_lengths.min() < 5
    assert bound.response_lengths.min() == 5  # four tokens, then a stop token at the earliest position
    stops = set(llama.special_tokens(STOP).stop)
    assert all(not stops & set(response[:4]) for response in responses(bound))
    assert not llama.generate(min_tokens=6, max_tokens=6).terminated.any()


def test_min_tokens_does_not_change_longer_responses(llama):
    """With greedy decoding, responses that are longer anyway do not change."""
    free, bound = (responses(llama.generate(temperature=0, min_tokens=n)) for n in (0, 6))
    assert 0 < sum(len(response) > 6 for response in free) < 16
    for before, after in zip(free, bound, strict=True):
        assert len(after) > 6
        assert (after == before) == (len(before) > 6)


@pytest.mark.parametrize("max_tokens", [1, 7])
def test_max_tokens_truncates(llama, max_tokens):
    prompts = llama.prompts(count=64)
    long, short = llama.generate(prompts), llama.generate(prompts, max_tokens=max_tokens)
    assert responses(short) == [response[:max_tokens] for response in responses(long)]
    ends = long.terminated & (long.response_lengths <= max_tokens)
    assert torch.equal(short.terminated, ends)
    assert 0 < ends.sum() < 64


def test_a_response_beyond_learned_positions_is_refused(load):
    longest = max(map(len, load("gpt2", "distinct").prompts().mask))
    with pytest.raises(UserError, match=rf"^model\.sampling\.max_tokens: .* {longest} tokens .* 123 .* 128 positions"):
        load("gpt2", "distinct").generate(max_tokens=123)
    load("llama", "distinct").generate(max_tokens=123, stop=WORDS)  # rotary positions are computed


def test_stop_tokens(llama):
    free, stopped = llama.generate(stop=()), llama.generate()
    stops = set(llama.tokenizer.convert_tokens_to_ids(["<eos>", *STOP]))
    ends = {response[-1] for response, ended in zip(responses(stopped), stopped.terminated, strict=True) if ended}
    assert len(ends) > 1
    assert ends <= stops
    for response, longer in zip(responses(stopped), responses(free), strict=True):
        first = next((i for i, token in enumerate(longer) if token in stops), LONGEST)
        assert response == longer[: first + 1]


def test_special_tokens(llama, load):
    assert llama.special_tokens() == SpecialTokens(stop=(1,), pad=0)
    assert llama.special_tokens(("w3", "w5", "<eos>")) == SpecialTokens(stop=(1, 9, 11), pad=0)
    assert load("llama", "pad_is_eos").special_tokens() == SpecialTokens(stop=(1,), pad=1)
    for text in ("w3 w5", ""):
        with pytest.raises(UserError, match=rf"^sampling\.stop: '{text}' is \d tokens of this tokenizer, not one"):
            llama.special_tokens((text,))


def test_stop_tokens_of_the_generation_config(tiny_model):
    folder = str(tiny_model())
    subject = Subject(Actor(load_model(folder), TEMPERATURE), load_tokenizer(folder))
    subject.actor.model.generation_config.eos_token_id = [1, 9, 11]
    assert subject.special_tokens() == SpecialTokens(stop=(1, 9, 11), pad=0)
    assert {response[-1] for response in responses(subject.generate(stop=(), max_tokens=60))} >= {9, 11}


def test_unknown_stop_word(llama):
    with pytest.raises(UserError, match=r"sampling\.stop"):
        llama.special_tokens(("w99",))


def test_samples_depend_on_seed_stream_and_iteration_only(llama, monkeypatch):
    def tokens(**options):
        return responses(llama.generate(**options))

    first = tokens()
    torch.manual_seed(5)
    assert tokens() == first
    others = [tokens(iteration=1), tokens(stream=Stream.VALIDATION)]
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    others.append(tokens())
    for i, other in enumerate(others):
        assert all(other != before for before in [first, *others[:i]])
        assert sum(a == b for a, b in zip(other, first, strict=True)) <= 2
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert tokens() == first


def test_no_gradients(llama):
    assert not llama.generate().rollout_logprobs.requires_grad


@pytest.mark.parametrize("cache_tokens", [0, -1])
def test_out_of_range(cache_tokens):
    with pytest.raises(ValueError, match=f"^cache_tokens must .*{cache_tokens}$"):
        NativeEngine(cache_tokens=cache_tokens)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logprobs", r"^shapes differ: tokens \[4, 3\], logprobs \[4, 1\], entropy \[4, 3\]$"),
        ("lengths", r"^shapes differ: prompts \[4\], responses \[4\], lengths \[4, 1\], terminated \[4\]$"),
    ],
)
def test_join_responses_rejects_wrong_shapes(llama, name, message):
    """Without this check, a column vector from an engine would broadcast silently."""
    responses = {
        "tokens": torch.zeros(4, 3, dtype=torch.long),
        "logprobs": torch.zeros(4, 3),
        "entropy": torch.zeros(4, 3),
        "lengths": torch.ones(4, dtype=torch.long),
        "terminated": torch.ones(4, dtype=torch.bool),
    }
    join_responses(llama.prompts(count=4), Sampling(), 0, **responses)
    responses[name] = responses[name][..., None] if name == "lengths" else responses[name][:, :1]
    with pytest.raises(ValueError, match=message):
        join_responses(llama.prompts(count=4), Sampling(), 0, **responses)
