"""The pictures of docs/algorithms.md, computed by the package's own estimators and objectives.

    pip install -e ".[benchmarks]" && python benchmarks/plots.py

*clip.png*: the clipped objective of one token against its ratio, for an advantage of either sign.
*bias_variance.png*: bias and standard deviation of the estimators over n and λ, on a Markov chain whose values are
known exactly, with a critic that is wrong in a known way.
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
    """Two panels: a token that was better than expected, and one that was worse."""
    ratio = torch.linspace(0.05, 4.0, 800)[None]
    terms = {"logprobs": ratio.log(), "old_logprobs": torch.zeros_like(ratio), "mask": ratio > 0}
    shown = {
        "surrogate": (Surrogate(), "0.75", "-"),
        "clip, ε = 0.2": (Clip(0.2), "tab:blue", "-"),
        "clip, ε = 0.2, ε_high = 0.5, dual = 3": (Clip(0.2, 0.5, 3.0), "tab:orange", "--"),
    }
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, advantage in zip(panels, (1.0, -1.0), strict=True):
        for label, (objective, color, style) in shown.items():
            value = -objective(advantages=torch.full_like(ratio, advantage), **terms)
            panel.plot(ratio[0], value[0], color=color, linestyle=style, label=label)
        panel.axvline(1.0, color="0.85", zorder=0)
        panel.set(
            title=f"advantage {advantage:+.0f}", xlabel="ratio π(a|s) / π_old(a|s)", ylabel="objective (maximised)"
        )
    panels[0].set(xlim=(0, 2.5), ylim=(0, 2.5))
    panels[0].legend(frameon=False, loc="upper left", fontsize=8)
    figure.savefig(IMAGES / "clip.png", dpi=140)


def chain(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Transition probabilities [S, S], rewards of each step [S, S], values [STEPS + 1, S] of the policy."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.softmax(torch.randn(STATES, STATES, generator=g, dtype=torch.float64), -1)
    reward = 0.4 + torch.randn(STATES, STATES, generator=g, dtype=torch.float64)
    values = torch.zeros(STEPS + 1, STATES, dtype=torch.float64)
    for t in reversed(range(STEPS)):
        values[t] = (transition * (reward + values[t + 1])).sum(1)
    return transition, reward, values


def sample(transition: Tensor, reward: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """States [N, STEPS + 1] and rewards [N, STEPS]."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.zeros(SAMPLES, dtype=torch.long)]
    for _ in range(STEPS):
        states.append(torch.multinomial(transition[states[-1]], 1, generator=g).squeeze(1))
    walk = torch.stack(states, 1)
    return walk, reward[walk[:, :-1], walk[:, 1:]]


def measure(
    estimator: AdvantageEstimator, walk: Tensor, rewards: Tensor, critic: Tensor, values: Tensor
) -> tuple[float, float]:
    """Bias and deviation of the first token's return A + V, given the token: root mean squares over the tokens.

    The return and not the advantage: a wrong V of the state itself moves all its advantages alike, which does not bias
    the policy's gradient.
    """
    time = torch.arange(STEPS)
    trajectory = Trajectory(rewards=rewards, values=critic[time, walk[:, :-1]], mask=torch.ones_like(rewards).bool())
    found = estimator(trajectory).returns[:, 0]
    biases, variances, shares = [], [], []
    for following in range(STATES):
        chosen = walk[:, 1] == following
        exact = rewards[chosen][0, 0] + values[1, following]
        biases.append(float(found[chosen].mean() - exact) ** 2)
        variances.append(float(found[chosen].var()))
        shares.append(float(chosen.double().mean()))
    weigh = lambda squares: sum(s * p for s, p in zip(squares, shares, strict=True)) ** 0.5  # noqa: E731
    return weigh(biases), weigh(variances)


def bias_variance() -> None:
    """Over n on the left, over λ on the right; the critic has learned half of each value so far."""
    transition, reward, values = chain()
    walk, rewards = sample(transition, reward)
    critic = values / 2
    steps, lams = list(range(1, STEPS + 1)), [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for panel, at, estimators, name in (
        (panels[0], steps, [NStep(n) for n in steps], "n of NStep"),
        (panels[1], lams, [GAE(lam=lam) for lam in lams], "λ of GAE"),
    ):
        found = [measure(estimator, walk, rewards, critic, values) for estimator in estimators]
        panel.plot(at, [b for b, _ in found], "o-", markersize=3, label="bias")
        panel.plot(at, [d for _, d in found], "s-", markersize=3, label="standard deviation")
        panel.plot(at, [(b**2 + d**2) ** 0.5 for b, d in found], color="0.6", linestyle=":", label="error")
        panel.set(xlabel=name)
    most = measure(MonteCarlo(), walk, rewards, critic, values)
    print(f"MonteCarlo: bias {most[0]:.3f}, deviation {most[1]:.3f}")
    panels[0].set(ylabel="of the first token's return")
    panels[0].legend(frameon=False)
    figure.savefig(IMAGES / "bias_variance.png", dpi=140)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    clip()
    bias_variance()
