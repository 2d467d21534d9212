"""Run every case on the processes that torchrun starts; rank 0 saves weights and metrics.

python -m torch.distributed.run --nproc-per-node 2 tests/modules/fit_on_ranks.py STRATEGY ACTOR REFERENCE REWARD \
    ADAPTER REWARD_ADAPTER PROMPTS OUT CASES

CASES is a regular expression. With APART=1 in the environment, nothing is computed once for several texts.
"""

import os
import random
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import lightning
import torch
from torch.distributed.tensor import DTensor

import lit_rlhf.batching
import lit_rlhf.rewards.model
import lit_rlhf.types
from lit_rlhf import (
    DPO,
    GAE,
    SFT,
    TRPO,
    AdaptiveKL,
    Ahead,
    Averaging,
    Clip,
    Correction,
    Demonstrations,
    DynamicSampling,
    GroupNormalized,
    Guard,
    KLPenalty,
    LeaveOneOut,
    NativeEngine,
    OnPolicyCallback,
    PolicyGradient,
    Preferences,
    Prompts,
    ReferenceKL,
    Reward,
    RewardFunction,
    RewardModel,
    RewardModeling,
    Sampling,
    ScoreShaping,
    Update,
    VanillaPG,
)
from lit_rlhf.callbacks import ExportAtEnd
from lit_rlhf.strategies import FSDP
from lit_rlhf.testing import Recorder

sys.path[:0] = [os.path.dirname(__file__), str(Path(__file__).parents[1])]  # pytest does not add the first of them
import adapter_cases  # noqa: E402
import preloaded  # noqa: E402

warnings.filterwarnings("ignore")
LOW_WORDS = "lit_rlhf.testing.runs:low_words"


def rankings():
    """Return rankings of two to four responses of different lengths."""
    rng = random.Random(0)
    texts = [[" ".join(f"w{rng.randrange(32)}" for _ in range(rng.randint(1, 9))) for _ in range(4)] for _ in range(12)]
    return [{"prompt": "w1 w2", "responses": [f" {t}" for t in row[: 2 + i % 3]]} for i, row in enumerate(texts)]


def texts():
    return [{"text": " ".join(r["responses"])} for r in rankings()]


@dataclass(frozen=True)
class ShiftedEngine(NativeEngine):
    """The native engine, with log-probabilities that are off by up to 1, as if it had other weights."""

    is_exact = False

    def generate(self, *inputs, **options):
        rollout = super().generate(*inputs, **options)
        waves = torch.sin(rollout.group[:, None] + 2.0 * torch.arange(rollout.response_mask.shape[1]))
        return replace(rollout, rollout_logprobs=rollout.rollout_logprobs - rollout.response_mask * waves)


class LowFirstWord(Reward):
    """Says that the first word of a response is its answer, and that the words w0 … w15 are correct."""

    def forward(self, reward_inputs):
        return torch.tensor([float(answer in LOW) for answer in self.extract_answers(reward_inputs)])

    def extract_answers(self, reward_inputs):
        return [(response.split() or [None])[0] for response in reward_inputs.responses]


LOW = {f"w{i}" for i in range(16)}


