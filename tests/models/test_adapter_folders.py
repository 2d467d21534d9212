"""Folders of adapters: what peft writes is read here, what is written here is read by peft."""

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted, load_adapted_reward_model
from lit_rlhf.models.adapter_folders import base_of, find_adapter, read_adapter
from lit_rlhf.models.adapters import LoRA, adapted_layers, adapter_parameters
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel, load_critic, load_reward_model
from lit_rlhf.models.trained_adapter import TrainedAdapter
from lit_rlhf.models.weights import unread_weights
from lit_rlhf.modules.adapted_roles import AdaptedRoles
from lit_rlhf.modules.roles import RoleSources

TOKENS = torch.tensor([[2, 6, 7, 8, 9, 1], [2, 9, 10, 11, 12, 13]])
MASK = torch.arange(6).expand(2, 6) > 0
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def logprobs(model):
    """Return the log-probability of each next token by a model of transformers or peft, [B, S - 1]."""
    with torch.no_grad():
        found = model(input_ids=TOKENS).logits.log_softmax(-1)[:, :-1]
    return found.gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def ours(model):
    with torch.no_grad():
        return Actor(model)(TOKENS, MASK).logprobs[:, 1:]


def by_peft(folder, task="causal"):
    auto, labels = (AutoModelForCausalLM, {}) if task == "causal" else (AutoModelForSequenceClassification, {})
    if task == "score":
        labels = {"num_labels": 1, "pad_token_id": 0}
    return PeftModel.from_pretrained(auto.from_pretrained(base_of(str(folder)), **labels), folder).eval()


def scores(model):
    """Return the score of the last token by a sequence classifier, [B]."""
    with torch.no_grad():
        return model(input_ids=TOKENS).logits[:, 0]


VARIANTS = [
    ("llama", {}),
    ("llama", {"use_rslora": True}),
    ("llama", {"use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 9}}),
    ("gpt2", {"fan_in_fan_out": True}),
    ("qwen2", {}),
    ("gpt_neox", {}),
]


@pytest.mark.parametrize(("architecture", "options"), VARIANTS, ids=lambda value: str(value))
def test_an_adapter_of_peft_is_read(tiny_adapter, tiny_model, architecture, options):
    """Merged, as a frozen adapter below a new one, and merged below a new one."""
    folder = tiny_adapter(architecture, **options)
    expected = logprobs(by_peft(folder))
    assert (expected - logprobs(load_model(str(tiny_model(architecture))))).abs().max() > 0.01
    torch.testing.assert_close(ours(load_model(str(folder))), expected, **CLOSE)
    assert not adapted_layers(load_model(str(folder)))
    if "use_dora" in options:
        return
    stacked = load_adapted(str(folder), LoRA(rank=2), "model.actor", trained=["actor"])
    torch.testing.assert_close(ours(stacked), expected, **CLOSE)
    assert adapter_parameters(stacked, "source")
    merged = load_adapted(str(folder), LoRA(rank=2, chained="merged"), "model.actor", trained=["actor"])
    torch.testing.assert_close(ours(merged), expected, **CLOSE)
    assert not adapter_parameters(merged, "source")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_reward_adapter_of_peft_is_read(tiny_adapter, architecture):
    folder = str(tiny_adapter(architecture, task="score", scale=(1.5, 2.0)))
    expected = scores(by_peft(folder, "score"))
    reward, critic = load_reward_model(folder), load_critic(folder)
    further = load_adapted_reward_model(folder, LoRA(rank=2), "model.reward")
    for model in (reward, critic, further):
        torch.testing.assert_close(model(TOKENS)[:, -1], expected, **CLOSE)
    assert reward.scale == (1.5, 2.0)
    assert {name for name, p in further.named_parameters() if p.requires_grad} == further.own_parameters().keys()


def test_the_base_and_the_tokenizer_are_found(tiny_adapter, tiny_model):
    folder = tiny_adapter()
    assert base_of(str(folder)) == str(tiny_model())
    assert find_adapter(str(folder)) == str(folder / "adapter_config.json")
    assert find_adapter(str(tiny_model())) is None
    assert not (folder / "tokenizer_config.json").exists()
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(tiny_model())).get_vocab()


def trained(source, lora, name="actor", head=None, seed=5, **options):
    """Return an adapter as a run would have trained it, with random weights, and the model as the run sees it."""
    model = load_adapted(source, lora, "model.actor", trained=[name])
    numbers = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=numbers)
    weights = {key: p.detach() for key, p in adapter_parameters(model, name).items()}
    return TrainedAdapter(source=source, lora=lora, name=name, weights=weights, head=head, **options), model


