from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lit_rlhf import batching
from lit_rlhf.batching import Item, demonstration_micro_batches, pack, preference_micro_batches
from lit_rlhf.types import DemonstrationBatch, Experience, PreferenceBatch, PromptBatch, Rollout

PROMPTS = [2, 4, 1, 3]
RESPONSES = [3, 1, 5, 0]
NUMBERS = ("old_logprobs", "ref_logprobs", "policy_weights", "advantages", "returns", "reward_scale")


def make_rollout(prompts=PROMPTS, responses=RESPONSES):
    """Return a rollout in which token t of row r is 100 r + t + 1; padding is 0."""
    prompt_lengths, response_lengths = torch.tensor(prompts), torch.tensor(responses)
    lengths = prompt_lengths + response_lengths
    position = torch.arange(int(lengths.max()))
    tokens = 100 * torch.arange(len(prompts))[:, None] + position + 1
    mask = torch.arange(int(response_lengths.max())) < response_lengths[:, None]
    return Rollout(
        tokens=torch.where(position < lengths[:, None], tokens, 0),
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        rollout_logprobs=torch.where(mask, -torch.rand(mask.shape), 0.0),
        rollout_entropy=torch.where(mask, torch.rand(mask.shape), 0.0),
        response_mask=mask,
        terminated=response_lengths < 4,
        group=10 + torch.arange(len(prompts)),
    )


