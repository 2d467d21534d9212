"""Generation by a vLLM server: against a small server with vLLM's routes, and against vLLM itself if there is one.

LIT_RLHF_VLLM_PYTHON=vllm-env/bin/python .venv/bin/pytest tests/generation/test_vllm.py
"""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import lightning
import preloaded
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.generation import Ahead, Sampling, VLLMEngine
from lit_rlhf.generation.engine import EngineContext, find_special_tokens
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapter_folders import write_adapter
from lit_rlhf.models.adapters import LoRA, adapter_parameters
from lit_rlhf.models.loading import RandomWeights, load_model, load_tokenizer
from lit_rlhf.modules import DPO
from lit_rlhf.randomness import Stream
from lit_rlhf.testing import Recorder
from lit_rlhf.types import PromptBatch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from vllm_on_ranks import main as generate_on_ranks  # noqa: E402
from vllm_server import DROP, serving  # noqa: E402

VLLM = os.environ.get("LIT_RLHF_VLLM_PYTHON")
CPU = torch.device("cpu")


def context(folder, precision="32-true"):
    return EngineContext(
        load_actor=lambda: Actor(load_model(str(folder))),
        tokenizer=load_tokenizer(str(folder)),
        device=CPU,
        device_ids=(0,),
        process=0,
        precision=precision,
    )


@pytest.fixture
def started(tiny_model, tmp_path):
    """Return a function that starts an engine for a tiny model, with its weights in a folder of the test."""
    engines = []

    def start(url, architecture="llama", precision="32-true", **options):
        engine = VLLMEngine(url=url, weights_dir=str(tmp_path / "weights"), **options)
        engines.append(engine)
        engine.start(context(tiny_model(architecture), precision))
        return engine

    yield start
    for engine in engines:
        engine.close()
    assert not list((tmp_path / "weights").glob("*"))


@pytest.fixture
def subject(tiny_model):
    """Return a function: an architecture -> an actor, prompts and special tokens."""

    def make(architecture="llama"):
        folder = str(tiny_model(architecture))
        return Actor(load_model(folder)), *prompts_for(folder)

    return make


def prompts_for(folder):
    """Return prompts and special tokens for the model in a folder."""
    tokenizer, actor = load_tokenizer(str(folder)), Actor(load_model(str(folder)))
    encoded = tokenizer(["w1 w2", "w3", "w5 w6 w7"], padding=True, return_tensors="pt")
    prompts = PromptBatch(
        tokens=encoded.input_ids,
        mask=encoded.attention_mask.bool(),
        group=torch.tensor([4, 5, 6]),
        prompts=["w1 w2", "w3", "w5 w6 w7"],
        columns={},
    )
    return prompts, find_special_tokens(actor, tokenizer, ["w4", "w9", "w11", "w21"])


def generate(engine, subject, sampling=None, stream=Stream.ROLLOUT, iteration=0):
    actor, prompts, special_tokens = subject
    sampling = sampling or Sampling(max_tokens=6)
    return engine.generate(actor, prompts, sampling, special_tokens, stream=stream, iteration=iteration)


def difference(actor, rollout):
    """Return the largest difference between the engine's log-probabilities and the actor's."""
    with torch.no_grad():
        logprobs = rollout.at_responses(actor(rollout.tokens, rollout.response_tokens_mask).logprobs)
    return (logprobs - rollout.rollout_logprobs)[rollout.response_mask].abs().max().item()


# ---------------------------------------------------------------------- generation


def test_ppo_learns_from_a_servers_responses(make_module, fit, tmp_path):
    recorder = Recorder()
    with serving() as server:
        engine = VLLMEngine(url=server.url, weights_dir=str(tmp_path), connections=8)
        fit(make_module(engine=engine, iterations=3), [recorder])
        pushed = [body["kwargs"]["weights_path"] for path, body in server.requests if path == "/collective_rpc"]
        assert len(set(pushed)) == 3
        assert not any(os.path.exists(folder) for folder in pushed)
    differences = []
    for output in recorder.outputs:
        scored = output["scored_rollout"]
        mask = scored.rollout.response_mask
        assert torch.equal(scored.rollout.rollout_entropy, torch.zeros_like(scored.entropy))
        differences.append((scored.old_logprobs - scored.rollout.rollout_logprobs)[mask].abs().max())
    assert len(differences) == 3
    assert max(differences) < 1e-5  # the weights of each iteration have arrived
    assert not list(tmp_path.glob("lit-rlhf-*"))


