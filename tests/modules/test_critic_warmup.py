import itertools

import lightning
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from lit_rlhf import GAE, TRPO, AdaptiveKL, KLPenalty, Update, UserError
from lit_rlhf.testing import Recorder


def adam(parameters):
    """Return AdamW with weight decay, which would also move weights whose gradient is 0."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class Weights(lightning.Callback):
    """Keeps copies of the weights of the actor and the critic, from the start and from after each iteration."""

    def __init__(self):
        self.actor, self.critic = [], []

    def on_train_start(self, trainer, pl_module):
        for kept, model in ((self.actor, pl_module.actor), (self.critic, pl_module.critic)):
            kept.append(parameters_to_vector(model.parameters()).detach().clone())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("trpo", [False, True])
def test_the_actor_keeps_its_weights_while_the_critic_warms_up(trpo, make_module, fit):
    weights, update = Weights(), Update(epochs=1, minibatches=2, critic_warmup=2)
    module = make_module(update=update, iterations=3, actor_optimizer=adam, critic_optimizer=adam)
    if trpo:
        options = {"actor": module.source, "rewards": list(module.scores.rewards), "sampling": module.sampling}
        module = TRPO(**options, update=update, iterations=3, critic_optimizer=adam)
    fit(module, [weights])
    assert [torch.equal(*pair) for pair in itertools.pairwise(weights.actor)] == [True, True, False]
    assert [torch.equal(*pair) for pair in itertools.pairwise(weights.critic)] == [False, False, False]


def test_coefficients_that_adapt_to_the_kl_wait_for_the_actor(make_module, fit):
    """While the actor does not move, its KL to the old policy is 0, which says nothing about the coefficients."""
    recorder, update = Recorder(), Update(epochs=1, minibatches=2, critic_warmup=2)
    controller = AdaptiveKL(coef=0.2, target=1.0, horizon=100)
    module = make_module(update=update, iterations=3, objective=KLPenalty(), kl=controller, actor_optimizer=adam)
    betas, beta = [], module.objective.beta
    fit(module, [recorder, Betas(betas)])
    assert betas[:2] == [beta, beta]
    assert betas[2] != beta
    assert [metrics["objective/kl_coef"] for metrics in recorder.metrics] == [pytest.approx(0.2)] * 3
    assert module.kl.coef != 0.2


class Betas(lightning.Callback):
    """Adds the coefficient of the KL penalty after each iteration to a list."""

    def __init__(self, betas):
        self.betas = betas

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.betas.append(pl_module.objective.beta)


@pytest.mark.parametrize("critic", [None, "shared"])
def test_only_a_critic_with_its_own_weights_is_warmed_up(critic, make_module):
    message = r"^model\.update\.critic_warmup is 1, but the critic has no weights of its own"
    with pytest.raises(UserError, match=message):
        make_module(critic=critic, advantages=GAE(), update=Update(critic_warmup=1))
