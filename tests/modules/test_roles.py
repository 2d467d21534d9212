import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.modules.roles import RoleSources, load_roles
from lit_rlhf.rewards import RewardModel


def test_a_critic_from_a_normalised_reward_model_has_its_units(tiny_model, tmp_path):
    folder = tiny_model("llama", task="score")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.score_mean, model.config.score_std = 3.0, 0.5
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), weight=2.0, normalize=True)
    sources = RoleSources(
        actor=str(tiny_model("llama")), critic="reward", reference=None, temperature=1.0, rewards=[reward]
    )
    roles = load_roles(sources, prepare=lambda: reward.prepare(tokenizer))
    tokens = torch.tensor([[2, 6, 7, 8, 1]])
    torch.testing.assert_close(roles.critic(tokens), 2.0 * (reward.model(tokens) - 3.0) / 0.5, atol=1e-4, rtol=1e-4)