def test_adapters_are_sent_alone(make_module, fit, tmp_path, tiny_model):
    """The server has the base; it gets the sum of a frozen adapter and the trained one, or the first for validation."""
    below = tmp_path / "below"
    model = load_adapted(str(tiny_model("llama")), LoRA(rank=2), "model", trained=["actor"])
    torch.manual_seed(0)
    for parameter in adapter_parameters(model, "actor").values():
        torch.nn.init.normal_(parameter, std=0.05)
    write_adapter(model, ["actor"], str(tiny_model("llama")), below, head=None)
    load_tokenizer(str(tiny_model("llama"))).save_pretrained(below)
    recorder = Recorder()
    with serving() as server:
        server.model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
        engine = VLLMEngine(url=server.url, weights_dir=str(tmp_path / "weights"), connections=8)
        options = {"sampling": Sampling(max_tokens=5), "engine": engine, "iterations": 3}
        module = make_module(actor=str(below), adapter=LoRA(rank=4), **options)
        limits = {"val_check_interval": 3, "limit_val_batches": 1}
        fit(module, [recorder], validation=True, **limits)  # the guard checks each rollout
        paths = [path for path, _ in server.requests]
        assert paths.count("/v1/load_lora_adapter") == paths.count("/v1/unload_lora_adapter") > 3
        assert "/collective_rpc" not in paths
    assert [metrics["engine/mismatch_mean"] < 1e-5 for metrics in recorder.metrics] == [True] * 3
    assert abs(recorder.metrics[-1]["objective/kl_to_ref"]) > 1e-5  # the actor has changed
    assert not list((tmp_path / "weights").glob("*"))


def test_a_whole_reference_beside_adapters_is_refused(make_module, fit, tmp_path, tiny_model):
    other = shutil.copytree(tiny_model("llama"), tmp_path / "other")
    with serving() as server:
        server.model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
        engine = VLLMEngine(url=server.url, weights_dir=str(tmp_path / "weights"), connections=8)
        module = make_module(reference=str(other), adapter=LoRA(rank=4), engine=engine, iterations=1)
        with pytest.raises(UserError, match=r"^model\.reference is a whole model, but the server of model\.engine"):
            fit(module, validation=True, val_check_interval=1, limit_val_batches=1)


def test_dpo_measures_its_kl_on_responses_of_the_server(fit_preferences, tmp_path, tiny_model):
    records = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2} w3"} for i in range(8)]
    with serving() as server:
        server.model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
        engine = VLLMEngine(url=server.url, weights_dir=str(tmp_path / "weights"), connections=8)
        module = DPO(actor=str(tiny_model("llama")), engine=engine, sampling=Sampling(max_tokens=5))
        trainer = fit_preferences(module, records, records)
        assert any(path == "/v1/completions" for path, _ in server.requests)
    assert 0 < float(trainer.callback_metrics["val/length"]) <= 5
    assert not list((tmp_path / "weights").glob("*"))


