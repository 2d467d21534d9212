"""Models that are built without weights, placed, and then filled from their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf import UserError
from lit_rlhf.models import weights
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapted import load_adapted
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import RandomWeights, load_model
from lit_rlhf.models.scoring import load_critic, load_reward_model
from lit_rlhf.models.unpadded import is_unpadded
from lit_rlhf.models.weights import unread_weights, with_weights

CPU = torch.device("cpu")


def read_later(build):
    with unread_weights() as unread:
        model = build()
    unread.read(model, CPU)
    return model


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


BUILDS = {
    "actor": ("causal", lambda folder: Actor(load_model(folder))),
    "shared critic": ("causal", lambda folder: Actor(load_model(folder), shared_critic=True)),
    "new critic": ("causal", load_critic),
    "reward model": ("score", load_reward_model),
    "adapted actor": (
        "causal",
        lambda folder: Actor(load_adapted(folder, LoRA(), "actor", trained=["actor", "critic"])),
    ),
}


@pytest.mark.parametrize("role", BUILDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_weights_read_later_are_the_same(tiny_model, architecture, role):
    task, build = BUILDS[role]
    folder = str(tiny_model(architecture, task=task))
    with unread_weights() as unread:
        model = build(folder)
    heads = ("head.weight", "head.bias", "value_head.weight", "value_head.bias")
    kept = {name for name, _ in model.named_parameters() if name in heads or ".lora_" in name}
    assert all(parameter.is_meta == (name not in kept) for name, parameter in model.named_parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    unread.read(model, CPU)
    assert_same(model, build(folder))


def test_a_critic_that_has_a_bias(tiny_model, tmp_path):
    model = load_model(str(tiny_model("llama", task="score")), "score")
    model.config.value_bias = 0.25
    model.save_pretrained(tmp_path)
    critic = read_later(lambda: load_critic(str(tmp_path)))
    assert critic.head.bias.item() == 0.25
    assert_same(critic, load_critic(str(tmp_path)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(tiny_model, tmp_path, architecture):
    config = {"model_type": architecture, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = RandomWeights(config=config | {"tie_word_embeddings": True}, tokenizer=str(tiny_model()))
    load_model(source).save_pretrained(tmp_path)
    model = read_later(lambda: load_model(str(tmp_path)))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(model, load_model(source))


def test_a_hub_id_is_downloaded_without_other_formats(tiny_model, monkeypatch):
    """The files of other libraries (consolidated.safetensors, pytorch_model.bin) would double the download."""
    folder, asked = tiny_model(), []
    monkeypatch.setattr(
        weights, "snapshot_download", lambda *words, **options: asked.append((words, options)) or folder
    )
    assert weights.local_folder("Qwen/Qwen2.5-0.5B") == folder
    assert asked == [(("Qwen/Qwen2.5-0.5B",), {"allow_patterns": ["*.json", "model*.safetensors"]})]


def test_files_in_half_precision_and_in_several_parts(tiny_model, tmp_path):
    load_model(str(tiny_model())).bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = read_later(lambda: load_model(str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(model, load_model(str(tmp_path)))


def test_generation_config_is_read(tiny_model, tmp_path):
    model = load_model(str(tiny_model()))
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    assert read_later(lambda: load_model(str(tmp_path))).generation_config.eos_token_id == [1, 7]


def test_files_with_other_names_are_loaded_at_once(tiny_model, tmp_path):
    """Transformers renames tensors of some files; such files cannot be read later."""
    folder = tiny_model("llama", task="score")
    weights = load_file(folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(
        {n.removeprefix("model."): w for n, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with unread_weights():
        model = load_model(str(tmp_path), "score")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_same(model, load_model(str(folder), "score"))


def test_a_wrong_shape_is_refused_as_ever(tiny_model, tmp_path):
    folder = tiny_model("llama")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with unread_weights(), pytest.raises(UserError, match=r"has shape \[32, 48\]; by its config.json"):
        load_model(str(tmp_path))


def test_random_weights_are_made_at_once(tiny_model):
    source = RandomWeights(
        config={"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1}, tokenizer=str(tiny_model())
    )
    assert_same(read_later(lambda: load_model(source)), load_model(source))


@pytest.mark.parametrize(
    ("config", "unpadded"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "bloom"}, False),  # ALiBi
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"] * 2}, True),
    ],
)
def test_the_attention_is_chosen_without_the_weights(tiny_model, tmp_path, config, unpadded):
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "n_layer": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 16}
    model = load_model(RandomWeights(config=shape | config, tokenizer=str(tiny_model())))
    model.save_pretrained(tmp_path)
    with unread_weights():
        unread = Actor(load_model(str(tmp_path))).model
    assert is_unpadded(unread.base_model) == is_unpadded(model.base_model) == unpadded
    tried = with_weights(unread)
    assert len(list(tried.base_model.modules())) < len(list(model.base_model.modules()))
    assert tried.get_input_embeddings().num_embeddings == 16
