"""Generation ahead of training: which weights draw what, the same bits each time, and processes that end."""

import functools
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe

import lightning
import preloaded
import pytest
import torch

from lit_rlhf.callbacks import IterationCheckpoint
from lit_rlhf.data import Prompts
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Ahead, Engine, NativeEngine, Sampling
from lit_rlhf.generation.engine import EngineContext
from lit_rlhf.generation.shared import Layout, map_tensors, open_shared_memory, trained_weights
from lit_rlhf.generation.worker import Assignment, receive, send, serve
from lit_rlhf.generation.workers import concatenate
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.weights import UnreadWeights
from lit_rlhf.modules.roles import load_actor
from lit_rlhf.randomness import Stream
from lit_rlhf.testing import Recorder


class Weights(lightning.Callback):
    """Keeps the actor's weights and the prompts at the beginning of each iteration."""

    def __init__(self):
        self.weights, self.prompts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({name: x.clone() for name, x in pl_module.actor.state_dict().items()})
        self.prompts.append(batch)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


@pytest.fixture(autouse=True)
def workers(request, monkeypatch):
    """Fork the worker processes, except for one test that starts one as users do."""
    if request.function is not test_validation_has_no_lag_and_the_engine_is_started_in_each_worker:
        preloaded.fork_workers(monkeypatch.setattr)


@pytest.fixture
def run(make_module, fit):
    """Return a function that trains with an engine, and returns the module and what was recorded."""

    def run(engine, iterations=4, callbacks=(), **options):
        recorder, weights = Recorder(), Weights()
        module = make_module(engine=engine, iterations=iterations, **options)
        fit(module, [recorder, weights, *callbacks])
        return module, recorder, weights

    return run


def rollouts(recorder):
    return [outputs["scored_rollout"].rollout for outputs in recorder.outputs]


def assert_same_weights(one, other):
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def test_without_lag_nothing_changes(run):
    _, plain, _ = run(NativeEngine())
    _, ahead, _ = run(Ahead(lag=0))
    assert_same_weights(plain, ahead)


def test_the_lag_is_fixed(run, tiny_model):
    """Iteration i learns from what the policy at the beginning of iteration i − lag drew; two workers or none."""
    module, recorder, weights = run(Ahead(lag=2, workers=0), iterations=5)
    actor = Actor(load_model(str(tiny_model("llama"))))
    for i, rollout in enumerate(rollouts(recorder)):
        actor.load_state_dict(weights.weights[max(0, i - 2)])
        options = module.sampling, module.special_tokens
        expected = NativeEngine().generate(actor, weights.prompts[i], *options, stream=Stream.ROLLOUT, iteration=i)
        assert torch.equal(rollout.tokens, expected.tokens)
        torch.testing.assert_close(rollout.rollout_logprobs, expected.rollout_logprobs, rtol=0, atol=1e-6)
        assert torch.equal(rollout.group, expected.group)
        scored = recorder.outputs[i]["scored_rollout"]
        actor.load_state_dict(weights.weights[i])
        mask = rollout.response_mask
        logprobs = rollout.at_responses(actor(rollout.tokens, rollout.response_tokens_mask).logprobs)
        torch.testing.assert_close(scored.old_logprobs[mask], logprobs[mask].detach(), rtol=0, atol=1e-5)
        assert recorder.metrics[i]["engine/mismatch_max"] < 1e-5
    _, other, _ = run(Ahead(lag=2, workers=2), iterations=5)
    assert other.metrics[-1]["time/wait_for_rollouts"] >= 0
    assert other.metrics[-1]["time/wait_for_learner"] >= 0
    assert max(metrics["engine/mismatch_max"] for metrics in other.metrics) < 1e-5
    for one, two in zip(rollouts(recorder), rollouts(other), strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.response_mask, two.response_mask)
    for name, weight in recorder.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=0, atol=1e-6)


def test_resumed_with_rollouts_in_flight(make_module, fit, tmp_path):
    """The checkpoint of iteration 2 holds the responses for iterations 2 and 3; one worker or none, the same bits."""

    def train(iterations, folder, ckpt_path=None, workers=1):
        recorder = Recorder()
        checkpoint = IterationCheckpoint(every_n=2, dirpath=str(tmp_path / folder))
        module = make_module(engine=Ahead(lag=2, workers=workers), iterations=6)
        fit(module, [recorder, checkpoint], ckpt_path=ckpt_path, max_steps=iterations * 8)
        return recorder

    whole = train(6, "whole", workers=0)
    train(2, "stopped")
    path = tmp_path / "stopped" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert sorted(state["rollouts"]) == [2, 3]
    resumed = train(6, "resumed", str(path))
    assert len(resumed.metrics) == 4
    assert_same_weights(whole, resumed)
    for one, two in zip(whole.metrics[2:], resumed.metrics, strict=True):
        same = [name for name in one if not name.startswith(("time/", "perf/"))]
        assert {name: one[name] for name in same} == {name: two[name] for name in same}


