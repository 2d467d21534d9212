import pytest

from lit_rlhf.modules import Update

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("epochs", "minibatches", "max_tokens") for value in (0, NAN)]
    + [(field, value) for field in ("value_clip", "clip_grad_norm", "target_kl") for value in (0.0, -1.0, NAN)]
    + [(field, value) for field in ("value_coef", "entropy_coef") for value in (NAN, INFINITY)]
    + [("critic_warmup", -1)]
    + [("aggregation", "tokens"), ("aggregation", None)],
)
def test_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"^update\.{field} must be .*, not {value!r}$"):
        Update(**{field: value})


def test_values_that_switch_something_off():
    Update(value_clip=None, clip_grad_norm=None, target_kl=None, value_coef=0.0, entropy_coef=0.0)
