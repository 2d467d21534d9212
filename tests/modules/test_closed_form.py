"""PPO approaches the closed-form optimum π_ref exp(r / β) / Z in a language whose responses can all be enumerated."""

import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf import GAE, FixedKL, PolicyGradient, Prompts, RandomWeights, ReferenceKL, RewardFunction, Sampling, Update

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
worlds = pytest.importorskip("worlds")

STEPS, BETA = 2, 0.5
LANGUAGE = worlds.World(words=("a", "b", "c"), starts=("a", "b", "c"), steps=STEPS)
SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.2}  # fmt: skip


@torch.no_grad()
def log_probabilities(actor, start):
    """Return the log-probability of every response to a prompt, and the responses' scores."""
    responses = list(LANGUAGE.responses(start))
    ids = {word: i for i, word in enumerate((worlds.END, *LANGUAGE.words))}
    tokens = torch.zeros(len(responses), 1 + STEPS, dtype=torch.long)
    response_tokens_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, response in enumerate(responses):
        tokens[row, : 1 + len(response)] = torch.tensor([ids[word] for word in (start, *response)])
        response_tokens_mask[row, 1 : 1 + len(response)] = True
    return actor(tokens, response_tokens_mask).logprobs.double().sum(1), worlds._scores("chain", start, responses)


def total_variation(module):
    """Return the total variation distance of the actor's distribution from the optimum, averaged over the prompts."""
    distances = []
    for start in LANGUAGE.starts:
        logprobs, scores = log_probabilities(module.actor, start)
        reference, _ = log_probabilities(module.reference, start)
        optimum = torch.softmax(reference + scores / BETA, 0)
        distances.append(0.5 * float((logprobs.exp() - optimum).abs().sum()))
    return sum(distances) / len(distances)


@pytest.mark.parametrize(
    ("batch_size", "iterations", "lr", "distance"),
    [(96, 80, 7e-3, 0.08), pytest.param(384, 120, 5e-3, 0.05, marks=pytest.mark.long)],
    ids=["short", "long"],
)
@pytest.mark.parametrize(
    ("estimator", "whiten"),
    [("k1", False), *(pytest.param("full", whiten, marks=pytest.mark.long) for whiten in (True, False))],
)
def test_ppo(make_trainer, estimator, whiten, batch_size, iterations, lr, distance):
    module = PolicyGradient(
        actor=RandomWeights(config=SHAPE, tokenizer=f"{BENCHMARKS}/worlds.py:chain_tokenizer", seed=1),
        rewards=[RewardFunction(f"{BENCHMARKS}/worlds.py:chain_score")],
        sampling=Sampling(max_tokens=STEPS),
        kl=FixedKL(BETA),
        reference_kl=ReferenceKL("reward", estimator),
        advantages=GAE(lam=1.0),
        update=Update(epochs=2, minibatches=1, whiten_advantages=whiten, value_clip=None),
        iterations=iterations,
        actor_optimizer=lambda p: torch.optim.Adam(p, lr=lr),
        critic_optimizer=lambda p: torch.optim.Adam(p, lr=lr),
        actor_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, iterations),
    )
    trainer = make_trainer(max_epochs=-1)
    module.configure_model()
    before = total_variation(module)
    trainer.fit(module, datamodule=Prompts(train=f"{BENCHMARKS}/worlds.py:chain_prompts", batch_size=batch_size))
    assert before > 0.2
    assert total_variation(module) < distance
