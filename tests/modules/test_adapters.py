"""Training with adapters: it starts at the reference, steps as the plain model would, and leaves the base alone."""

import json
from pathlib import Path

import pytest
import torch

from lit_rlhf.algorithms.advantages import GAE, TD0, MonteCarlo, NStep
from lit_rlhf.algorithms.group_baselines import GroupNormalized, LeaveOneOut
from lit_rlhf.algorithms.kl import ReferenceKL
from lit_rlhf.algorithms.objectives import Clip, KLPenalty, Surrogate, VanillaPG
from lit_rlhf.algorithms.vtrace import VTrace
from lit_rlhf.callbacks import ActivationCheckpointing, IterationCheckpoint
from lit_rlhf.data import Demonstrations
from lit_rlhf.errors import UserError
from lit_rlhf.generation import Sampling
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapters import LoRA, adapter_parameters
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel
from lit_rlhf.modules import DPO, SFT, TRPO, RewardModeling, TrustRegion, Update
from lit_rlhf.modules.adapted_roles import load_adapted_roles
from lit_rlhf.modules.roles import RoleSources
from lit_rlhf.rewards import RewardFunction, RewardModel
from lit_rlhf.strategies import FSDP
from lit_rlhf.testing import Recorder

ONE_STEP = Update(epochs=1, minibatches=1, max_tokens=64)
WIDTH = 32
PAIRS = [{"prompt": f"w{i % 7} w5", "chosen": f" w1 w{i % 5}", "rejected": f" w{8 + i % 9} w3 w2"} for i in range(16)]
RANKINGS = [{"prompt": "w5", "responses": [f" w1 w{i % 5}", " w9 w8", f" w{8 + i % 9} w3"]} for i in range(16)]


def adam(lr):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr=lr)


def check_only_the_adapters_changed(trainer, module):
    """The base is that of the folder, bit by bit; only own parameters are trained, have states, and are saved."""
    plain = load_model(module.source)
    plain, model = (plain.base_model, module.reward.trunk) if module.role == "reward" else (plain, module.actor.model)
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert kept.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(kept[name], weight) for name, weight in plain.named_parameters())
    roles = [getattr(module, name, None) for name in ("actor", "critic", "reward")]
    own = {id(p) for role in roles if isinstance(role, Actor | ScalarModel) for p in role.own_parameters().values()}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert own == {id(p) for p in trained.values()}
    for optimizer in trainer.optimizers:
        assert {id(p) for p in optimizer.state} <= {id(p) for g in optimizer.param_groups for p in g["params"]} <= own
        assert optimizer.state
    saved = {name for name, _ in module.named_parameters() if name in module.state_dict()}
    assert saved == trained.keys()


