import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.models.precision import check_precision


@pytest.mark.parametrize("precision", ["32-true", "32", 32, "bf16-mixed", "bf16"])
def test_supported_precisions(precision):
    check_precision(precision)


@pytest.mark.parametrize(
    "precision", ["bf16-true", "16-true", "16-mixed", "64-true", "transformer-engine", "transformer-engine-float16", 16]
)
def test_other_precisions_are_refused(precision):
    with pytest.raises(UserError, match=rf"^trainer.precision must be 32-true or bf16-mixed, not '{precision}'$"):
        check_precision(precision)