@pytest.mark.parametrize("lag", [1, 2])
def test_responses_of_older_weights(make_module, fit, tmp_path, lag):
    recorder = Recorder()
    with serving() as server:
        engine = Ahead(VLLMEngine(url=server.url, weights_dir=str(tmp_path), connections=8), lag=lag)
        fit(make_module(engine=engine, iterations=4), [recorder])  # the guard checks each rollout
    assert [metrics["engine/mismatch_mean"] < 1e-5 for metrics in recorder.metrics] == [True] * 4
    first, last = recorder.outputs[0]["scored_rollout"], recorder.outputs[-1]["scored_rollout"]
    for scored, on_policy in ((first, True), (last, False)):
        mask = scored.rollout.response_mask
        assert ((scored.old_logprobs - scored.rollout.rollout_logprobs)[mask].abs().max() < 1e-5) == on_policy
    assert not list(tmp_path.glob("lit-rlhf-*"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_log_probabilities_are_the_actors(started, subject, architecture):
    with serving() as server:
        engine, (actor, prompts, special_tokens) = started(server.url, architecture), subject(architecture)
        for parameter in actor.parameters():
            parameter.data *= 0.9  # the server must not keep what it had
        rollout = generate(engine, (actor, prompts, special_tokens), Sampling(max_tokens=6, responses=2))
        assert difference(actor, rollout) < 1e-5
        assert rollout.group.tolist() == [4, 4, 5, 5, 6, 6]
        last = rollout.tokens[torch.arange(6), rollout.prompt_lengths + rollout.response_lengths - 1]
        assert torch.equal(rollout.terminated, torch.isin(last, torch.tensor(special_tokens.stop)))
        assert 0 < rollout.terminated.sum() < 6
        assert rollout.response_lengths[~rollout.terminated].eq(6).all()


def test_the_temperature_divides_the_logits(started, subject):
    with serving() as server:
        actor, prompts, special_tokens = subject()
        actor.temperature = 0.7
        rollout = generate(
            started(server.url), (actor, prompts, special_tokens), Sampling(max_tokens=6, temperature=0.7)
        )
        assert difference(actor, rollout) < 1e-5


def test_the_most_likely_tokens(started, subject):
    with serving() as server:
        actor, prompts, special_tokens = subject()
        sampling = Sampling(max_tokens=6, temperature=0)
        rollout = generate(started(server.url), (actor, prompts, special_tokens), sampling, Stream.PREDICTION)
        assert difference(actor, rollout) < 1e-5  # at temperature 1
        with torch.no_grad():
            logits = actor.model(rollout.tokens).logits[:, :-1]
        chosen = rollout.response_tokens_mask[:, 1:]
        assert torch.equal(logits.argmax(-1)[chosen], rollout.tokens[:, 1:][chosen])
        longer = generate(started(server.url), (actor, prompts, special_tokens), replace(sampling, min_tokens=6))
        assert rollout.response_lengths.min() < 6
        assert longer.response_lengths.min() == 6


def test_stop_tokens_that_come_too_early_are_drawn_again(started, subject):
    with serving() as server:
        actor, prompts, special_tokens = subject()
        sampling = Sampling(max_tokens=8, min_tokens=5, responses=6)
        first = generate(started(server.url), (actor, prompts, special_tokens), replace(sampling, min_tokens=0))
        rollout = generate(started(server.url), (actor, prompts, special_tokens), sampling)
        assert first.response_lengths.min() <= 5 < rollout.response_lengths.min()
        assert difference(actor, rollout) < 1e-5
        late = first.response_lengths > 5
        assert late.any()
        width = min(first.tokens.shape[1], rollout.tokens.shape[1])
        assert torch.equal(first.tokens[late, :width], rollout.tokens[late, :width])


def test_a_minimum_length_that_is_never_reached(started, subject, monkeypatch):
    monkeypatch.setattr("lit_rlhf.generation.completions.ATTEMPTS_PER_TOKEN", 2)
    early = {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}]}
    with serving(fail=lambda handler, path, number: (200, early) if path == COMPLETIONS else None) as server:
        message = error_of(lambda: generate(started(server.url), subject(), Sampling(max_tokens=6, min_tokens=2)))
        assert message == (
            "model.sampling.min_tokens is 2, but stop tokens are so likely that a response still has only 0 "
            "tokens after 4 attempts"
        )