def make_experience(seed, rows=13, with_values=True):
    """Return experience in which every [B, T] field holds the number of its row."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, rows), generator=g).tolist()
    rollout = make_rollout(*lengths)
    numbers = torch.arange(rows)[:, None].expand(rollout.response_mask.shape).float()
    fields = dict.fromkeys(NUMBERS, numbers)
    return Experience(rollout=rollout, values=numbers if with_values else None, **fields)


def rows_of(experience):
    return experience.advantages[:, 0].long().tolist()


def minibatches(experience, count, max_tokens, seed=0, pads=True):
    cut = batching.minibatches(experience, count, torch.Generator().manual_seed(seed))
    return [batching.micro_batches(minibatch, max_tokens, pads=pads) for minibatch in cut]


def size_of(tokens, lengths, shared, pads):
    """Return the number of tokens that a model computes."""
    return tokens.numel() if pads else int((lengths - shared).sum())


def test_positions_of_a_rollout():
    rollout = make_rollout()
    at, before = rollout.at_responses(rollout.tokens), rollout.before_responses(rollout.tokens)
    assert at.shape == before.shape == rollout.response_mask.shape
    assert at[rollout.response_mask].tolist() == [3, 4, 5, 105, 202, 203, 204, 205, 206]
    assert before[rollout.response_mask].tolist() == [2, 3, 4, 104, 201, 202, 203, 204, 205]
    assert rollout.at_end(rollout.tokens).tolist() == [5, 105, 206, 303]
    assert rollout.lengths.tolist() == [5, 5, 6, 3]
    assert rollout.tokens[rollout.response_tokens_mask].tolist() == at[rollout.response_mask].tolist()
    assert rollout.response_tokens_mask.sum(1).tolist() == RESPONSES


def test_positions_pass_gradients():
    rollout = make_rollout()
    x = torch.zeros(rollout.tokens.shape, requires_grad=True)
    rollout.at_responses(x)[rollout.response_mask].sum().backward()
    assert torch.equal(x.grad, rollout.response_tokens_mask.float())


def test_select_cuts_to_the_longest():
    rollout = make_rollout()
    some = rollout.select(torch.tensor([1, 0]))
    assert some.tokens.tolist() == [[101, 102, 103, 104, 105], [1, 2, 3, 4, 5]]
    assert some.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(some.rollout_logprobs, rollout.rollout_logprobs[[1, 0], :3])
    assert torch.equal(some.rollout_entropy, rollout.rollout_entropy[[1, 0], :3])
    assert (some.prompt_lengths.tolist(), some.response_lengths.tolist()) == ([4, 2], [1, 3])
    assert (some.terminated.tolist(), some.group.tolist()) == ([True, True], [11, 10])
    assert some.at_responses(some.tokens)[some.response_mask].tolist() == [105, 3, 4, 5]


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize(("count", "max_tokens"), [(1, 10**6), (4, 40), (5, 1), (13, 20)])
@pytest.mark.parametrize("pads", [True, False])
def test_minibatches_hold_every_row_once(count, max_tokens, with_values, pads):
    experience = make_experience(count, with_values=with_values)
    cut = minibatches(experience, count, max_tokens, pads=pads)
    assert len(cut) == count
    sizes = [sum(len(micro_batch.advantages) for micro_batch in minibatch) for minibatch in cut]
    assert max(sizes) - min(sizes) <= 1
    micro_batches = [micro_batch for minibatch in cut for micro_batch in minibatch]
    assert sorted(row for micro_batch in micro_batches for row in rows_of(micro_batch)) == list(range(13))
    for micro_batch in micro_batches:
        rollout = micro_batch.rollout
        size = size_of(rollout.tokens, rollout.lengths, rollout.shared, pads)
        assert size <= max_tokens or len(rollout.tokens) == 1
        assert rollout.tokens.shape[1] == rollout.lengths.max()
        assert rollout.response_mask.shape[1] == rollout.response_lengths.max()
        whole = experience.rollout.select(torch.tensor(rows_of(micro_batch)))
        for name in ("tokens", "response_mask", "rollout_logprobs", "rollout_entropy", "group"):
            assert torch.equal(getattr(rollout, name), getattr(whole, name))
        for name in (*NUMBERS, *(["values"] if with_values else [])):
            expected = torch.tensor(rows_of(micro_batch))[:, None].expand(rollout.response_mask.shape).float()
            assert torch.equal(getattr(micro_batch, name), expected)
        assert with_values or micro_batch.values is None


def test_minibatches_are_a_function_of_the_generator():
    experience = make_experience(0)
    order = [[[rows_of(p) for p in m] for m in minibatches(experience, 3, 30, seed)] for seed in (0, 0, 1)]
    assert order[0] == order[1]
    assert order[0] != order[2]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    minibatches(experience, 3, 30)
    assert torch.equal(torch.rand(1), expected)


def test_minibatches_without_a_generator_keep_the_order():
    """Each of three minibatches has the consecutive rows that one of three workers drew."""
    cut = batching.minibatches(make_experience(0, rows=9), 3, None)
    assert [rows_of(minibatch) for minibatch in cut] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_minibatches_are_shuffled():
    """Each row is in the first of two minibatches about half the time."""
    experience = make_experience(0, rows=8)
    firsts = [minibatches(experience, 2, 99, seed)[0] for seed in range(400)]
    first = [row for minibatch in firsts for micro_batch in minibatch for row in rows_of(micro_batch)]
    frequencies = torch.tensor(first).bincount(minlength=8) / 400
    assert ((frequencies > 0.4) & (frequencies < 0.6)).all()


def make_items(lengths, rows=None):
    """Return items whose rows are numbered in order, have the given length, and share half of it, rounded down."""
    rows = [1] * len(lengths) if rows is None else rows
    numbers = torch.arange(sum(rows)).split(rows)
    return [
        Item(own.tolist(), tokens=length * count - (count - 1) * (length // 2), longest=length)
        for own, length, count in zip(numbers, lengths, rows, strict=True)
    ]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 150, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_pack(seed, max_tokens, pads):
    g = torch.Generator().manual_seed(seed)
    items = make_items(
        torch.randint(1, 30, (25,), generator=g).tolist(), torch.randint(1, 6, (25,), generator=g).tolist()
    )
    of_row = {row: number for number, item in enumerate(items) for row in item.rows}
    packed = [
        list(dict.fromkeys(of_row[row] for row in rows)) for rows in (r.tolist() for r in pack(items, max_tokens, pads))
    ]
    assert sorted(number for group in packed for number in group) == list(range(25))

    def size(group):
        rows, longest = sum(len(items[i].rows) for i in group), max(items[i].longest for i in group)
        return rows * longest if pads else sum(items[i].tokens for i in group)

    assert all(size(group) <= max_tokens or len(group) == 1 for group in packed)
    for larger, smaller in pairwise(packed):  # groups have similar items, and none was closed too early
        key = (lambda i: items[i].longest) if pads else (lambda i: items[i].tokens)
        assert min(map(key, larger)) >= max(map(key, smaller))
        assert size([*larger, smaller[0]]) > max_tokens


def test_pack_by_hand():
    found = pack(make_items([2, 9, 3, 2, 1], rows=[2, 2, 2, 1, 9]), max_tokens=12, pads=True)
    assert [rows.tolist() for rows in found] == [[2, 3], [4, 5, 0, 1], [6], [7, 8, 9, 10, 11, 12, 13, 14, 15]]
    found = pack(make_items([2, 9, 3, 2, 1], rows=[2, 2, 2, 1, 9]), max_tokens=15, pads=False)  # 3, 14, 5, 2, 9
    assert [rows.tolist() for rows in found] == [[2, 3], [7, 8, 9, 10, 11, 12, 13, 14, 15, 4, 5], [0, 1, 6]]
    found = pack(make_items([2, 9, 3, 2, 1]), max_tokens=6, pads=True)
    assert [rows.tolist() for rows in found] == [[1], [2, 0], [3, 4]]


def make_groups(prompts, responses, seed=0):
    """Return experience of several responses to each prompt, whose rows are numbered in the order of the prompts."""
    experience = make_experience(seed, rows=prompts * responses)
    rollout, group = experience.rollout, torch.arange(prompts).repeat_interleave(responses)
    starts = torch.where(torch.arange(rollout.tokens.shape[1]) < rollout.prompt_lengths[:, None], 1, rollout.tokens)
    prompt_lengths = torch.full_like(rollout.prompt_lengths, int(rollout.prompt_lengths.min()))
    lengths = rollout.lengths - prompt_lengths
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    numbers = torch.arange(len(group))[:, None].expand(mask.shape).float()
    rollout = replace(
        rollout, tokens=starts, prompt_lengths=prompt_lengths, response_lengths=lengths, group=group,
        response_mask=mask, rollout_logprobs=numbers, rollout_entropy=numbers,
    )  # fmt: skip
    return Experience(rollout=rollout, values=None, **dict.fromkeys(NUMBERS, numbers))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [12, 10**6])
def test_responses_to_a_prompt_stay_together(max_tokens, world_size):
    experience = make_groups(prompts=6, responses=4)
    ranks = [
        batching.micro_batches(experience, max_tokens, pads=False, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    rows = [
        row
        for micro_batches in ranks
        for micro_batch in micro_batches
        if micro_batch.rollout.response_mask.any()
        for row in rows_of(micro_batch)
    ]
    assert sorted(rows) == list(range(24))
    for micro_batch in (micro_batch for micro_batches in ranks for micro_batch in micro_batches):
        group = micro_batch.rollout.group
        assert len(group.unique_consecutive()) == len(group.unique())
        size = size_of(None, micro_batch.rollout.lengths, micro_batch.rollout.shared, pads=False)
        assert size <= max_tokens or len(group) == 1
    tokens = [sum(int((m.rollout.lengths - m.rollout.shared).sum()) for m in rank) for rank in ranks]
    assert max(tokens) <= 1.5 * min(tokens)
    if max_tokens == 10**6 and world_size == 1:
        assert len(ranks[0]) == 1
        assert (ranks[0][0].rollout.shared > 0).sum() == 18


def test_a_group_with_more_tokens_than_a_micro_batch_is_divided():
    rollout = make_groups(prompts=1, responses=6).rollout
    items = batching.items_of(rollout.tokens, rollout.lengths, rollout.group, 20, pads=False)
    assert len(items) > 1
    assert [row for item in items for row in item.rows] == list(range(6))
    assert all(item.tokens <= 20 or len(item.rows) == 1 for item in items)
    alone = batching.items_of(rollout.tokens, rollout.lengths, rollout.group, 20, pads=True)
    assert [item.rows for item in alone] == [[row] for row in range(6)]


def test_minibatches_keep_the_responses_to_a_prompt_together():
    experience = make_groups(prompts=6, responses=4)
    cut = list(batching.minibatches(experience, 3, torch.Generator().manual_seed(0)))
    assert [len(minibatch.rollout.group.unique()) for minibatch in cut] == [2, 2, 2]
    prompts = [int(prompt) for minibatch in cut for prompt in minibatch.rollout.group.unique_consecutive()]
    assert sorted(prompts) == list(range(6))
    assert prompts != list(range(6))
    one_each = make_experience(0)
    order = [
        row
        for minibatch in batching.minibatches(one_each, 1, torch.Generator().manual_seed(3))
        for row in rows_of(minibatch)
    ]
    assert order == torch.randperm(13, generator=torch.Generator().manual_seed(3)).tolist()


def test_prompt_batch_moves():
    ones = torch.ones(1, 2)
    batch = PromptBatch(tokens=ones, mask=ones, group=ones, prompts=["w1"], columns={"answer": [3]})
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.tokens, moved.mask, moved.group)} == {"meta"}
    assert (moved.prompts, moved.columns) == (["w1"], {"answer": [3]})


def make_preferences(counts, seed=0, with_margin=False):
    """Return rankings, numbered from 10, in which token t of row r is 100 r + t + 1; padding is 0."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(counts)
    prompt_lengths, response_lengths = torch.randint(1, 9, (2, rows), generator=g)
    lengths = prompt_lengths + response_lengths
    position = torch.arange(int(lengths.max()))
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    ranking = torch.zeros(mask.shape, dtype=torch.long)
    ranking[mask] = torch.arange(rows)
    return PreferenceBatch(
        tokens=torch.where(position < lengths[:, None], 100 * torch.arange(rows)[:, None] + position + 1, 0),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        ranking=ranking,
        mask=mask,
        margin=torch.arange(len(counts)) / 4 if with_margin else None,
        number=10 + torch.arange(len(counts)),
        prompts=[[number] for number in range(len(counts))],
    )