class Kill(lightning.Callback):
    """Kills the worker process at the beginning of the third iteration."""

    def __init__(self):
        self.pid = self.time = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            (worker,) = pl_module.engine._detached.processes
            self.pid, self.time = worker._process.pid, time.monotonic()
            os.kill(self.pid, signal.SIGKILL)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_worker_ends_the_run_in_one_line(run):
    kill = Kill()
    with pytest.raises(UserError, match=r"worker process 0 .* has ended \(killed by signal SIGKILL\)") as error:
        run(Ahead(lag=1), callbacks=[kill])
    assert time.monotonic() - kill.time < 10
    assert "\n" not in str(error.value)
    assert not is_running(kill.pid)


class Refusing(Engine):
    """An engine that fails in the worker process."""

    def generate(self, actor, prompts, sampling, special_tokens, *, stream, iteration):
        raise RuntimeError("no\nresponses")


def test_an_error_in_a_worker_is_reported(run):
    with pytest.raises(UserError, match="could not generate responses: RuntimeError: no responses"):
        run(Ahead(Refusing(), lag=1))


class NeedsStart(NativeEngine):
    """An engine that can be used only where it was started, and that cannot be pickled then."""

    def start(self, context):
        object.__setattr__(self, "lock", threading.Lock())

    def generate(self, *arguments, **options):
        with self.lock:
            return super().generate(*arguments, **options)


def test_rollouts_of_a_checkpoint_answer_the_run_s_prompts(make_module, make_trainer, prompt_file, tmp_path):
    """Other prompts of the same lengths are noticed."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(prompt_file.read_text().replace("w1", "w2").splitlines(keepends=True))))
    checkpoint = IterationCheckpoint(every_n=1, dirpath=str(tmp_path))
    options = {"engine": Ahead(lag=1, workers=0), "sampling": Sampling(max_tokens=4)}
    lengths = {"first_tokens": 2, "batch_size": 8}
    trainer = make_trainer([checkpoint], max_steps=8)
    trainer.fit(make_module(iterations=4, **options), datamodule=Prompts(train=str(prompt_file), **lengths))
    with pytest.raises(UserError, match="the rollouts of the checkpoint answer other prompts than this run's"):
        make_trainer().fit(
            make_module(iterations=4, **options),
            datamodule=Prompts(train=str(other), **lengths),
            ckpt_path=str(tmp_path / "last.ckpt"),
        )


class Interrupt(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise UserError("stop")


def test_a_module_forgets_the_rollouts_of_an_interrupted_run(make_module, fit):
    module = make_module(engine=Ahead(lag=2, workers=0), iterations=4)
    with pytest.raises(UserError, match="stop"):
        fit(module, [Interrupt(), IterationCheckpoint(every_n=1)])
    assert module.rollouts.landed
    recorder, weights = Recorder(), Weights()
    fit(module, [recorder, weights])
    for rollout, prompts in zip(rollouts(recorder), weights.prompts, strict=True):
        width = int(rollout.prompt_lengths[0])
        assert torch.equal(rollout.tokens[0, :width], prompts.tokens[0][prompts.mask[0]])


@pytest.mark.long
def test_saving_does_not_change_the_samples_in_half_precision(make_module, fit, tmp_path):
    """Checkpoints are saved outside of autocast, but the rollouts for which they wait belong inside."""
    runs = []
    for every_n, workers in ((100, 0), (1, 0), (1, 1)):
        recorder = Recorder()
        module = make_module(engine=Ahead(lag=1, workers=workers), iterations=4, actor_optimizer=adam)
        checkpoint = IterationCheckpoint(every_n=every_n, dirpath=str(tmp_path / f"{every_n}-{workers}"))
        fit(module, [recorder, checkpoint], precision="bf16-mixed")
        runs.append(recorder)
    for one, *others in zip(*map(rollouts, runs), strict=True):
        assert all(torch.equal(one.tokens, other.tokens) for other in others)
    mismatches = [[metrics["engine/mismatch_mean"] for metrics in run.metrics] for run in runs]
    assert mismatches[0] == mismatches[1] == mismatches[2]
    assert mismatches[0][-1] > 1e-4  # in bfloat16


class Signalled(lightning.Callback):
    """Sends to the first worker what SLURM sends to every process of a job, after the first iteration."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            (worker,) = pl_module.engine._detached.processes
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                os.kill(worker._process.pid, number)


