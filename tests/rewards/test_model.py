import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.rewards import RewardModel
from lit_rlhf.types import RewardInputs, Rollout

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
RESPONSES = ["w11", "w12 w13 w14 w15", "w16 w17", "w18 w19 w20"]
TERMINATED = [True, True, False, True]


def reward_inputs(tokenizer, prompts=PROMPTS) -> RewardInputs:
    """Return responses to text prompts; terminated responses end with the end-of-sequence token."""
    starts = [tokenizer(p)["input_ids"] if isinstance(p, str) else tokenizer.encode("w0") for p in prompts]
    ends = [
        tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
        for r, ended in zip(RESPONSES, TERMINATED, strict=True)
    ]
    width = max(len(s + e) for s, e in zip(starts, ends, strict=True))
    rows = [s + e + [tokenizer.pad_token_id] * (width - len(s + e)) for s, e in zip(starts, ends, strict=True)]
    lengths = torch.tensor([len(e) for e in ends])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rollout = Rollout(
        tokens=torch.tensor(rows),
        prompt_lengths=torch.tensor([len(s) for s in starts]),
        response_lengths=lengths,
        rollout_logprobs=torch.zeros(mask.shape),
        rollout_entropy=torch.zeros(mask.shape),
        response_mask=mask,
        terminated=torch.tensor(TERMINATED),
        group=torch.arange(len(rows)),
    )
    responses = [f" {response}" for response in RESPONSES]
    return RewardInputs(prompts=prompts, responses=responses, columns={}, rollout=rollout)


