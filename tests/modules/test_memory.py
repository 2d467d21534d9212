"""What is in memory in an update and between updates, and what happens when the memory does not suffice."""

import inspect
import weakref

import lightning
import pytest
import torch

from lit_rlhf.data import Demonstrations
from lit_rlhf.errors import UserError
from lit_rlhf.generation import NativeEngine, Sampling
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.modules import SFT, TRPO, RewardModeling, Update
from lit_rlhf.testing import Recorder

RECORDS = [{"prompt": f"w{i}", "chosen": " w1 w2" * (1 + i % 3), "rejected": f" w{9 + i}"} for i in range(8)]


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


# ----------------------------------------------------------------- activations


class Saved:
    """Counts the bytes of tensors, besides weights, that are saved for backward passes."""

    def __init__(self, module):
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, x):
        held = Held(x)
        if x.untyped_storage().data_ptr() not in self.weights:
            self.count(x.nbytes)
            weakref.finalize(held, self.count, -x.nbytes)
        return held

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


class Held:
    """A tensor that is saved for a backward pass."""

    def __init__(self, x):
        self.x = x


def test_the_activations_of_actor_and_critic_are_not_in_memory_together(make_module, fit):
    peaks = []
    for critic in (None, "actor"):
        module = make_module(iterations=1, critic=critic, update=Update(epochs=1, minibatches=1))
        module.configure_model()
        with Saved(module) as saved:
            fit(module)
        assert saved.now == 0
        peaks.append(saved.peak)
    assert 0 < peaks[1] < 1.1 * peaks[0]


# ------------------------------------------------------------------- gradients


def gradient_bytes(module):
    return sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


