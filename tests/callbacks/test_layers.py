from functools import partial

import pytest
import torch

from lit_rlhf import Update
from lit_rlhf.callbacks import ActivationCheckpointing, CompileLayers
from lit_rlhf.callbacks.layers import decoder_layers
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_model
from lit_rlhf.modules import TRPO
from lit_rlhf.testing import Recorder


def run(make_module, fit, *callbacks, **options):
    """Return the metrics and final weights of two iterations."""
    recorder = Recorder()
    module = make_module(iterations=2, **options)
    fit(module, [*callbacks, recorder])
    metrics = [{k: v for k, v in m.items() if not k.startswith(("time", "perf"))} for m in recorder.metrics]
    return metrics, module.state_dict()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(tiny_model, make_module, fit, architecture):
    plain = run(make_module, fit, actor=str(tiny_model(architecture)))
    again = run(make_module, fit, ActivationCheckpointing(), actor=str(tiny_model(architecture)))
    assert again[0] == plain[0]
    assert again[1].keys() == plain[1].keys()
    assert all(torch.equal(again[1][name], weight) for name, weight in plain[1].items())


def test_activation_checkpointing_keeps_less(make_module, fit):
    """Count the elements of the tensors saved for the backward pass in the optimizer steps of one iteration."""
    kept = []
    for callbacks in ([], [ActivationCheckpointing()]):
        elements = [0]

        def pack(x, elements=elements):
            elements[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fit(make_module(iterations=1), callbacks)
        kept.append(elements[0])
    assert 0 < kept[1] < 0.9 * kept[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_layers_give_the_same(make_module, fit, monkeypatch, backend):
    """They are recomputed in the backward pass as well."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    options = {"update": Update(epochs=1, minibatches=2)}
    plain = run(make_module, fit, **options)
    compiled = run(make_module, fit, ActivationCheckpointing(), CompileLayers(), **options)
    for before, after in zip(plain[0], compiled[0], strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4)
    assert compiled[1].keys() == plain[1].keys()
    torch.testing.assert_close(compiled[1], plain[1], atol=1e-4, rtol=1e-3)


@pytest.mark.long
def test_recomputed_layers_are_compiled_too(make_module, monkeypatch):
    """Count the graphs of a pass with gradient, which `checkpoint` would hide from the compiler."""
    tokens = torch.arange(6, 16).view(2, 5)

    def graphs_and_gradients(*callbacks):
        torch.compiler.reset()
        graphs, module = [], make_module(critic=None)
        module.configure_model()

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
            for callback in callbacks:
                callback.on_fit_start(None, module)
            module.actor(tokens, tokens % 5 != 1).logprobs.sum().backward()
        return len(graphs), [parameter.grad for parameter in module.actor.parameters()]

    plain, alone = graphs_and_gradients(), graphs_and_gradients(CompileLayers())
    assert plain[0] == 0 < alone[0]
    for callbacks in ([CompileLayers(), ActivationCheckpointing()], [ActivationCheckpointing(), CompileLayers()]):
        graphs, gradients = graphs_and_gradients(*callbacks)
        assert graphs == alone[0]
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))


def test_trpo_cannot_be_compiled(make_module, fit):
    module = make_module(iterations=1)
    module = TRPO(actor=module.source, rewards=list(module.scores.rewards), sampling=module.sampling, iterations=1)
    with pytest.raises(UserError, match="TRPO differentiates twice"):
        fit(module, [CompileLayers()])


@pytest.mark.parametrize(("architecture", "name"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")])
def test_decoder_layers(tiny_model, architecture, name):
    layers = list(decoder_layers(load_model(str(tiny_model(architecture)))))
    assert [type(layer).__name__ for layer in layers] == [name] * len(layers)
    assert len(layers) > 1


def test_decoder_layers_of_a_sharded_model(tiny_model):
    """FSDP2 replaces the class of each layer by a subclass of it."""
    model = load_model(str(tiny_model()))
    layers = list(decoder_layers(model))
    for layer in layers:
        layer.__class__ = type("FSDP" + type(layer).__name__, (type(layer),), {})
    assert list(decoder_layers(model)) == layers


@pytest.mark.parametrize("callback", [ActivationCheckpointing, CompileLayers])
def test_models_without_known_layers_are_refused(callback):
    with pytest.raises(UserError, match=f"{callback.__name__}: .* decoder layers"):
        callback().on_fit_start(None, torch.nn.Linear(2, 2))
