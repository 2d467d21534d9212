import pytest

from lit_rlhf.callbacks import ActivationCheckpointing, PrintPlan
from lit_rlhf.errors import UserError
from lit_rlhf.planning.hardware import Device
from lit_rlhf.planning.plan import RESERVED
from lit_rlhf.testing import Recorder

SMALL_GPU = Device("a small GPU", RESERVED + 1.0e6, None, None, None)


class OnGPU(PrintPlan):
    """Plans for a GPU with a megabyte, which is not enough for an update of the tiny models."""

    def device(self, trainer):
        return SMALL_GPU


def recomputed(module):
    """Return whether each trained layer, and each frozen one, recomputes its activations."""
    trained = [*module.actor.model.model.layers, *module.critic.trunk.layers]
    frozen = list(module.reference.model.model.layers)
    return [{"forward" in vars(layer) for layer in layers} for layers in (trained, frozen)]


def run(make_module, fit, *callbacks):
    module, recorder = make_module(iterations=2), Recorder()
    fit(module, [*callbacks, recorder], inference_mode=False)
    return module, [{k: v for k, v in m.items() if not k.startswith(("time", "perf"))} for m in recorder.metrics]


def test_the_plan_in_two_lines(make_module, fit, capsys):
    module, _ = run(make_module, fit, PrintPlan())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert len(lines) == 2
    assert lines[0].startswith("plan: actor 18 k, critic 16.8 k, reference 18 k parameters on 1 x cpu of ")
    assert "an iteration of at most " in lines[0]
    assert lines[1].startswith("plan: It fits: ")
    assert recomputed(module) == [{False}, {False}]  # never on a CPU


def test_layers_recompute_where_the_plan_says_so(make_module, fit, capsys):
    _, expected = run(make_module, fit)
    module, metrics = run(make_module, fit, OnGPU())
    assert recomputed(module) == [{True}, {False}]
    assert "with ActivationCheckpointing, which fit turns on" in capsys.readouterr().out
    assert metrics == expected


def test_a_user_can_say_no(make_module, fit, capsys):
    module, _ = run(make_module, fit, OnGPU(checkpointing=False))
    assert recomputed(module) == [{False}, {False}]
    assert "plan: It does not fit: " in capsys.readouterr().out


def test_a_user_has_turned_it_on(make_module, fit, capsys):
    module, _ = run(make_module, fit, ActivationCheckpointing(), OnGPU())
    layer = module.actor.model.model.layers[0]
    inner = getattr(layer.forward, "forward", layer.forward)
    assert "which fit turns on" not in capsys.readouterr().out
    assert getattr(inner, "__func__", None) is type(layer).forward  # once, not twice


@pytest.mark.parametrize(
    ("error", "reason"), [(UserError("no device"), "no device"), (KeyError("layers"), "KeyError: 'layers'")]
)
def test_what_cannot_be_planned_is_trained(make_module, fit, capsys, error, reason):
    class Refusing(PrintPlan):
        def device(self, trainer):
            raise error

    run(make_module, fit, Refusing())
    assert f"plan: none ({reason})" in capsys.readouterr().out
