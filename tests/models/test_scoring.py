import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.scoring import freeze, load_critic, load_reward_model, to_classifier
from lit_rlhf.types import shared_beginnings

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
TOKENS = torch.randint(6, 38, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([7, 4, 1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("load", [load_reward_model, load_critic])
def test_equals_the_classifier_of_transformers(tiny_model, architecture, load):
    folder = str(tiny_model(architecture, task="score"))
    classifier, scores = load_model(folder, "score"), load(folder)(TOKENS)
    assert scores.shape == TOKENS.shape
    assert scores.dtype == torch.float32
    for t in range(TOKENS.shape[1]):
        torch.testing.assert_close(scores[:, t], classifier(TOKENS[:, : t + 1]).logits[:, 0], atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_critic_from_a_language_model_starts_at_0_and_learns(tiny_model, architecture):
    folder = str(tiny_model(architecture))
    critic = load_critic(folder)
    values = critic(TOKENS)
    assert (values == 0).all()
    trunk = load_model(folder).base_model.state_dict()
    torch.testing.assert_close(critic.trunk.state_dict(), trunk)
    values.sum().backward()
    assert critic.head.weight.grad.abs().sum() > 0
    assert critic.head.bias.grad == TOKENS.numel()


def test_a_critic_with_random_weights(tiny_model):
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    assert (load_critic(RandomWeights(config=config, tokenizer=str(tiny_model())))(TOKENS) == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_result_does_not_depend_on_the_padding(tiny_model, architecture):
    model = load_reward_model(str(tiny_model(architecture, task="score")))
    real = torch.arange(7) < LENGTHS[:, None]
    first, second = (model(torch.where(real, TOKENS, padding))[real] for padding in (0, 37))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_beginning_changes_no_score(tiny_model, architecture):
    tokens = torch.randint(6, 38, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[1:3, :7] = tokens[0, :7]
    ends = torch.tensor([12, 9, 7, 10])  # the third text is the beginning alone
    shared = shared_beginnings(tokens, ends, torch.tensor([0, 0, 0, 1]))
    assert shared.tolist() == [0, 7, 7, 0]
    results = []
    for once in (None, shared):
        model = load_reward_model(str(tiny_model(architecture, task="score")))
        scores = torch.where(torch.arange(12) < ends[:, None], model(tokens, ends, once), 0.0)
        (scores * (1 + torch.arange(48).view(4, 12) / 48)).mean().backward()
        results.append((scores.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("task", "bias"), [("causal", None), ("causal", 0.5), ("score", None)])
def test_a_scalar_model_as_a_classifier_of_transformers(tiny_model, architecture, task, bias, tmp_path):
    folder = str(tiny_model(architecture, task=task))
    tokenizer, scalar = AutoTokenizer.from_pretrained(folder), load_critic(folder, bias=bias is not None)
    if task == "causal":
        torch.nn.init.normal_(scalar.head.weight, generator=torch.Generator().manual_seed(0))
    if bias is not None:
        torch.nn.init.constant_(scalar.head.bias, bias)
    classifier = to_classifier(scalar, tokenizer)
    assert not classifier.training
    assert classifier.config.num_labels == 1
    classifier.save_pretrained(tmp_path)
    assert classifier.config.architectures == [type(classifier).__name__]
    real = torch.arange(7) < LENGTHS[:, None]
    padded = torch.where(real, TOKENS, tokenizer.pad_token_id)
    scores = scalar(padded).gather(1, LENGTHS[:, None] - 1)
    assert scores.std() > 0.1
    for model in (classifier, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        expected = scores - (bias or 0.0)  # transformers' classifiers have no bias; it is kept in the configuration
        assert getattr(model.config, "value_bias", None) == bias
        torch.testing.assert_close(model(padded).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(padded, attention_mask=real.long()).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_reward_model(str(tmp_path))(padded), scalar(padded), atol=1e-6, rtol=1e-6)


def test_a_classifier_is_a_copy(tiny_model):
    folder = str(tiny_model("llama"))
    scalar = load_critic(folder)
    before = {name: weight.clone() for name, weight in scalar.state_dict().items()}
    classifier = to_classifier(scalar, AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.add_(1.0)
    classifier.config.score_mean = 3.0
    assert all(torch.equal(weight, before[name]) for name, weight in scalar.state_dict().items())
    assert not hasattr(scalar.trunk.config, "score_mean")


def test_freeze(tiny_model):
    model = load_reward_model(str(tiny_model(task="score"))).train()
    assert freeze(model) is model
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_classifier_without_a_linear_score_head(tiny_model):
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"^model\.critic: BertForSequenceClassification .*score"):
        load_reward_model(RandomWeights(config=config, tokenizer=str(tiny_model())), "model.critic")


@pytest.mark.parametrize("load", [load_reward_model, load_critic])
def test_errors_name_the_field(load, tmp_path):
    with pytest.raises(UserError, match=rf"^rewards\.0\.model: .*{tmp_path}/none does not exist"):
        load(f"{tmp_path}/none", "rewards.0.model")