def test_the_samples_are_a_function_of_seed_stream_iteration_and_row(started, subject, monkeypatch):
    with serving() as server:
        engine, (actor, prompts, special_tokens) = started(server.url), subject()

        def tokens(prompts=prompts, **options):
            return generate(engine, (actor, prompts, special_tokens), Sampling(max_tokens=6, responses=2), **options)

        first = tokens()
        assert torch.equal(first.tokens, tokens().tokens)
        assert len({tuple(row) for row in first.tokens.tolist()}) == 6
        alone = replace(prompts, tokens=prompts.tokens[1:2], mask=prompts.mask[1:2], group=prompts.group[1:2])
        row = tokens(alone).tokens
        assert torch.equal(row, first.tokens[2:4, : row.shape[1]])
        assert not torch.equal(first.tokens, tokens(iteration=1).tokens)
        assert not torch.equal(first.tokens, tokens(stream=Stream.VALIDATION).tokens)
        monkeypatch.setenv("PL_GLOBAL_SEED", "8")
        assert not torch.equal(first.tokens, tokens().tokens)


def test_weights_have_the_servers_precision(started, subject, tmp_path):
    with serving() as server:  # the server checks the types of the tensors
        engine = started(server.url, precision="bf16-mixed")
        generate(engine, subject())
        assert engine._dtype == torch.bfloat16


def test_rollouts_wait_for_their_turn_with_weights_of_their_own(started, subject):
    with serving() as server:
        engine, (actor, prompts, special_tokens) = started(server.url), subject()
        pending, actors = [], []
        for iteration in range(3):
            actors.append(deepcopy(actor))
            pending.append(
                engine.begin(
                    actor, prompts, Sampling(max_tokens=6), special_tokens, stream=Stream.ROLLOUT, iteration=iteration
                )
            )
            for parameter in actor.parameters():
                parameter.data *= 0.8

        def run():
            for one in pending:
                one.run()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        rollouts = [one.result() for one in pending]
        assert max(map(difference, actors, rollouts)) < 1e-5
        assert difference(actors[1], rollouts[0]) > 1e-2


def test_same_samples_on_two_processes(tiny_model, tmp_path):
    script, folder = str(HERE / "vllm_on_ranks.py"), str(tiny_model("gpt2"))  # with tied embeddings
    with serving() as server:
        arguments = [server.url, folder, str(tmp_path / "weights")]
        generate_on_ranks(*arguments, str(tmp_path / "one.pt"))
        for done in preloaded.torchrun(2, script, *arguments, str(tmp_path / "two.pt"), timeout=200):
            assert done.returncode == 0, done.stderr[-3000:]
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert len(one["whole"]) == 8
    for name in ("whole", "fsdp2", "fsdp"):
        for key, (tokens, logprobs) in one["whole"].items():
            found, numbers = two[name][key]
            length = min(len(tokens), len(found))
            assert found[:length] == tokens[:length]
            width = min(len(logprobs), len(numbers))
            assert numbers[:width] == pytest.approx(logprobs[:width], abs=1e-6)
    assert len(set(two["error"])) == 1
    assert two["error"][0].startswith("model.engine.weights_dir is not set: name a folder that elsewhere and this")


# ------------------------------------------------------------------------- failures