class Watch(lightning.Callback):
    """Records the bytes of the gradients at the start of each validation and after each iteration."""

    def __init__(self):
        self.bytes = []

    def on_validation_start(self, trainer, pl_module):
        self.bytes.append(gradient_bytes(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.bytes.append(gradient_bytes(pl_module))


@pytest.fixture
def make_trpo(make_module):
    """Return a function that makes a TRPO with the model and the reward of `make_module`."""

    def make(**options):
        made = make_module()
        common = {"actor": made.source, "rewards": list(made.scores.rewards), "sampling": made.sampling}
        return TRPO(**common, critic_optimizer=adam, iterations=2, **options)

    return make


@pytest.mark.parametrize("options", [{}, {"critic": "shared"}, {"update": Update(target_kl=1e-7)}, None], ids=str)
def test_there_are_no_gradients_while_decoding_and_judging(make_module, make_trpo, fit, options):
    found = []

    class Watching(NativeEngine):
        def generate(self, *args, **others):
            found.append(gradient_bytes(module))
            return super().generate(*args, **others)

    engine = Watching()
    if options is None:
        module = make_trpo(engine=engine)
    else:
        module = make_module(engine=engine, actor_optimizer=adam, iterations=2, **options)
    fit(module)
    assert found == [0, 0]
    assert gradient_bytes(module) == 0


def test_preference_modules_and_sft_drop_their_gradients(fit_preferences, make_trainer, tiny_model, tmp_path):
    watch = Watch()
    fit_preferences(RewardModeling(reward=str(tiny_model("llama"))), RECORDS, RECORDS, [watch])
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    data = Demonstrations(train=str(tmp_path / "texts.jsonl"), validation=str(tmp_path / "texts.jsonl"), batch_size=8)
    make_trainer([watch]).fit(SFT(str(tiny_model("llama"))), datamodule=data)
    assert watch.bytes == [0] * 4


def test_ddp_holds_one_copy_of_the_gradients(one_process, make_module, fit):
    """The gradients are parts of DDP's buffers, which hold many of them; they are 0 between the updates."""
    found = []

    class Buffers(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            gradients = [p.grad for p in pl_module.parameters() if p.requires_grad]
            assert all((gradient == 0).all() for gradient in gradients)
            found.append((len(gradients), len({g.untyped_storage().data_ptr() for g in gradients})))

    recorders = [Recorder(), Recorder()]
    fit(make_module(iterations=2), [recorders[0]])
    fit(make_module(iterations=2), [recorders[1], Buffers()], strategy="ddp", devices=1)
    assert len(found) == 2
    assert all(buffers <= 2 < parameters for parameters, buffers in found)
    for name, weight in recorders[0].weights.items():
        assert torch.equal(recorders[1].weights[name], weight), name


# --------------------------------------------------------------- out of memory


@pytest.fixture
def limit(monkeypatch):
    """Return a function that lets forwards of a class with gradient run out of memory above so many tokens, without
    padding (token 0), each shared beginning counted once."""

    def limit(model, most):
        forward = model.forward
        names = inspect.signature(forward)

        def limited(*args, **others):
            given = names.bind(*args, **others).arguments
            computed = int((given["tokens"] != 0).sum()) - int(given.get("shared", torch.zeros(1)).sum())
            if torch.is_grad_enabled() and computed > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(*args, **others)

        monkeypatch.setattr(model, "forward", limited)

    return limit


def results(recorder):
    timed = ("time/", "perf/")
    metrics = [{k: v for k, v in m.items() if not k.startswith(timed)} for m in recorder.metrics]
    return metrics, {name: weight.tolist() for name, weight in recorder.weights.items()}


def halved_before_the_update(module, max_tokens):
    """Let a module judge its first rollout with the configured number of tokens, as a run that halves it does."""
    learn = module.learn

    def halved(experience, metrics):
        module.max_tokens = max_tokens
        learn(experience, metrics)

    module.learn = halved
    return module


@pytest.mark.parametrize("exhausted", [Actor, ScalarModel], ids=["actor", "critic"])
def test_an_update_out_of_memory_continues_with_smaller_micro_batches(make_module, fit, limit, capsys, exhausted):
    """If the critic runs out of memory, the actor's gradients and metrics of the same rows are there already."""

    def make(max_tokens):
        return make_module(iterations=2, update=Update(epochs=2, minibatches=2, max_tokens=max_tokens))

    recorders = [Recorder(), Recorder()]
    fit(halved_before_the_update(make(128), 32), [recorders[0]])
    limit(exhausted, 32)
    module = make(128)
    module.configure_model()
    with Saved(module) as saved:
        fit(module, [recorders[1]])
    assert module.max_tokens == 32
    assert saved.now == 0
    assert results(recorders[1]) == results(recorders[0])
    assert [line for line in capsys.readouterr().out.splitlines() if "max_tokens" in line] == [
        f"model.update.max_tokens: the update ran out of memory; it continues with {tokens}" for tokens in (64, 32)
    ]


def test_nothing_of_a_failed_attempt_is_in_memory_when_it_is_repeated(make_module, fit, limit, monkeypatch, capsys):
    left = []
    module = make_module(iterations=1, update=Update(epochs=1, minibatches=1, max_tokens=128))
    module.configure_model()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append((saved.now, gradient_bytes(module))))
    limit(ScalarModel, 64)
    with Saved(module) as saved:
        fit(module)
    assert left[0] == (0, 0)  # Lightning empties the cache, too, at the end
    assert "continues with 64" in capsys.readouterr().out


def test_trpo_out_of_memory_starts_again_from_the_old_policy(make_trpo, fit, monkeypatch, capsys):
    """The memory runs out after the line search, so that the actor has moved already."""
    recorders, update = [Recorder(), Recorder()], Update(epochs=1, minibatches=2, max_tokens=128)
    fit(halved_before_the_update(make_trpo(update=update), 64), [recorders[0]])
    measure, calls = TRPO._measure_policy, []

    def measured(self, batches, metrics):
        measure(self, batches, metrics)
        calls.append(len(batches))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TRPO, "_measure_policy", measured)
    fit(make_trpo(update=update), [recorders[1]])
    assert calls[0] < calls[1]
    assert results(recorders[1]) == results(recorders[0])
    assert "model.update.max_tokens: the update ran out of memory; it continues with 64" in capsys.readouterr().out


def test_a_reward_model_out_of_memory(fit_preferences, tiny_model, limit):
    recorders = [Recorder(), Recorder()]
    for max_tokens, recorder in zip((32, 64), recorders, strict=True):
        module = RewardModeling(reward=str(tiny_model("llama")), max_tokens=max_tokens, optimizer=adam)
        fit_preferences(module, RECORDS, None, [recorder], max_epochs=2)
        limit(ScalarModel, 32)
    assert module.max_tokens == 32
    assert results(recorders[1]) == results(recorders[0])


def test_sft_out_of_memory(make_trainer, tiny_model, tmp_path, limit):
    recorders = [Recorder(), Recorder()]
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "w1 w2{" w3" * (i % 5)}"}}\n' for i in range(8)))
    for max_tokens, recorder in zip((16, 64), recorders, strict=True):
        module = SFT(str(tiny_model("llama")), max_tokens=max_tokens, optimizer=adam)
        make_trainer([recorder], max_epochs=2).fit(
            module, datamodule=Demonstrations(train=str(tmp_path / "texts.jsonl"), batch_size=8)
        )
        limit(Actor, 16)
    assert module.max_tokens == 16
    assert results(recorders[1]) == results(recorders[0])


