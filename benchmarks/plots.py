"""Draw the figures of docs/algorithms.md with the package's own estimators and objectives.

    pip install -e ".[benchmarks]" && python benchmarks/plots.py

*clip.png*: the clipped objective of one token as a function of its ratio, for a positive and a negative advantage.
*bias_variance.png*: bias and standard deviation of the estimators as functions of n and λ, on a Markov chain with
exactly known values and a critic whose error is known.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from lit_rlhf import GAE, AdvantageEstimator, Clip, MonteCarlo, NStep, Surrogate, Trajectory

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
STATES, STEPS, SAMPLES = 6, 16, 50_000


def clip() -> None:
    """Draw two panels: a token that is better than expected, and one that is worse."""
    ratio = torch.linspace(0.05, 4.0, 800)[None]
    inputs = {"logprobs": ratio.log(), "old_logprobs": torch.zeros_like(ratio), "mask": ratio > 0}
    curves = {
        "surrogate": (Surrogate(), "0.75", "-"),
        "clip, ε = 0.2": (Clip(0.2), "tab:blue", "-"),
        "clip, ε = 0.2, ε_high = 0.5, dual = 3": (Clip(0.2, 0.5, 3.0), "tab:orange", "--"),
    }
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, advantage in zip(panels, (1.0, -1.0), strict=True):
        for label, (objective, color, style) in curves.items():
            value = -objective(advantages=torch.full_like(ratio, advantage), **inputs).loss
            panel.plot(ratio[0], value[0], color=color, linestyle=style, label=label)
        panel.axvline(1.0, color="0.85", zorder=0)
        panel.set(
            title=f"advantage {advantage:+.0f}", xlabel="ratio π(a|s) / π_old(a|s)", ylabel="objective (maximised)"
        )
    panels[0].set(xlim=(0, 2.5), ylim=(0, 2.5))
    panels[0].legend(frameon=False, loc="upper left", fontsize=8)
    figure.savefig(IMAGES / "clip.png", dpi=140)


def chain(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return transition probabilities [S, S], the reward of each transition [S, S], and values [STEPS + 1, S]."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.softmax(torch.randn(STATES, STATES, generator=g, dtype=torch.float64), -1)
    reward = 0.4 + torch.randn(STATES, STATES, generator=g, dtype=torch.float64)
    values = torch.zeros(STEPS + 1, STATES, dtype=torch.float64)
    for t in reversed(range(STEPS)):
        values[t] = (transition * (reward + values[t + 1])).sum(1)
    return transition, reward, values


def sample(transition: Tensor, reward: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Sample episodes: return states [N, STEPS + 1] and rewards [N, STEPS]."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.zeros(SAMPLES, dtype=torch.long)]
    for _ in range(STEPS):
        states.append(torch.multinomial(transition[states[-1]], 1, generator=g).squeeze(1))
    episodes = torch.stack(states, 1)
    return episodes, reward[episodes[:, :-1], episodes[:, 1:]]


def bias_and_deviation(
    estimator: AdvantageEstimator, episodes: Tensor, rewards: Tensor, critic: Tensor, values: Tensor
) -> tuple[float, float]:
    """Return bias and standard deviation of the first token's return A + V given the token, as root mean squares.

    The return is measured, not the advantage, because an error of V in the state itself shifts all advantages of that
    state equally, which does not bias the policy gradient.
    """
    time = torch.arange(STEPS)
    mask = torch.ones_like(rewards).bool()
    trajectory = Trajectory(rewards=rewards, values=critic[time, episodes[:, :-1]], mask=mask)
    returns = estimator(trajectory).returns[:, 0]
    squared_biases, variances, probabilities = [], [], []
    for token in range(STATES):
        rows = episodes[:, 1] == token
        exact = rewards[rows][0, 0] + values[1, token]
        squared_biases.append(float(returns[rows].mean() - exact) ** 2)
        variances.append(float(returns[rows].var()))
        probabilities.append(float(rows.double().mean()))
    rms = lambda squares: sum(s * p for s, p in zip(squares, probabilities, strict=True)) ** 0.5  # noqa: E731
    return rms(squared_biases), rms(variances)


def bias_variance() -> None:
    """Draw two panels, over n and over λ, with a critic that predicts half of each value."""
    transition, reward, values = chain()
    episodes, rewards = sample(transition, reward)
    critic = values / 2
    steps, lams = list(range(1, STEPS + 1)), [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for panel, x, estimators, name in (
        (panels[0], steps, [NStep(n) for n in steps], "n of NStep"),
        (panels[1], lams, [GAE(lam=lam) for lam in lams], "λ of GAE"),
    ):
        results = [bias_and_deviation(estimator, episodes, rewards, critic, values) for estimator in estimators]
        panel.plot(x, [b for b, _ in results], "o-", markersize=3, label="bias")
        panel.plot(x, [d for _, d in results], "s-", markersize=3, label="standard deviation")
        panel.plot(x, [(b**2 + d**2) ** 0.5 for b, d in results], color="0.6", linestyle=":", label="error")
        panel.set(xlabel=name)
    bias, deviation = bias_and_deviation(MonteCarlo(), episodes, rewards, critic, values)
    print(f"MonteCarlo: bias {bias:.3f}, deviation {deviation:.3f}")
    panels[0].set(ylabel="of the first token's return")
    panels[0].legend(frameon=False)
    figure.savefig(IMAGES / "bias_variance.png", dpi=140)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    clip()
    bias_variance()