def error_of(function):
    """Return the message of a UserError, which has one line."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMPLETIONS = "/v1/completions"


def at(path, *numbers, do):
    """Return a behaviour of the server: ``do(handler)`` at some requests to a path."""
    return lambda handler, asked, number: do(handler) if asked == path and number in numbers else None


def die(handler):
    """End the server: the connections break, and later ones are refused."""
    server = handler.server
    threading.Thread(target=lambda: (server.shutdown(), server.server_close())).start()
    time.sleep(0.2)
    return DROP


def test_the_server_dies(started, subject):
    with serving(fail=at(COMPLETIONS, 1, do=die)) as server:
        engine, start = started(server.url, connections=1), time.monotonic()
        message = error_of(lambda: generate(engine, subject()))
        assert re.match(r"model.engine.url: no answer from http.*/v1/completions after 7 s \(.*refused\)", message)
        assert time.monotonic() - start < 15


def test_the_server_hangs(started, subject):
    with serving(fail=at(COMPLETIONS, 1, do=lambda handler: time.sleep(20))) as server:
        engine, start = started(server.url, timeout=1), time.monotonic()
        assert "/v1/completions after 1 s (" in error_of(lambda: generate(engine, subject()))
        assert time.monotonic() - start < 5


def test_the_server_is_busy_twice(started, subject):
    with serving(fail=at(COMPLETIONS, 0, 1, do=lambda _: (503, "busy"))) as server:
        engine, (actor, prompts, special_tokens) = started(server.url, connections=1), subject()
        assert difference(actor, generate(engine, (actor, prompts, special_tokens))) < 1e-5


def test_the_reason_of_a_refusal_is_shown(started, subject):
    with serving(fail=at(COMPLETIONS, 0, do=lambda _: (400, '{"error": "too large"}'))) as server:
        message = error_of(lambda: generate(started(server.url), subject()))
        assert re.match(r"model.engine.url: .* answered 400 Bad Request: .*too large", message)


GOOD = {"token_ids": [7] * 6, "logprobs": {"token_logprobs": [-1.0] * 6}}
NONSENSE = {
    "no responses": ({"choices": []}, "does not have one response with its tokens and log-probabilities"),
    "no log-probabilities": ({"choices": [{"token_ids": [7], "logprobs": None}]}, "does not have one response with"),
    "another service": (["hello"], "does not have one response with its tokens"),
    "too many tokens": ({"token_ids": [7] * 7}, "has 7 tokens, not between 1 and 6"),
    "no tokens": ({"token_ids": []}, "has 0 tokens"),
    "other length": ({"token_ids": [7] * 5}, "has 5 tokens, but 6 log-probabilities"),
    "unknown token": ({"token_ids": [7, 38, 7, 7, 7, 7]}, "has the token 38, which the model does not have"),
    "NaN": ({"logprobs": {"token_logprobs": [-1.0] * 5 + [math.nan]}}, "has the log-probability nan"),
    "null": ({"logprobs": {"token_logprobs": [-1.0] * 5 + [None]}}, "has the log-probability None"),
    "positive": ({"logprobs": {"token_logprobs": [-1.0] * 5 + [0.5]}}, "has the log-probability 0.5"),
    "after the stop token": ({"token_ids": [7, 1, 7, 7, 7, 7]}, "continues after a stop token"),
    "too short": ({"token_ids": [7], "logprobs": {"token_logprobs": [-1]}}, "ends after 1 tokens, before max_tokens"),
}


@pytest.mark.parametrize(("answer", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense(started, subject, answer, message):
    if isinstance(answer, dict) and "choices" not in answer:
        answer = {"choices": [GOOD | answer]}
    with serving(fail=lambda handler, path, number: (200, answer) if path == COMPLETIONS else None) as server:
        assert message in error_of(lambda: generate(started(server.url), subject()))


def test_weights_that_are_not_this_runs_any_more(started, subject):
    def restart(handler, path, number):
        if path == COMPLETIONS and number == 1:
            handler.server.version = "default"

    with serving(fail=restart) as server:
        message = error_of(lambda: generate(started(server.url), subject()))
        assert re.search(
            r"the server has the weights 'default' instead of '\w+-1': it was restarted, or anoth", message
        )


def test_weights_that_cannot_be_written(started, subject, tmp_path, monkeypatch):
    with serving() as server:
        engine = started(server.url)
        generate(engine, subject())
        engine._folder.path.chmod(0o500)
        monkeypatch.setattr("lit_rlhf.generation.weights_folder.save_untied", fail_to_write)
        message = error_of(lambda: generate(engine, subject()))
        assert message.startswith(f"model.engine.weights_dir: the weights cannot be written to {engine._folder.path} (")
        engine._folder.path.chmod(0o700)


def fail_to_write(model, weights, folder, dtype):
    raise OSError(28, "No space left on device")


def test_a_prompt_that_is_too_long_for_the_server(started, subject):
    with serving() as server:
        server.max_model_len = 9
        message = error_of(lambda: generate(started(server.url), subject()))
        assert message == (
            "model.engine.max_model_len: the server takes 9 tokens, but the longest prompt has 4, "
            "and model.sampling.max_tokens is 6"
        )


def test_a_server_with_the_wrong_log_probabilities(started):
    with serving() as server:
        server.logprobs_mode = "raw_logprobs"
        assert "--logprobs-mode must be processed_logprobs, not raw_logprobs" in error_of(lambda: started(server.url))


def test_a_server_that_does_not_accept_weights(started):
    with serving(fail=at("/server_info", 0, do=lambda _: (404, "Not Found"))) as server:
        assert error_of(lambda: started(server.url)).endswith(
            "answered 404 Not Found: Not Found; start vLLM (0.32 or later) with VLLM_SERVER_DEV_MODE=1"
        )


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=6, top_k=3), Sampling(max_tokens=6, top_p=0.9)])
def test_restricted_sampling_is_refused(started, subject, sampling):
    with serving() as server:
        message = error_of(lambda: generate(started(server.url), subject(), sampling))
        assert re.match(r"model.sampling.top_[kp] is [\d.]+: VLLMEngine samples from the full distribution", message)


WRONG = {
    "give either url, the address of a vLLM server, or python": ({}, {"url": "http://a:1", "python": "python"}),
    "engine.devices is an option for starting a server": ({"url": "http://a:1", "devices": [0]},),
    "engine.server_args is an option for starting a server": ({"url": "http://a:1", "server_args": ["-x"]},),
    "engine.timeout must be positive, not 0": ({"url": "http://a:1", "timeout": 0},),
    "engine.connections must be 1 or more, not 0": ({"url": "http://a:1", "connections": 0},),
    "engine.devices must be indices of GPUs": ({"python": "x", "devices": []}, {"python": "x", "devices": [-1]}),
}


@pytest.mark.parametrize(("message", "options"), [(m, o) for m, several in WRONG.items() for o in several])
def test_wrong_options(message, options):
    with pytest.raises(ValueError, match=re.escape(message)):
        VLLMEngine(**options)


# ------------------------------------------------------------------------ vLLM itself


@pytest.fixture
def small_llama(tiny_model, tmp_path):
    """Return the folder of a Llama with tied embeddings and a head size that vLLM has on a CPU."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    config |= {"tie_word_embeddings": True, "initializer_range": 0.1}
    folder, tokenizer = tmp_path / "llama", str(tiny_model("llama"))
    load_model(RandomWeights(config=config, tokenizer=tokenizer)).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


