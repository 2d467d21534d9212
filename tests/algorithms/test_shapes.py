"""Wrong shapes are refused in one clear line; without the checks, most of these calls would broadcast silently."""

import pytest
import torch

from lit_rlhf.algorithms.advantages import discounted_sum, n_step_sum, td_errors
from lit_rlhf.algorithms.corrections import importance_ratio
from lit_rlhf.algorithms.kl import full_kl, k1, k2, k3
from lit_rlhf.algorithms.masked import masked_mean, masked_sum, masked_var, masked_whiten, token_weights
from lit_rlhf.algorithms.objectives import Clip, KLPenalty, Surrogate, VanillaPG, log_ratio
from lit_rlhf.algorithms.off_policy_objectives import CISPO, DPPO
from lit_rlhf.algorithms.preferences import bradley_terry, implicit_reward, plackett_luce
from lit_rlhf.algorithms.vtrace import trace_sums

x, column, row = torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3)
vector, other_vector = torch.ones(2), torch.ones(3)
mask, mask_column, mask_row = x.bool(), column.bool(), row.bool()
TOTALS = {"total_tokens": 6, "total_sequences": 2, "max_tokens": 3}
X_AND_MASK = r"x \[2, 3\], mask \[1, 3\]"
LOGPROBS = r"logprobs \[2, 3\], ref_logprobs \[2, 1\]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_sum(x, mask_row), X_AND_MASK),
        (lambda: masked_sum(x, mask_row, 1), X_AND_MASK),
        (lambda: masked_sum(column, mask), r"x \[2, 1\], mask \[2, 3\]"),
        (lambda: masked_mean(x, mask_row), X_AND_MASK),
        (lambda: masked_mean(x, mask_row, 1), X_AND_MASK),
        (lambda: masked_var(x, mask_row), X_AND_MASK),
        (lambda: masked_var(column, mask), r"x \[2, 1\], mask \[2, 3\]"),
        (lambda: masked_whiten(x, mask_row), X_AND_MASK),
        (lambda: masked_whiten(column, mask), r"x \[2, 1\], mask \[2, 3\]"),
        (lambda: td_errors(x, None, mask_row), r"rewards \[2, 3\], mask \[1, 3\]"),
        (lambda: td_errors(x, column, mask), r"rewards \[2, 3\], values \[2, 1\], mask \[2, 3\]"),
        (lambda: td_errors(x, x, mask, bootstrap=column), r"rows \[2\], bootstrap \[2, 1\]"),
        (lambda: td_errors(x, x, mask, bootstrap=other_vector), r"rows \[2\], bootstrap \[3\]"),
        (lambda: discounted_sum(x, mask_row, 0.5), X_AND_MASK),
        (lambda: discounted_sum(x, mask, column), r"rows \[2\], discount \[2, 1\]"),
        (lambda: n_step_sum(x, mask_row, 2, 0.5), X_AND_MASK),
        (lambda: trace_sums(x, column, mask), r"x \[2, 3\], traces \[2, 1\], mask \[2, 3\]"),
        (lambda: log_ratio(x, column, mask), r"logprobs \[2, 3\], old_logprobs \[2, 1\], mask \[2, 3\]"),
        (lambda: importance_ratio(x, x, mask_row), r"logprobs \[2, 3\], old_logprobs \[2, 3\], mask \[1, 3\]"),
        (lambda: k1(x, column), LOGPROBS),
        (lambda: k2(x, column), LOGPROBS),
        (lambda: k3(x, column), LOGPROBS),
        (lambda: full_kl(x, row), r"logits \[2, 3\], ref_logits \[1, 3\]"),
        (lambda: bradley_terry(vector, column), r"chosen \[2\], rejected \[2, 1\]"),
        (lambda: bradley_terry(vector, vector, column), r"chosen \[2\], rejected \[2\], margin \[2, 1\]"),
        (lambda: plackett_luce(x, mask_row), r"scores \[2, 3\], mask \[1, 3\]"),
        (lambda: implicit_reward(vector, column, beta=0.1), r"logprobs \[2\], ref_logprobs \[2, 1\]"),
    ],
)
def test_other_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=rf"^shapes differ: {message}$"):
        call()


OBJECTIVES = [VanillaPG(), Surrogate(), KLPenalty(), Clip(), CISPO(), DPPO()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("advantages", [column, row, vector[:1]])
def test_advantages_of_another_shape_are_refused(objective, advantages):
    message = rf"advantages {list(advantages.shape)}, mask [2, 3]".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"^shapes differ: .*{message}$"):
        objective(logprobs=x, old_logprobs=x, advantages=advantages, mask=mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plackett_luce(vector), r"scores must be \[B, K\], not \[2\]"),
        (lambda: token_weights(mask[0], **TOTALS), r"mask must be \[B, T\], not \[3\]"),
        (lambda: token_weights(mask[None], **TOTALS), r"mask must be \[B, T\], not \[1, 2, 3\]"),
    ],
)
def test_other_numbers_of_dimensions_are_refused(call, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        call()


def test_shapes_are_checked_without_reading_the_tensors():
    x, mask = torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert masked_mean(x, mask, 1).shape == (2,)
    assert td_errors(x, x, mask, x[:, 0]).shape == n_step_sum(x, mask, 2, 0.5).shape == (2, 3)
    assert discounted_sum(x, mask, x[:, 0]).shape == k3(x, x).shape == (2, 3)
    assert plackett_luce(x, mask).shape == bradley_terry(x[:, 0], x[:, 1], x[:, 2]).shape == (2,)
