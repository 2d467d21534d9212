import pytest
import torch

from lit_rlhf import LinearDecay, UserError
from lit_rlhf.testing import Recorder, assert_exact_resume, tiny_ppo


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def test_the_rate_falls_to_0_at_the_end_of_the_run(make_module, fit):
    recorder = Recorder()
    fit(make_module(iterations=4, actor_optimizer=adam, actor_scheduler=LinearDecay), [recorder])
    assert [metrics["policy/lr"] for metrics in recorder.metrics] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_it_needs_the_length_of_the_run(make_module, fit):
    with pytest.raises(UserError, match=r"^model\.iterations is not set, but LinearDecay"):
        fit(make_module(iterations=None, actor_scheduler=LinearDecay), max_epochs=1)


def test_a_resumed_run_has_the_same_rates():
    assert_exact_resume(lambda: tiny_ppo(actor_scheduler=lambda optimizer: LinearDecay(optimizer, warmup=1)))


def test_a_longer_resumed_run_follows_the_new_line():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = LinearDecay(optimizer)
    schedule.set_iterations(2)
    optimizer.step()
    schedule.step()
    longer = LinearDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    longer.set_iterations(4)
    longer.load_state_dict(schedule.state_dict())
    assert longer.get_lr() == [0.75]


def test_a_negative_warmup_is_refused():
    with pytest.raises(ValueError, match=r"^warmup must be 0 or more, not -1$"):
        LinearDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup=-1)