def test_signals_that_ask_the_parent_for_a_checkpoint_do_not_end_a_worker(run):
    _, recorder, _ = run(Ahead(lag=1), callbacks=[Signalled()])
    assert len(recorder.metrics) == 4


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_worker_never_holds_more_than_it_keeps(tiny_model, tiny_tokenizer, monkeypatch, lora):
    """The weights are read in the type in which they stay, instead of in float32 first."""
    unread, read = [], UnreadWeights.read

    def watched(self, model, device):
        unread.extend((parameter.is_meta, parameter.dtype) for parameter in model.parameters() if parameter.dim() == 2)
        read(self, model, device)

    monkeypatch.setattr(UnreadWeights, "read", watched)
    folder = str(tiny_model("llama"))
    context = EngineContext(
        load_actor=functools.partial(load_actor, folder, 1.0, lora),
        tokenizer=tiny_tokenizer,
        device=torch.device("cpu"),
        device_ids=(0,),
        process=0,
        precision="bf16-mixed",
    )
    settings = {"threads": 1, "float32_precision": "none", "deterministic": False, "warns_only": False}
    parent, worker = Pipe()
    send(parent, Assignment(engine=NativeEngine(), context=context, **settings))

    def serve_until_closed():
        with suppress(EOFError):
            serve(worker)

    serving = threading.Thread(target=serve_until_closed)
    serving.start()
    assert len(receive(parent).names) > 0
    parent.close()
    serving.join()
    base = [dtype for is_meta, dtype in unread if is_meta]
    assert len(base) == len(unread) - (0 if lora is None else 2 * 2 * 7)  # the adapter has its weights already
    assert base.count(torch.bfloat16) >= 2 * 7  # the linear layers


@pytest.mark.parametrize(("used", "expected"), [((0, 1), ["cuda:2", "cuda:3"]), ((2, 3), ["cuda:0", "cuda:1"])])
def test_workers_use_the_gpus_that_the_training_does_not_use(monkeypatch, used, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def device(process, **options):
        context = EngineContext(
            load_actor=None,
            tokenizer=None,
            device=torch.device("cuda", used[process]),
            device_ids=used,
            process=process,
            precision="32-true",
        )
        return [str(device) for device in Ahead(**options)._devices(context)]

    assert device(0) + device(1) == expected
    assert device(1, devices=["cuda:5", "cuda:6"]) == ["cuda:6"]
    with pytest.raises(UserError, match="4 worker processes need 4 devices besides those of the training, not 2"):
        device(1, workers=2)


def test_validation_has_no_lag_and_the_engine_is_started_in_each_worker(make_module, fit):
    recorder = Recorder()
    module = make_module(engine=Ahead(NeedsStart(), lag=1), iterations=2)
    fit(module, [recorder], validation=True, val_check_interval=1)
    assert len(recorder.metrics) == 2
    assert recorder.metrics[-1]["val/win_rate"] >= 0
    assert module.engine._detached is None  # the worker has ended
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("option", "value"), [("lag", -1), ("workers", -1), ("threads", 0)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"engine.{option} must be"):
        Ahead(**{option: value})


def test_not_around_itself():
    with pytest.raises(ValueError, match=r"engine.engine must be an engine that generates, not Ahead itself"):
        Ahead(Ahead())


def test_other_loaders_are_refused(make_module, make_trainer, prompt_file):
    module = make_module(engine=Ahead(lag=1), iterations=2)

    class Others:
        def __iter__(self):
            data = Prompts(train=str(prompt_file), batch_size=8)
            data.trainer = module.trainer
            data.setup("fit")
            return iter(data.train_dataloader())

    with pytest.raises(UserError, match="Ahead takes its prompts from the data module Prompts, not from Others"):
        make_trainer().fit(module, train_dataloaders=Others())


def test_shared_memory_keeps_types_and_values():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.0)}
    memory, layout = open_shared_memory(), Layout.of(tensors)
    for name, copy in map_tensors(memory, layout).items():
        copy.copy_(tensors[name])
    for name, seen in map_tensors(memory, layout).items():
        assert torch.equal(seen, tensors[name])
        assert seen.dtype == tensors[name].dtype
    os.close(memory)


def test_concatenate_pads(run):
    _, recorder, _ = run(NativeEngine(), iterations=2, sampling=Sampling(max_tokens=12, responses=2))
    first, second = rollouts(recorder)
    joined = concatenate([first, second], padding=0)
    rows = len(first.tokens)
    for part, original in ((slice(0, rows), first), (slice(rows, None), second)):
        again = joined.select(torch.arange(len(joined.tokens))[part])
        for name in ("tokens", "rollout_logprobs", "response_mask", "terminated", "group"):
            assert torch.equal(getattr(again, name), getattr(original, name)), name


def test_the_weights_of_an_adapter_alone_travel(tiny_model):
    """Workers load the base from its files; see tests/modules/adapter_cases.py for their samples."""
    actor = load_actor(str(tiny_model("llama")), 1.0, LoRA(rank=2))
    weights = trained_weights(actor)
    assert len(weights) == 2 * 2 * 7
    assert all(name.split(".")[-3:-1] in (["lora_A", "actor"], ["lora_B", "actor"]) for name in weights)