CASES = {
    "MonteCarlo": (MonteCarlo(), VanillaPG(), "actor", ReferenceKL("reward", "full")),
    "TD0": (TD0(), Surrogate(), "shared", ReferenceKL("loss", "k2")),
    "NStep": (NStep(4), KLPenalty(), "reward", ReferenceKL("loss", "k3")),
    "VTrace": (VTrace(), Clip(), "actor", ReferenceKL("loss", "full")),
    "GAE": (GAE(), Clip(0.01, 0.02, 3.0, "sequence"), "reward", ReferenceKL("reward", "full")),
    "GAE by length": (GAE(0.9, length_alpha=0.2, critic_lam=1.0), Clip(), "folder", ReferenceKL("reward", "k1")),
    "GroupNormalized": (GroupNormalized(), VanillaPG(), None, ReferenceKL("loss", "full")),
    "Dr GRPO": (GroupNormalized(False), KLPenalty(), None, ReferenceKL("loss", "k2")),
    "LeaveOneOut": (LeaveOneOut(), Surrogate(), None, ReferenceKL("reward", "k1")),
    "without critic": (MonteCarlo(), Clip(), None, ReferenceKL("reward", "full")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_actor_starts_as_the_reference(make_module, fit, tiny_model, tiny_adapter, case):
    """B is 0, so the KL is 0 at first; the ratio is 1 in the first minibatch of every iteration."""
    estimator, objective, critic, reference_kl = CASES[case]
    recorder, reward = Recorder(), str(tiny_adapter(task="score"))
    module = make_module(
        iterations=2,
        advantages=estimator,
        objective=objective,
        critic=reward if critic == "folder" else critic,
        adapter=LoRA(rank=4),
        update=ONE_STEP,
        actor_optimizer=adam(1e-2),
        critic_optimizer=adam(1e-2),
        reference_kl=reference_kl,
        sampling=Sampling(max_tokens=8, responses=2 if critic is None else 1),
        **({"rewards": [RewardModel(reward)]} if critic in ("reward", "folder") else {}),
    )
    trainer = fit(module, [recorder], batch_size=4)
    first, second = recorder.metrics
    assert abs(first["objective/kl_to_ref"]) < 1e-5
    assert abs(second["objective/kl_to_ref"]) > 1e-5
    scored = recorder.outputs[0]["scored_rollout"]
    if critic == "shared":  # the actor's log-probabilities do not come from the engine
        assert torch.equal(scored.old_logprobs, scored.ref_logprobs)
    if scored.full_kl is not None:
        assert scored.full_kl.abs().max() == 0
    for metrics in recorder.metrics:
        assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
    check_only_the_adapters_changed(trainer, module)
    if critic in ("reward", "folder"):  # the critic has learned, but not the reward model that it started from
        tokens = scored.rollout.tokens[:2]
        judge = module.scores.rewards[0].model
        torch.testing.assert_close(judge(tokens), RewardModel(reward).load()(tokens), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(judge(tokens), module.critic(tokens), atol=1e-3)


def test_a_critic_from_a_reward_adapter_has_its_units(tiny_model, tiny_adapter):
    base = str(tiny_model())
    reward = RewardModel(str(tiny_adapter(task="score", scale=(3.0, 0.5))), weight=2.0, normalize=True)
    sources = RoleSources(
        actor=base, critic="reward", reference=None, temperature=1.0, adapter=LoRA(rank=2), rewards=[reward]
    )
    roles = load_adapted_roles(
        sources, prepare=lambda: reward.prepare(load_tokenizer(base)), place=lambda build, sharded=True: build()
    )
    tokens = torch.tensor([[2, 6, 7, 8, 1]])
    torch.testing.assert_close(roles.critic(tokens), 2.0 * (reward.model(tokens) - 3.0) / 0.5, atol=1e-4, rtol=1e-4)
    alone = RewardModel(reward.source).load()  # merged into a base of its own
    torch.testing.assert_close(reward.model(tokens), alone(tokens), atol=1e-5, rtol=1e-5)


def full_rank() -> LoRA:
    """Return an adapter that becomes W + B with A = 1: the first step of gradient descent is that of W."""
    return LoRA(rank=WIDTH, alpha=WIDTH, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])


def one_step(kind, adapter, fit, fit_preferences, make_module, make_trainer, actor, folder):
    """Return the metrics of the first of two steps of gradient descent, and the model after the first."""
    recorder = Recorder()
    options = {"actor": actor, "adapter": adapter, "iterations": 1}
    if kind == "SFT":
        module = SFT(**options, optimizer=sgd(0.1), clip_grad_norm=None)
    elif kind == "DPO":
        module = DPO(**options, optimizer=sgd(0.5), clip_grad_norm=None)
    else:
        update = Update(epochs=1, minibatches=1, max_tokens=64, clip_grad_norm=None)
        estimator = {"advantages": MonteCarlo(), "critic": None}
        module = make_module(**options, update=update, actor_optimizer=sgd(0.5), **estimator)
    module.configure_model()
    if adapter is not None:
        for name, parameter in adapter_parameters(module.actor.model, "actor").items():
            if "lora_A" in name:
                parameter.data.copy_(torch.eye(WIDTH))
    if kind == "SFT":
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["chosen"]}) + "\n" for r in PAIRS))
        data = Demonstrations(train=str(path), prompt="prompt", response="response", batch_size=8)
        make_trainer([recorder]).fit(module, datamodule=data)
    elif kind == "DPO":
        fit_preferences(module, PAIRS, callbacks=[recorder])
    else:
        fit(module, [recorder])
    return recorder.metrics[0], module.actor.model