def test_a_row_that_does_not_fit_ends_the_run(make_module, fit, limit):
    limit(Actor, 1)
    module = make_module(sampling=Sampling(max_tokens=4))
    with pytest.raises(UserError, match=r"^model.update.max_tokens is \d: .* the longest row alone has \d+ tokens"):
        fit(module)


def test_under_ddp_the_error_says_what_to_set(one_process, make_module, fit, limit):
    limit(Actor, 32)
    with pytest.raises(UserError, match=r"^model.update.max_tokens is 64: the update ran out of memory; set it to 32$"):
        fit(make_module(), strategy="ddp", devices=1)


# ----------------------------------------------------------- waits for the GPU


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which the host would wait for the GPU, except inside `paused`."""

    def __init__(self):
        super().__init__()
        self.found, self.paused = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        indices = args[1] if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waits = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        if not self.paused and (by_mask or function in waits):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def pausing(reads, function):
    def paused(*args, **others):
        reads.paused += 1
        try:
            return function(*args, **others)
        finally:
            reads.paused -= 1

    return paused


@pytest.mark.parametrize("options", [{}, {"critic": "shared"}, {"critic": None}], ids=str)
@pytest.mark.parametrize("max_tokens", [20, 10_000])
def test_the_host_waits_once_a_step(make_module, fit, monkeypatch, max_tokens, options):
    """The waits of the models, forward and backward, and of the cutting into micro-batches are not counted."""
    reads = HostReads()
    update = Update(epochs=2, minibatches=2, max_tokens=max_tokens, entropy_coef=0.1)
    sgd = {f"{name}_optimizer": lambda p: torch.optim.SGD(p, lr=0.1) for name in ("actor", "critic")}
    module = make_module(iterations=1, update=update, **sgd, **options)
    monkeypatch.setattr(Actor, "forward", pausing(reads, Actor.forward))
    monkeypatch.setattr(ScalarModel, "forward", pausing(reads, ScalarModel.forward))
    learn = module.learn

    def counted(experience, metrics):
        minibatches = list(module.minibatches(experience))
        module.minibatches = lambda _: minibatches
        for name in ("micro_batches", "manual_backward"):
            setattr(module, name, pausing(reads, getattr(module, name)))
        with reads:
            learn(experience, metrics)

    module.learn = counted
    fit(module)
    assert reads.found == ["aten._local_scalar_dense.default"] * 4
