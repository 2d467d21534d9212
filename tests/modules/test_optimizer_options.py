"""Optimizers and schedules refuse values with the option's name; a resumed run has the options that it is given."""

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from lit_rlhf.callbacks import IterationCheckpoint
from lit_rlhf.errors import UserError
from lit_rlhf.modules import SFT, Update
from lit_rlhf.modules.optimizer_options import OptimizerOptions
from lit_rlhf.modules.schedules import LinearDecay
from lit_rlhf.planning.models import models_of

ONE_STEP = {"critic": None, "update": Update(epochs=1, minibatches=1)}


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, **options)


def exponential(gamma):
    return lambda optimizer: ExponentialLR(optimizer, gamma)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_changed_options_take_effect(make_module, fit, tmp_path, strategy, request):
    """One step of Adam in each of three iterations; then a fourth with another rate, weight decay and schedule."""
    if strategy != "auto":
        request.getfixturevalue("one_process")
    options = {"strategy": strategy, "devices": 1, "inference_mode": False}

    def run(iterations, path=None, **optimizer):
        module = make_module(iterations=iterations, **ONE_STEP, **optimizer)
        checkpoint = IterationCheckpoint(every_n=100, dirpath=str(tmp_path / f"{iterations}"))
        trainer = fit(module, [checkpoint], ckpt_path=path, **options)
        return trainer.optimizers[0]

    run(3, actor_optimizer=adamw(lr=1e-3, betas=(0.8, 0.9)), actor_scheduler=exponential(0.9))
    changed = {"actor_optimizer": adamw(lr=2e-3, weight_decay=0.25), "actor_scheduler": exponential(0.5)}
    optimizer = run(4, str(tmp_path / "3" / "last.ckpt"), **changed)
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(2e-3 * 0.5**4)
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (2e-3, 0.25, (0.9, 0.999))
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_another_optimizer_is_refused(make_module, fit, tmp_path):
    checkpoint = IterationCheckpoint(dirpath=str(tmp_path))
    fit(make_module(iterations=1, **ONE_STEP), [checkpoint])
    other = make_module(iterations=2, **ONE_STEP, actor_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(UserError, match="optimizer policy is SGD, which cannot continue"):
        fit(other, ckpt_path=str(tmp_path / "last.ckpt"))


def made(scheduler, lr=0.1, steps=0):
    """Return an optimizer, its schedule and its options before any step, after which it takes some steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.5)
    schedule = None if scheduler is None else scheduler(optimizer)
    options = OptimizerOptions(optimizer, schedule)
    for _ in range(steps):
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return optimizer, schedule, options


SCHEDULES = {
    "none": None,
    "exponential": exponential(0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 8),
    "cosine, longer": lambda optimizer: CosineAnnealingLR(optimizer, 12, eta_min=0.01),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=10),
    "one cycle, higher": lambda optimizer: OneCycleLR(optimizer, 0.6, total_steps=10),
    "linear": lambda optimizer: LinearDecay(optimizer, warmup=2),
    "linear, longer warm-up": lambda optimizer: LinearDecay(optimizer, warmup=6),
}


@pytest.mark.parametrize("before", SCHEDULES)
@pytest.mark.parametrize("now", SCHEDULES)
@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_the_learning_rate_is_that_of_the_present_schedule(before, now, lr):
    """After three iterations with one schedule, the rates are those of the other one from its beginning."""
    old, old_schedule, old_options = made(SCHEDULES[before], steps=3)
    new, new_schedule, options = made(SCHEDULES[now], lr)
    whole, whole_schedule, _ = made(SCHEDULES[now], lr, steps=3)
    new.load_state_dict(old.state_dict())
    if old_schedule is not None and new_schedule is not None:
        new_schedule.load_state_dict(old_schedule.state_dict())
    options.use(old_options.state(), "policy", 3)
    for _ in range(3):
        assert new.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
        assert new.param_groups[0]["momentum"] == whole.param_groups[0]["momentum"]
        for optimizer, schedule in ((new, new_schedule), (whole, whole_schedule)):
            optimizer.step()
            if schedule is not None:
                schedule.step()


def test_options_that_stay_keep_what_the_run_has_made_of_them():
    """A callback may have set another learning rate; the options in the configuration are the same as before."""
    old, _, old_options = made(None)
    old.param_groups[0]["lr"] = 0.025
    new, _, options = made(None)
    new.load_state_dict(old.state_dict())
    options.use(old_options.state(), "policy", 3)
    assert new.param_groups[0]["lr"] == 0.025


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters, **({"lr": 0.1} | options))


WRONG_OPTIMIZERS = {
    "Muon": (lambda p: torch.optim.Muon(p, lr=0.01), r"^model\.actor_optimizer: Muon only supports 2D parameters"),
    "LBFGS": (torch.optim.LBFGS, r"^model\.actor_optimizer must not be LBFGS, which computes the loss several times"),
    "SparseAdam": (torch.optim.SparseAdam, r"^model\.actor_optimizer must not be SparseAdam, .* sparse gradients$"),
    "no momentum": (sgd(nesterov=True), r"^model\.actor_optimizer: Nesterov momentum requires a momentum"),
    "negative rate": (sgd(lr=-1), r"^model\.actor_optimizer: Invalid learning rate: -1$"),
}
WRONG_SCHEDULES = {
    "no end": (lambda o: OneCycleLR(o, 1.0), r"^model\.critic_scheduler: You must define either total_steps"),
    "too short": (lambda o: OneCycleLR(o, 1.0, total_steps=1), r"^model\.critic_scheduler: Tried to step 2 times"),
    "no period": (lambda o: CosineAnnealingWarmRestarts(o, T_0=-1), r"^model\.critic_scheduler: .* T_0, but got -1$"),
    "no steps": (lambda o: StepLR(o, step_size=0), r"^model\.critic_scheduler: integer modulo by zero$"),
    "metric": (ReduceLROnPlateau, r"^model\.critic_scheduler must not be ReduceLROnPlateau, which needs a metric"),
}


@pytest.mark.parametrize("name", WRONG_OPTIMIZERS)
def test_the_refusal_of_an_optimizer_names_its_option(make_module, fit, name):
    make, message = WRONG_OPTIMIZERS[name]
    with pytest.raises(UserError, match=message):
        fit(make_module(iterations=1, **ONE_STEP, actor_optimizer=make))


@pytest.mark.parametrize("name", WRONG_SCHEDULES)
def test_the_refusal_of_a_schedule_names_its_option(make_module, fit, name):
    make, message = WRONG_SCHEDULES[name]
    with pytest.raises(UserError, match=message):
        fit(make_module(iterations=2, critic="actor", update=ONE_STEP["update"], critic_scheduler=make))


def test_an_optimizer_that_cannot_be_used_cannot_be_planned(tiny_model):
    module = SFT(actor=str(tiny_model("llama")), optimizer=torch.optim.LBFGS)
    with pytest.raises(UserError, match=r"^model\.optimizer must not be LBFGS"):
        models_of(module)