def rankings_of(batch):
    """Return the responses of each ranking by its number, best first, each as the tokens of prompt and of response."""
    return {
        int(number): [
            (batch.tokens[row, :prompt].tolist(), batch.tokens[row, prompt:length].tolist())
            for row in rows[present].tolist()
            for prompt, length in [(int(batch.prompt_lengths[row]), int(batch.lengths[row]))]
        ]
        for number, rows, present in zip(batch.number, batch.ranking, batch.mask, strict=True)
    }


def test_response_tokens_of_preferences():
    batch = make_preferences([2, 3])
    assert batch.tokens[batch.response_tokens_mask].tolist() == [
        token for responses in rankings_of(batch).values() for _, response in responses for token in response
    ]
    assert torch.equal(batch.response_tokens_mask.sum(1), batch.lengths - batch.prompt_lengths)


def test_by_ranking():
    batch = make_preferences([2, 3, 1])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    placed = batch.by_ranking(x)
    assert placed.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    placed.sum().backward()
    assert x.grad.tolist() == [1] * 6  # empty places pass no gradient to the first response


@pytest.mark.parametrize("with_margin", [False, True])
def test_select_preferences(with_margin):
    batch = make_preferences([2, 4, 3, 2], with_margin=with_margin)
    some = batch.select(torch.tensor([3, 0, 2]))
    whole = rankings_of(batch)
    assert rankings_of(some) == {number: whole[number] for number in (13, 10, 12)}
    assert some.number.tolist() == [13, 10, 12]
    assert some.prompts == [[3], [0], [2]]
    assert some.mask.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert some.tokens.shape == (7, int(some.lengths.max()))
    assert (some.margin is None) is not with_margin
    assert not with_margin or some.margin.tolist() == [0.75, 0.0, 0.5]
    assert rankings_of(some.select(torch.tensor([1]))) == {10: whole[10]}


