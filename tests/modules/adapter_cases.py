"""The cases of `fit_on_ranks.py` that train adapters."""

import torch

from lit_rlhf import (
    DPO,
    SFT,
    TRPO,
    AdaptiveKL,
    Ahead,
    Clip,
    Correction,
    KLPenalty,
    LoRA,
    PolicyGradient,
    ReferenceKL,
    RewardFunction,
    RewardModel,
    RewardModeling,
    Sampling,
    TrustRegion,
    Update,
)

LORA = LoRA(rank=2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3, eps=1e-3)


def several_steps(**options):
    return Update(epochs=2, minibatches=2, max_tokens=64, clip_grad_norm=None, **options)


def cases(actor, start, scorer, reward_function, workers):
    """Yield names and functions that make modules.

    Args:
        actor: The folder of the base.
        start: The folder of an adapter of it, as SFT exports one.
        scorer: The folder of a reward model that is an adapter of it.
        reward_function: The reward of the cases without a reward model.
        workers: The number of worker processes of `Ahead`.
    """
    short = Sampling(max_tokens=12)
    # with so few tokens in a micro-batch, the two processes of a run score different numbers of micro-batches
    function, model = {"rewards": [RewardFunction(reward_function)]}, {"rewards": [RewardModel(scorer, max_tokens=33)]}
    common = {"adapter": LORA, "sampling": short, "actor_optimizer": adam, "critic_optimizer": adam}
    yield (
        "lora ppo",
        lambda: PolicyGradient(
            actor, **model, **common, iterations=2, kl=AdaptiveKL(horizon=100), objective=Clip(), update=several_steps()
        ),
    )
    yield (
        "lora stacked",
        lambda: PolicyGradient(
            start, **model, **common, critic="reward", iterations=2, update=several_steps(target_kl=0.5)
        ),
    )
    yield "lora shared", lambda: PolicyGradient(
        actor, **function, **common, critic="shared", iterations=2, update=several_steps(entropy_coef=0.01),
        objective=KLPenalty(), reference_kl=ReferenceKL(where="loss", estimator="full"),
    )  # fmt: skip
    yield "lora ahead", lambda: PolicyGradient(
        actor, **function, **common, critic=None, iterations=3, update=several_steps(),
        engine=Ahead(lag=1, workers=workers), correction=Correction(),
    )  # fmt: skip
    yield "lora trpo", lambda: TRPO(
        start, **model, adapter=LORA, sampling=short, critic_optimizer=adam, iterations=1, update=several_steps(),
        region=TrustRegion(cg_iterations=2),  # more of them would amplify differences in rounding
    )  # fmt: skip
    yield (
        "lora half",
        lambda: PolicyGradient(
            start, **model, **common, iterations=1, update=Update(epochs=1, minibatches=1, max_tokens=64)
        ),
    )
    again = {"optimizer": adam, "iterations": 2, "max_tokens": 64, "adapter": LORA}
    for name in ("lora sft", "lora half sft"):
        yield name, lambda: SFT(start, **again)
    yield "lora reward", lambda: RewardModeling(actor, **again)
    yield "lora dpo", lambda: DPO(start, **again)