def conversations():
    return [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def own_scores(folder, rows) -> torch.Tensor:
    """Return the classifier's own score at each row's last token, computed one row at a time without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None  # otherwise it would search for the last token that is not padding
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def prepared(folder, tokenizer, **options) -> RewardModel:
    reward = RewardModel(str(folder), **options)
    reward.prepare(tokenizer)
    return reward


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """Return a reward model with another vocabulary: the words in reverse order, after other special tokens."""
    folder = tmp_path_factory.mktemp("other")
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in reversed(range(32))), "user", "assistant"]
    words = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config |= {"max_position_embeddings": 64, "initializer_range": 0.3}
    load_model(RandomWeights(config=config, tokenizer=str(folder)), "score").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("special", ["distinct", "pad_is_eos"])
@pytest.mark.parametrize("max_tokens", [1, 20, 16384])
@pytest.mark.parametrize("end_truncated", [True, False])
def test_score_is_the_classifiers_own_at_the_last_token(
    tiny_model, architecture, special, max_tokens, end_truncated, capsys
):
    folder = tiny_model(architecture, task="score", special=special)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = reward_inputs(tokenizer)
    rows = [t[:n].tolist() for t, n in zip(given.rollout.tokens, given.rollout.lengths, strict=True)]
    scores = prepared(folder, tokenizer, max_tokens=max_tokens, end_truncated=end_truncated)(given)
    assert [row[-1] == tokenizer.eos_token_id for row in rows] == TERMINATED
    if end_truncated:
        rows = [row if row[-1] == tokenizer.eos_token_id else [*row, tokenizer.eos_token_id] for row in rows]
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, own_scores(folder, rows), atol=1e-5, rtol=1e-5)
    assert "tokenized again" not in capsys.readouterr().out


@pytest.mark.parametrize("end_truncated", [True, False])
def test_responses_are_tokenized_again_for_another_vocabulary_with_a_message(
    tiny_model, other_model, end_truncated, capsys
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    own = AutoTokenizer.from_pretrained(other_model)
    reward = prepared(other_model, tokenizer, end_truncated=end_truncated)
    assert f"the vocabulary of {other_model} differs from the actor's" in capsys.readouterr().out
    rows = [
        own(f"{prompt} {response}")["input_ids"] + [own.eos_token_id] * (ended or end_truncated)
        for prompt, response, ended in zip(PROMPTS, RESPONSES, TERMINATED, strict=True)
    ]
    scores = reward(reward_inputs(tokenizer))
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, own_scores(other_model, rows), atol=1e-5, rtol=1e-5)


def test_a_truncated_text_ends_without_the_token_that_the_tokenizer_adds(tiny_model, other_model):
    tokenizer, own = AutoTokenizer.from_pretrained(tiny_model("llama")), AutoTokenizer.from_pretrained(other_model)
    reward = prepared(other_model, tokenizer, end_truncated=False)
    reward.retokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = [
        own(f"{prompt} {response}")["input_ids"] + [own.eos_token_id] * ended
        for prompt, response, ended in zip(PROMPTS, RESPONSES, TERMINATED, strict=True)
    ]
    torch.testing.assert_close(reward(reward_inputs(tokenizer)), own_scores(other_model, rows), atol=1e-5, rtol=1e-5)


TEMPLATES = {
    "{{ m.role }} {{ m.content }} </s> ": ("user {} </s> assistant {}", " </s>"),
    "{{ m.role }} {{ m.content }} w0 ": ("user {} w0 assistant {}", " w0 </s>"),  # another token closes a turn
    "{{ m.role }} {{ m.content.replace('w', 'w ') }} </s> ": ("user {} </s> assistant {}", " </s>"),  # changes the text
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("end_truncated", [True, False])
def test_conversations_go_through_the_other_tokenizers_chat_template(tiny_model, other_model, template, end_truncated):
    """What the template writes after a response belongs to complete responses, and those that count as complete."""
    tokenizer, own = AutoTokenizer.from_pretrained(tiny_model("llama")), AutoTokenizer.from_pretrained(other_model)
    reward = prepared(other_model, tokenizer, end_truncated=end_truncated)
    reward.retokenizer.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
    opening, closing = TEMPLATES[template]
    texts = [
        opening.format(prompt, response) + closing * (terminated or end_truncated)
        for prompt, response, terminated in zip(PROMPTS, RESPONSES, TERMINATED, strict=True)
    ]
    if "replace" in template:
        texts = [text.replace("w", "w ") for text in texts]
    rows = [own(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [row[-1] == own.eos_token_id for row in rows] == [ended or end_truncated for ended in TERMINATED]
    scores = reward(reward_inputs(tokenizer, conversations()))
    torch.testing.assert_close(scores, own_scores(other_model, rows), atol=1e-5, rtol=1e-5)


def test_conversations_need_a_chat_template(tiny_model, other_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    reward = prepared(other_model, tokenizer)
    with pytest.raises(UserError, match=r"rewards.model.*chat template"):
        reward(reward_inputs(tokenizer, conversations()))


def test_the_model_is_frozen(tiny_model):
    folder = tiny_model("llama", task="score")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = prepared(folder, tokenizer)
    assert list(reward.parameters())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.model.modules())
    assert not reward(reward_inputs(tokenizer)).requires_grad


def test_models_that_do_not_give_a_single_score(tiny_model, tmp_path):
    folder = tiny_model("llama", task="score")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rewards.model.*one label.*3"):
        prepared(tmp_path, AutoTokenizer.from_pretrained(folder))
    with pytest.raises(UserError, match=r"rewards.model.*/nowhere does not exist"):
        prepared(tmp_path / "nowhere", AutoTokenizer.from_pretrained(folder))


def test_scores_are_normalised_by_those_of_the_training_set(tiny_model, tmp_path):
    folder = tiny_model("llama", task="score")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.score_mean, model.config.score_std = 0.25, 4.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain, normalised = RewardModel(str(tmp_path)), RewardModel(str(tmp_path), normalize=True)
    for reward in (plain, normalised):
        reward.prepare(tokenizer)
    done = reward_inputs(tokenizer)
    torch.testing.assert_close(normalised(done), (plain(done) - 0.25) / 4.0)
    without = RewardModel(str(folder), normalize=True)
    with pytest.raises(
        UserError, match=r"^rewards\.normalize: .* has no score_mean and score_std in its config\.json$"
    ):
        without.prepare(tokenizer)