class KillTheServer(lightning.Callback):
    """Kills vLLM after three iterations."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.iteration == 3:
            keeper = pl_module.engine._server._process.pid
            subprocess.run(["pkill", "-KILL", "-P", str(keeper)], check=True)
            self.start = time.monotonic()


@pytest.mark.skipif(VLLM is None, reason="LIT_RLHF_VLLM_PYTHON does not name a Python program with vLLM")
@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-4), ("bf16-mixed", 0.1)])
def test_ppo_learns_from_vllm(small_llama, make_module, fit, tmp_path, precision, bound, adapter):
    recorder, killer = Recorder(), KillTheServer()
    engine = VLLMEngine(python=VLLM, weights_dir=str(tmp_path / "weights"))
    sampling = Sampling(max_tokens=24, min_tokens=6, temperature=0.8, responses=2)
    module = make_module(actor=str(small_llama), adapter=adapter, engine=engine, sampling=sampling, iterations=5)
    message = error_of(lambda: fit(module, [recorder, killer], precision=precision))
    assert "the vLLM server has ended (killed by signal 9): " in message
    assert time.monotonic() - killer.start < 30
    means = []
    for output in recorder.outputs:
        scored = output["scored_rollout"]
        mask = scored.rollout.response_mask
        assert scored.rollout.response_lengths.min() > 6
        means.append((scored.old_logprobs - scored.rollout.rollout_logprobs)[mask].abs().mean().item())
    assert len(means) == 3
    assert max(means) < bound
    assert not list((tmp_path / "weights").iterdir())
