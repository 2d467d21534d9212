"""The hooks of callbacks get the typed data of each stage, in order; those on several processes are in test_ranks."""

import lightning
import pytest
import torch

from lit_rlhf import Experience, OnPolicyCallback, Rollout, ScoredRollout, Trajectory


class Calls(OnPolicyCallback):
    """Keeps the names of the hooks that were called, in order, and their data."""

    def __init__(self):
        self.names, self.data = [], []

    def keep(self, name, *data):
        self.names.append(name)
        self.data.append(data)

    def on_rollout_end(self, trainer, pl_module, *data):
        self.keep("on_rollout_end", *data)

    def on_rewards(self, trainer, pl_module, *data):
        self.keep("on_rewards", *data)

    def on_advantages(self, trainer, pl_module, *data):
        self.keep("on_advantages", *data)
        self.before = pl_module.actor.model.model.norm.weight.detach().clone()

    def on_update_end(self, trainer, pl_module, *data):
        self.keep("on_update_end", *data)
        assert not torch.equal(self.before, pl_module.actor.model.model.norm.weight)

    def on_train_batch_end(self, trainer, pl_module, *data):
        self.names.append("on_train_batch_end")


HOOKS = ["on_rollout_end", "on_rewards", "on_advantages", "on_update_end", "on_train_batch_end"]


def test_hooks_get_the_typed_data_of_each_stage_in_order(fit, make_module):
    calls = Calls()
    fit(make_module(iterations=2), [calls])
    assert calls.names == HOOKS * 2
    (rollout,), (scored, trajectory), (experience,), (metrics,) = calls.data[:4]
    assert isinstance(rollout, Rollout)
    assert isinstance(scored, ScoredRollout)
    assert scored.rollout is rollout
    assert isinstance(trajectory, Trajectory)
    assert trajectory.values is scored.values
    assert isinstance(experience, Experience)
    assert experience.rollout is rollout
    assert experience.advantages.shape == rollout.response_mask.shape
    assert metrics["progress/iteration"] == 1
    assert metrics["objective/score"] == pytest.approx(float(scored.scores.mean()))


class OnlyOne(lightning.Callback):
    """A callback of Lightning that has one of the hooks."""

    lengths = 0

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.lengths += int(rollout.response_lengths.sum())


def test_any_callback_of_lightning_can_have_a_hook(fit, make_module):
    one = OnlyOne()
    fit(make_module(iterations=1), [one])
    assert one.lengths > 8