def sgd(parameters):
    """Return SGD with learning rate 1, whose step is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, fused=True)


def one_step(**options):
    return Update(epochs=1, minibatches=1, max_tokens=64, clip_grad_norm=None, entropy_coef=0.01, **options)


def cases(strategy, actor, reference, scorer, *adapters):
    common = {"actor": actor, "iterations": 1, "rewards": [RewardFunction(LOW_WORDS)]}
    steps = {"actor_optimizer": sgd, "critic_optimizer": sgd}
    several = Sampling(max_tokens=12, responses=2)
    yield (
        "ppo",
        lambda: PolicyGradient(
            **common,
            **steps,
            sampling=Sampling(max_tokens=12),
            scores=ScoreShaping(normalize=True),
            kl=AdaptiveKL(horizon=100),
            objective=Clip(),
            advantages=GAE(),
            update=one_step(),
        ),
    )
    yield (
        "stopped",  # after the first step: the KL at the second exceeds the target, one rank's part of it would not
        lambda: PolicyGradient(
            **common,
            **steps,
            critic=None,
            sampling=Sampling(max_tokens=12),
            update=Update(epochs=2, minibatches=1, max_tokens=64, target_kl=0.6),
        ),
    )
    yield (
        "penalty",
        lambda: PolicyGradient(
            **common,
            **steps,
            sampling=Sampling(max_tokens=12),
            objective=KLPenalty(),
            reference_kl=ReferenceKL(where="loss", estimator="full"),
            update=one_step(whiten_rewards=True, aggregation="constant"),
        ),
    )
    yield (
        "grpo",
        lambda: PolicyGradient(
            **{**common, "rewards": [RewardFunction(LOW_WORDS), LowFirstWord(weight=0.0)]},
            **steps,
            critic=None,
            sampling=several,
            engine=ShiftedEngine(),
            guard=Guard(responses=0),
            correction=Correction(mask_level="geometric", mask_below=0.9),
            advantages=GroupNormalized(),
            update=one_step(whiten_advantages=False, aggregation="sequence"),
        ),
    )
    yield "rloo", lambda: PolicyGradient(
        **common, **steps, critic="shared", sampling=several, advantages=LeaveOneOut(), objective=VanillaPG(),
        update=one_step(), bootstrap_truncated=True,
    )  # fmt: skip
    yield "trpo", lambda: TRPO(**common, critic_optimizer=sgd, sampling=Sampling(max_tokens=12), update=one_step())
    yield "several", lambda: PolicyGradient(
        **{**common, "rewards": [RewardModel(scorer, max_tokens=64)]}, **steps, critic="reward", sampling=several,
        reference_kl=ReferenceKL(where="loss", estimator="full"), update=one_step(),
    )  # fmt: skip

    yield "three", lambda: PolicyGradient(
        **{**common, "iterations": 3, "rewards": [RewardModel(scorer, max_tokens=64)]},
        critic="reward",
        actor_optimizer=adam,
        critic_optimizer=adam,
        sampling=Sampling(max_tokens=12),
        update=Update(epochs=3, minibatches=3, max_tokens=64, target_kl=0.02, entropy_coef=0.01, critic_warmup=1),
    )  # fmt: skip
    yield (
        "ahead",
        lambda: PolicyGradient(  # iteration 1 learns with a lag; where the weights are sharded, each process of two
            # has a worker process, to which the weights must come whole
            **{**common, "iterations": 2},
            **steps,
            critic=None,
            sampling=Sampling(max_tokens=12),
            engine=Ahead(lag=1, workers=int(strategy != "ddp" and os.environ["WORLD_SIZE"] == "2")),
            correction=Correction(),
            update=one_step(),
        ),
    )
    if strategy != "fsdp":
        yield (
            "dapo",
            lambda: PolicyGradient(
                **{**common, "iterations": 2, "rewards": [LowFirstWord()]},
                actor_optimizer=adam,
                critic=None,
                sampling=several,
                dynamic_sampling=DynamicSampling(max_draws=4),
                advantages=GroupNormalized(),
                averaging=Averaging(decay=0.5),
                reference_kl=None,
                update=Update(epochs=1, minibatches=2, max_tokens=64),
            ),
        )
    again = {"optimizer": sgd, "iterations": 1, "max_tokens": 64, "clip_grad_norm": None}
    yield "reward", lambda: RewardModeling(reward=actor, **again)
    for name in ("sft", "packed"):  # micro-batches of one or two rows, of which the ranks have different numbers
        yield name, lambda: SFT(actor=actor, optimizer=sgd, iterations=1, max_tokens=32)
    yield "dpo", lambda: DPO(actor=actor, reference=reference, beta=0.1, **again)
    if adapters:
        workers = 1 if strategy == "fsdp2" and int(os.environ["WORLD_SIZE"]) <= 2 else 0
        yield from adapter_cases.cases(actor, *adapters, LOW_WORDS, workers)


class Hooks(OnPolicyCallback):
    """Keeps the names of the hooks that were called, with the number of rows that they received."""

    def __init__(self):
        self.calls = []

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.calls.append(("on_rollout_end", len(rollout.tokens)))

    def on_rewards(self, trainer, pl_module, scored, trajectory):
        self.calls.append(("on_rewards", len(scored.scores), len(trajectory.rewards)))

    def on_advantages(self, trainer, pl_module, experience):
        self.calls.append(("on_advantages", len(experience.advantages)))

    def on_update_end(self, trainer, pl_module, metrics):
        self.calls.append(("on_update_end", metrics["objective/score"]))

    def of_all_ranks(self):
        calls = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(calls, self.calls)
        return calls


def describe(module, optimizers):
    """Return what each parameter is: its type, whether it is trained, is sharded and has optimizer state."""
    with_state = {id(parameter) for optimizer in optimizers for parameter in optimizer.state}
    return {
        name: (str(p.dtype), p.requires_grad, isinstance(p, DTensor), id(p) in with_state)
        for name, p in module.named_parameters()
    }


def main(strategy, *folders, prompts, out, only):
    lightning.seed_everything(7, verbose=False)
    torch.set_num_threads(1)
    preloaded.fork_workers()
    results = {}
    for name, make in cases(strategy, *folders):
        if not re.fullmatch(only, name):
            continue
        recorder, hooks = Recorder(), Hooks()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=FSDP() if strategy == "fsdp" else strategy,  # Lightning accepts this name only on GPUs
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            default_root_dir=os.path.dirname(out),
            precision="bf16-mixed" if name.startswith("lora half") else None,
            callbacks=[recorder, hooks, *([ExportAtEnd(Path(out).stem)] if name == "lora stacked" else [])],
        )
        held_out = {"validation": prompts, "validation_batch_size": 20} if name in ("grpo", "dapo") else {}
        data = Prompts(train=prompts, batch_size=10 if name == "three" else 24, **held_out)
        if name == "packed" or name.endswith("sft"):
            packing = {"packing": True, "max_tokens": 40} if name == "packed" else {}
            data = Demonstrations(train=f"{__file__}:texts", batch_size=11, **packing)
        if name.endswith(("reward", "dpo")):
            data = Preferences(train=f"{__file__}:rankings", batch_size=12)
        module = make()
        trainer.fit(module, datamodule=data)
        timed = ("time/", "perf/")
        metrics = {k: v for k, v in recorder.metrics[-1].items() if not k.startswith(timed)}
        metrics |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        results[name] = {"weights": recorder.weights, "metrics": metrics, "steps": trainer.global_step}
        results[name]["parameters"] = describe(module, trainer.optimizers)
        results[name]["hooks"] = hooks.of_all_ranks()
    if os.environ["RANK"] == "0":
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def share_nothing(tokens, lengths, group):
    """Do as `shared_beginnings` does for texts that have nothing in common."""
    return torch.zeros_like(lengths)


if __name__ == "__main__":
    if "APART" in os.environ:
        for module in (lit_rlhf.types, lit_rlhf.batching, lit_rlhf.rewards.model):
            module.shared_beginnings = share_nothing
    *words, prompts, out, only = sys.argv[1:]
    main(*words, prompts=prompts, out=out, only=only)
