import pytest
import torch

from lit_rlhf.callbacks import IterationCheckpoint
from lit_rlhf.testing import Recorder


@pytest.mark.parametrize("at", [3, *(pytest.param(at, marks=pytest.mark.long) for at in (4, 6)), 8])
def test_a_checkpoint_after_a_validation_resumes_with_the_next_batch(make_module, fit, tmp_path, at):
    """With 48 prompts in batches of 12, iterations 3 and 6 are saved after a validation, and 4 and 8 end epochs."""
    options = {"batch_size": 12, "validation": True, "val_check_interval": 3, "check_val_every_n_epoch": None}
    whole = Recorder()
    fit(make_module(iterations=9), [IterationCheckpoint(keep_every_n=at), whole], **options)
    resumed = Recorder()
    checkpoint = str(tmp_path / "checkpoints" / f"iteration-{at:06d}.ckpt")
    fit(make_module(iterations=9), [resumed], ckpt_path=checkpoint, **options)
    prompts = [[o["scored_rollout"].reward_inputs.prompts for o in r.outputs] for r in (whole, resumed)]
    assert prompts[0][at:] == prompts[1]
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


def test_a_run_resumed_from_an_epochs_end_is_resumed_again(make_module, fit, tmp_path):
    """Lightning counts one epoch fewer in such a run; the order of the prompts must not depend on its count."""
    options = {"batch_size": 12, "validation": True, "val_check_interval": 3, "check_val_every_n_epoch": None}
    whole, resumed = Recorder(), Recorder()
    fit(make_module(iterations=9), [IterationCheckpoint(keep_every_n=2), whole], **options)
    first = str(tmp_path / "checkpoints" / "iteration-000004.ckpt")
    again = IterationCheckpoint(keep_every_n=2, dirpath=str(tmp_path / "again"))
    fit(make_module(iterations=9), [again], ckpt_path=first, **options)
    fit(make_module(iterations=9), [resumed], ckpt_path=str(tmp_path / "again" / "iteration-000006.ckpt"), **options)
    assert len(resumed.outputs) == 3
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
