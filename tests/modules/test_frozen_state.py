import pytest
import torch
from torch import nn

from lit_rlhf.modules.module import keep_out_of_checkpoints


class Roles(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = nn.Linear(2, 2)
        self.reference = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.reference_scale = nn.Parameter(torch.rand(1))  # starts with the name of a frozen model
        self.scores = nn.ModuleDict({"rewards": nn.ModuleList([nn.Linear(2, 1)]), "norm": nn.BatchNorm1d(1)})
        keep_out_of_checkpoints(self, ("reference.", "scores.rewards."))


KEPT = {
    "actor.weight",
    "actor.bias",
    "reference_scale",
    *(f"scores.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
}


def test_frozen_models_are_left_out():
    assert set(Roles().state_dict()) == KEPT


def test_frozen_models_of_a_submodule_are_left_out():
    assert set(nn.ModuleDict({"module": Roles()}).state_dict()) == {f"module.{name}" for name in KEPT}


def test_loading_does_not_require_them():
    saved, fresh = Roles(), Roles()
    frozen = {name: p.clone() for name, p in fresh.named_parameters() if name not in KEPT}
    fresh.load_state_dict(saved.state_dict(), strict=True)
    torch.testing.assert_close(fresh.state_dict(), saved.state_dict())
    for name, before in frozen.items():
        assert torch.equal(fresh.get_parameter(name), before)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_everything_else_is_still_checked(change):
    state = Roles().state_dict()
    if change == "missing":
        del state["actor.bias"]
    else:
        state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"actor\.bias|extra"):
        Roles().load_state_dict(state)