QV = ["q_proj", "v_proj"]
CHAINS = {
    "base": (None, LoRA(rank=4)),
    "rslora": (None, LoRA(rank=4, rslora=True)),
    "dora": (None, LoRA(rank=4, dora=True)),
    "partly targeted": (None, LoRA(rank=4, target_modules=QV)),
    "stacked": ({}, LoRA(rank=4)),
    "merged": ({}, LoRA(rank=4, chained="merged")),
    "fewer layers on all": ({}, LoRA(rank=2, target_modules=QV)),
    "all layers on fewer": ({"target_modules": QV}, LoRA(rank=2)),
    "other layers": ({"target_modules": ["down_proj"]}, LoRA(rank=2, target_modules=QV)),
    "patterns below": ({"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 9}}, LoRA(rank=2)),
    "rslora on rslora": ({"use_rslora": True}, LoRA(rank=2, rslora=True)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_an_exported_adapter_is_read_by_peft(tiny_adapter, tiny_model, tmp_path, chain):
    below, lora = CHAINS[chain]
    source = str(tiny_model()) if below is None else str(tiny_adapter(**below))
    adapter, model = trained(source, lora)
    expected, tokenizer = ours(model), load_tokenizer(source)
    adapter.save(tokenizer, tmp_path / "adapter", "card")
    found = by_peft(tmp_path / "adapter")
    assert found.peft_config["default"].base_model_name_or_path == str(tiny_model())
    torch.testing.assert_close(logprobs(found), expected, **CLOSE)
    torch.testing.assert_close(ours(load_model(str(tmp_path / "adapter"))), expected, **CLOSE)
    whole = adapter.merged(tokenizer)
    whole.save_pretrained(tmp_path / "whole")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logprobs(alone), expected, **CLOSE)
    assert not list((tmp_path / "whole").glob("adapter*"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_every_architecture_is_exported(tiny_adapter, tmp_path, architecture):
    source = str(tiny_adapter(architecture))
    adapter, model = trained(source, LoRA(rank=2))
    adapter.save(load_tokenizer(source), tmp_path, "card")
    torch.testing.assert_close(logprobs(by_peft(tmp_path)), ours(model), **CLOSE)


@pytest.mark.parametrize("below", ["base", "source", "reward"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_exported_head_survives(tiny_adapter, tiny_model, tmp_path, below, bias):
    """A reward model or critic, on the base, on an SFT adapter, or on a reward adapter in the place of it."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1, bias=bias)
    source = str(tiny_model() if below == "base" else tiny_adapter(seed=1))
    start = read_adapter(str(tiny_adapter(task="score")), "model.critic") if below == "reward" else None
    twin = str(tiny_adapter(task="score")) if below == "reward" else source
    _, model = trained(twin, LoRA(rank=2), "critic")
    weights = {key: p.detach() for key, p in adapter_parameters(model, "critic").items()}
    adapter = TrainedAdapter(
        source=source, lora=LoRA(rank=2), name="critic", weights=weights, below=start, head=head, scale=(0.5, 2.0)
    )
    expected = ScalarModel(model.base_model, head)(TOKENS)[:, -1].detach()
    tokenizer = load_tokenizer(source)
    adapter.save(tokenizer, tmp_path / "adapter", "card")
    found = by_peft(tmp_path / "adapter", "score")
    value_bias = json.loads((tmp_path / "adapter" / "config.json").read_text()).get("value_bias", 0.0)
    assert (value_bias != 0) is bias
    torch.testing.assert_close(scores(found) + value_bias, expected, **CLOSE)
    adapter.merged(tokenizer).save_pretrained(tmp_path / "whole")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(scores(alone) + getattr(alone.config, "value_bias", 0.0), expected, **CLOSE)
    for folder in ("adapter", "whole"):
        again = load_reward_model(str(tmp_path / folder))
        torch.testing.assert_close(again(TOKENS)[:, -1], expected, **CLOSE)
        assert again.scale == (0.5, 2.0)


@pytest.fixture
def copied(tiny_adapter, tmp_path):
    """Return a copy of an adapter's folder, to be damaged."""
    shutil.copytree(tiny_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


def damage(folder, kind):
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    first = min(weights)
    if kind == "no base":
        config["base_model_name_or_path"] = None
    elif kind == "a missing base":
        config["base_model_name_or_path"] = "./nowhere"
    elif kind == "another kind":
        config = {"peft_type": "IA3", "base_model_name_or_path": config["base_model_name_or_path"]}
    elif kind == "other shapes":
        weights[first] = torch.zeros(7, 9)
    elif kind == "a weight missing":
        del weights[first]
    elif kind == "a weight too many":
        weights[first.replace("layers.0", "layers.7")] = weights[first].clone()
    elif kind == "no weights":
        (folder / "adapter_model.safetensors").unlink()
        return
    (folder / "adapter_config.json").write_text("{" if kind == "no JSON" else json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("chained", [None, "stacked", "merged"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no base", "names no base model"),
        ("a missing base", r"\./nowhere does not exist"),
        ("another kind", "IA3.*only LoRA is supported"),
        ("other shapes", "does not fit LlamaForCausalLM of .*size mismatch"),
        ("a weight missing", "does not fit LlamaForCausalLM of .*lora_"),
        ("a weight too many", "does not fit LlamaForCausalLM of .*layers.7"),
        ("no weights", "cannot be read"),
        ("no JSON", "adapter"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(copied, kind, message, chained):
    damage(copied, kind)
    load = partial(load_adapted, lora=LoRA(rank=2, chained=chained), trained=["actor"]) if chained else load_model
    with pytest.raises(UserError, match=message) as raised:
        load(str(copied), field="model.actor")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(("model.actor: ", str(copied)))


@pytest.mark.parametrize("chained", ["stacked", "merged"])
@pytest.mark.parametrize(("below", "dora"), [({"use_dora": True}, False), ({}, True)])
def test_dora_is_alone(tiny_adapter, below, dora, chained):
    with pytest.raises(UserError, match=r"model\.actor: DoRA cannot be combined with another adapter; first merge"):
        load_adapted(str(tiny_adapter(**below)), LoRA(dora=dora, chained=chained), "model.actor", trained=["actor"])


def test_dora_of_another_role_is_whole_if_the_base_is_read_later(tiny_adapter, tiny_model):
    """As on a GPU and with fsdp2, where the base's weights are read after all adapters have been added."""
    saved = {"reward0": read_adapter(str(tiny_adapter(use_dora=True)), "rewards.model")}
    make = partial(load_adapted, str(tiny_model("llama")), LoRA(rank=2), "model.actor", trained=["actor"], saved=saved)
    at_once = make()
    with unread_weights() as unread:
        later = make()
    unread.read(later, torch.device("cpu"))
    expected = dict(at_once.named_parameters())
    magnitudes = [name for name in expected if "lora_magnitude_vector.reward0" in name]
    assert len(magnitudes) == len(adapted_layers(at_once))
    for name, parameter in later.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(("below", "dora"), [({"use_dora": True}, False), ({}, True)])
def test_a_critic_above_dora_is_refused(tiny_adapter, tiny_model, below, dora):
    start = str(tiny_adapter(task="score", **below))
    sources = {"actor": str(tiny_model("llama")), "reference": None, "temperature": 1.0, "adapter": LoRA(dora=dora)}
    with pytest.raises(UserError, match=r"model\.critic: DoRA cannot be combined with another adapter, here "):
        AdaptedRoles(RoleSources(critic=start, **sources), LoRA(dora=dora))


def test_an_adapter_without_a_head_is_no_reward_model(tiny_adapter):
    with pytest.raises(UserError, match=r"rewards\.model: the adapter .* has no head: it is not a reward model"):
        load_reward_model(str(tiny_adapter()), "rewards.model")