@pytest.mark.parametrize("kind", ["SFT", "DPO", "PolicyGradient"])
def test_a_step_of_full_rank_is_the_plain_models_step(
    kind, fit, fit_preferences, make_module, make_trainer, tiny_model, tmp_path
):
    parts = fit, fit_preferences, make_module, make_trainer, str(tiny_model()), tmp_path
    (plain, after), (adapted, model) = (one_step(kind, lora, *parts) for lora in (None, full_rank()))
    for name, value in plain.items():
        if not name.startswith(("perf", "time")) and "grad_norm" not in name:
            assert adapted[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    moved = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            before, right = layer.get_base_layer().weight, after.get_submodule(name).weight
            torch.testing.assert_close(before + layer.lora_B["actor"].weight, right, atol=1e-6, rtol=1e-5)
            moved = max(moved, float((right - before).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("critic", ["actor", None])
def test_trpo(fit, tiny_model, critic):
    recorder = Recorder()
    module = TRPO(
        actor=str(tiny_model()),
        critic=critic,
        adapter=LoRA(rank=4),
        rewards=[RewardFunction("lit_rlhf.testing.runs:low_words")],
        sampling=Sampling(max_tokens=8),
        region=TrustRegion(max_kl=0.01, cg_iterations=4, fisher_every=1),
        update=Update(epochs=1, minibatches=1, max_tokens=256),
        iterations=2,
        critic_optimizer=adam(1e-3),
        **({"advantages": MonteCarlo()} if critic is None else {}),
    )
    trainer = fit(module, [recorder])
    assert abs(recorder.metrics[0]["objective/kl_to_ref"]) < 1e-5
    for metrics in recorder.metrics:
        assert 1e-4 < metrics["policy/kl_to_old"] <= 0.01 * (1 + 1e-5)
    rollout = recorder.outputs[1]["scored_rollout"].rollout  # drawn from what is now the old policy
    old = rollout.at_responses(module.old(rollout.tokens, rollout.response_tokens_mask).logprobs)
    torch.testing.assert_close(old, recorder.outputs[1]["scored_rollout"].old_logprobs, atol=1e-5, rtol=1e-5)
    moved = [
        not torch.equal(p, adapter_parameters(module.actor.model, "old")[name.replace(".actor.", ".old.")])
        for name, p in adapter_parameters(module.actor.model, "actor").items()
    ]
    assert all(moved)
    check_only_the_adapters_changed(trainer, module)


@pytest.mark.parametrize("packing", [False, True])
def test_sft(tiny_model, make_trainer, tmp_path, packing):
    """The first loss is the base's; packed or not, the losses and the adapter are the same."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["chosen"]}) + "\n" for r in PAIRS))
    losses = []
    for adapter in (LoRA(rank=4), None):
        data = Demonstrations(train=str(path), prompt="prompt", response="response", batch_size=8, packing=packing)
        recorder = Recorder()
        module = SFT(str(tiny_model()), adapter=adapter, optimizer=adam(1e-2), iterations=10)
        trainer = make_trainer([recorder])
        trainer.fit(module, datamodule=data)
        losses.append([m["train/loss"] for m in recorder.metrics])
        if adapter is not None:
            check_only_the_adapters_changed(trainer, module)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.parametrize("records", [PAIRS, RANKINGS], ids=["pairs", "rankings"])
@pytest.mark.parametrize("kind", ["DPO", "RewardModeling"])
def test_preferences(fit_preferences, tiny_model, kind, records):
    """At first, all orders are equally likely: DPO starts at the reference, and a reward model's head is 0."""
    recorder, options = Recorder(), {"adapter": LoRA(rank=4), "optimizer": adam(1e-2), "iterations": 8}
    short = {"sampling": Sampling(max_tokens=4)}
    module = (
        DPO(str(tiny_model()), **options, **short) if kind == "DPO" else RewardModeling(str(tiny_model()), **options)
    )
    trainer = fit_preferences(module, records, records, callbacks=[recorder])
    losses = [m["train/loss"] for m in recorder.metrics]
    assert losses[0] == pytest.approx(0.6931472 if records is PAIRS else 1.7917595, abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    check_only_the_adapters_changed(trainer, module)


def run(make_module, fit, *callbacks, iterations=3, **options):
    """Return the metrics of a run with an adapter, without times, and the trained weights."""
    recorder = Recorder()
    module = make_module(iterations=iterations, adapter=LoRA(rank=4), actor_optimizer=adam(1e-2), update=ONE_STEP)
    fit(module, [*callbacks, recorder], **options)
    metrics = [{k: v for k, v in m.items() if not k.startswith(("time", "perf"))} for m in recorder.metrics]
    return metrics, recorder.weights


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision(make_module, fit, dora):
    """The base is rounded, the adapters are not; DoRA's norms are those of the weights before they are rounded."""
    recorder = Recorder()
    adapter = LoRA(rank=4, dora=dora)
    module = make_module(iterations=2, adapter=adapter, actor_optimizer=adam(1e-2), update=ONE_STEP)
    fit(module, [recorder], precision="bf16-mixed")
    scored = recorder.outputs[0]["scored_rollout"]
    assert torch.equal(scored.old_logprobs, scored.ref_logprobs) or dora
    assert abs(recorder.metrics[0]["objective/kl_to_ref"]) < (0.3 if dora else 1e-7)
    assert all(abs(metrics["policy/ratio_max"] - 1) < 0.02 for metrics in recorder.metrics)
    plain = load_model(module.source)
    for name, layer in module.actor.model.named_modules():
        if hasattr(layer, "lora_A"):
            right = plain.get_submodule(name).weight.to(torch.bfloat16)
            assert torch.equal(layer.get_base_layer().weight, right)
            assert layer.get_base_layer().weight.dtype == torch.bfloat16
            own = [p for key, p in layer.named_parameters() if "lora_" in key]
            assert {p.dtype for p in own} == {torch.float32}


def test_recomputed_layers_change_nothing(make_module, fit):
    plain, again = run(make_module, fit), run(make_module, fit, ActivationCheckpointing())
    assert again[0] == plain[0]
    assert all(torch.equal(again[1][name], weight) for name, weight in plain[1].items())


def test_a_resumed_run_ends_with_the_same_bits(make_module, fit, tmp_path):
    whole = run(make_module, fit)
    run(make_module, fit, IterationCheckpoint(every_n=2), iterations=2)
    (path,) = tmp_path.rglob("last.ckpt")
    rest = run(make_module, fit, ckpt_path=str(path))
    assert rest[0] == whole[0][2:]
    assert rest[1].keys() == whole[1].keys()
    assert all(torch.equal(rest[1][name], weight) for name, weight in whole[1].items())


def test_fsdp1_is_refused(make_module, fit, one_process):
    with pytest.raises(UserError, match=r"trainer\.strategy: fsdp cannot train an adapter.*use fsdp2"):
        fit(make_module(adapter=LoRA(rank=2), iterations=1), strategy=FSDP(), devices=1, inference_mode=False)