@pytest.mark.parametrize("max_tokens", [1, 60, 150, 10**6])
@pytest.mark.parametrize("counts", [[2] * 11, [2, 5, 3, 2, 4, 2, 3, 3, 2]])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pads", [True, False])
def test_micro_batches_of_preferences_hold_every_ranking_once(counts, max_tokens, seed, pads):
    batch = make_preferences(counts, seed)
    batch.tokens[:, :2] = batch.tokens[:, :2] % 100  # every text begins alike
    micro_batches = preference_micro_batches(batch, max_tokens, pads)
    assert sum(len(micro_batch.mask) for micro_batch in micro_batches) == len(counts)
    merged = {number: rows for micro_batch in micro_batches for number, rows in rankings_of(micro_batch).items()}
    assert merged == rankings_of(batch)
    for micro_batch in micro_batches:
        size = size_of(micro_batch.tokens, micro_batch.lengths, micro_batch.shared, pads)
        assert size <= max_tokens or len(micro_batch.mask) == 1
        assert micro_batch.tokens.shape[1] == micro_batch.lengths.max()
        assert micro_batch.mask.shape[1] == micro_batch.mask.sum(1).max()
        assert len(micro_batch.tokens) == micro_batch.mask.sum()
    assert (len(micro_batches) == 1) is (max_tokens == 10**6)
    assert (len(micro_batches) == len(counts)) is (max_tokens == 1)


def test_preference_batch_moves():
    for with_margin in (False, True):
        batch = make_preferences([2, 3], with_margin=with_margin)
        moved = batch.to(torch.device("meta"))
        names = ["tokens", "prompt_lengths", "lengths", "ranking", "mask", "number"] + ["margin"] * with_margin
        assert {getattr(moved, name).device.type for name in names} == {"meta"}
        assert moved.prompts == batch.prompts
        assert (moved.margin is None) is not with_margin


def test_demonstrations_keep_their_order_and_are_cut_after_the_last_trained_token():
    tokens, ends = torch.arange(20).view(4, 5), torch.tensor([2, 4, 1, 3])
    mask = torch.arange(5) == ends[:, None] - 1
    batch = DemonstrationBatch(tokens=tokens, mask=mask, positions=tokens % 5)
    assert batch.lengths.tolist() == ends.tolist()
    (whole,) = demonstration_micro_batches(batch, 16, pads=True)
    assert torch.equal(whole.tokens, tokens[:, :4])
    first, second = demonstration_micro_batches(batch, 8, pads=True)
    assert (first.tokens.tolist(), first.positions.tolist()) == ([[5, 6, 7, 8], [15, 16, 17, 18]], [[0, 1, 2, 3]] * 2)
    assert (second.tokens.tolist(), second.mask.tolist()) == ([[0, 1], [10, 11]], [[False, True], [True, False]])
