from dataclasses import replace

import pytest
import torch

from lit_rlhf.rewards import OverlongPenalty, make_reward_inputs


def test_the_penalty_begins_a_buffer_before_the_maximum_length():
    inputs = make_reward_inputs(["a"] * 6)
    lengths = torch.tensor([0, 6, 7, 8, 10, 12])  # the last one is longer than the maximum
    inputs = replace(inputs, rollout=replace(inputs.rollout, response_lengths=lengths))
    penalties = OverlongPenalty(max_tokens=10, buffer=4)(inputs)
    assert penalties.dtype == torch.float32
    assert penalties.tolist() == [0, 0, -0.25, -0.5, -1, -1]


@pytest.mark.parametrize("buffer", [0, 11])
def test_a_buffer_out_of_range(buffer):
    with pytest.raises(ValueError, match=r"^buffer must be from 1 to max_tokens, 10, not"):
        OverlongPenalty(max_tokens=10, buffer=buffer)
