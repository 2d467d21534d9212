import pytest
import torch

from lit_rlhf.modules.forwards import rounds_float32


def reset():
    """Restore torch's defaults; the older setting changes that of each library."""
    torch.set_float32_matmul_precision("highest")
    for library in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        library.fp32_precision = "none"


@pytest.fixture(autouse=True)
def defaults():
    reset()
    yield
    reset()


def use_older(precision):
    torch.set_float32_matmul_precision(precision)


def use_newer(precision):
    torch.backends.fp32_precision = precision


@pytest.mark.parametrize(
    ("use", "precision", "rounds"),
    [(use_older, "highest", False), (use_older, "high", True), (use_newer, "ieee", False), (use_newer, "tf32", True)],
)
def test_rounding_is_known_however_it_was_set(use, precision, rounds):
    use(precision)
    assert rounds_float32(torch.device("cuda")) == rounds
    assert not rounds_float32(torch.device("cpu"))


def test_nothing_is_rounded_by_default():
    assert not rounds_float32(torch.device("cuda"))
