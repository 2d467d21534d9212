import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import RandomWeights, load_model, load_tokenizer, read_config

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
FIELD = "model.actor"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """Return a function that copies a tiny model's folder without some files and with changes to its config.json."""

    def copy(architecture="llama", without=(), config=None, **options):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_model(architecture, **options), folder, ignore=shutil.ignore_patterns(*without))
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | (config or {})))
        return folder

    return copy


@pytest.fixture
def random_weights(tiny_model):
    return lambda seed=0, **config: RandomWeights(config=SHAPE | config, tokenizer=str(tiny_model()), seed=seed)


def one_line_error(load, *said):
    """Check that the load fails with a one-line message that begins with the field and contains all of these words."""
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(FIELD)
    assert "\n" not in message
    for part in said:
        assert re.search(part, message), message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("special", ["distinct", "bos_is_eos", "pad_is_eos"])
def test_tokenizer_of_a_folder(tiny_model, architecture, special):
    tokenizer = load_tokenizer(str(tiny_model(architecture, special=special)))
    bos, eos, pad = (1 if special == "bos_is_eos" else 2), 1, (1 if special == "pad_is_eos" else 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (bos, eos, pad)
    assert tokenizer("w0 w31").input_ids == [bos, 6, 37]
    assert len(tokenizer) == 38


def saved_tokenizer(folder, **special):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padding_token_falls_back_to_the_end_of_sequence(copied):
    tokenizer = load_tokenizer(saved_tokenizer(copied(), pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_tokenizer_without_end_of_sequence(copied):
    folder = saved_tokenizer(copied(), eos_token=None)
    one_line_error(lambda: load_tokenizer(folder, FIELD), folder, "eos_token")


def test_tokenizer_of_a_function(tiny_model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"def make():\n    return PreTrainedTokenizerFast.from_pretrained({str(tiny_model())!r})\n"
    )
    source = RandomWeights(config=SHAPE, tokenizer=f"{tmp_path}/mine.py:make")
    assert load_tokenizer(source)("w0").input_ids == [2, 6]
    assert load_model(source).config.vocab_size == 38
    broken = RandomWeights(config=SHAPE, tokenizer=f"{tmp_path}/mine.py:none")
    one_line_error(lambda: load_tokenizer(broken, FIELD), "no function 'none'", "make")


@pytest.mark.parametrize("load", [load_tokenizer, load_model, read_config])
def test_missing_folder(load, tmp_path):
    one_line_error(lambda: load(f"{tmp_path}/none", field=FIELD), f"{tmp_path}/none does not exist")
    (tmp_path / "file").touch()
    one_line_error(lambda: load(f"{tmp_path}/file", field=FIELD), f"{tmp_path}/file is a file")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_without_tokenizer(copied, architecture):
    folder = str(copied(architecture, without=["tokenizer*", "special_tokens*"]))
    one_line_error(lambda: load_tokenizer(folder, FIELD), folder, "has no tokenizer")


def test_folder_without_weights(copied):
    folder = str(copied(without=["*.safetensors"]))
    one_line_error(lambda: load_model(folder, field=FIELD), folder, "no weights")


def test_folder_with_broken_weights(copied):
    folder = copied()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    one_line_error(lambda: load_model(str(folder), field=FIELD), str(folder))


@pytest.mark.parametrize("config", [{"intermediate_size": 64}, {"num_hidden_layers": 3, "layer_types": None}])
def test_weights_that_do_not_match_the_configuration(copied, config):
    folder = str(copied(config=config))
    one_line_error(lambda: load_model(folder, field=FIELD), folder)


@pytest.mark.parametrize("load", [load_model, read_config])
def test_folder_with_an_unknown_or_missing_configuration(copied, tmp_path, load):
    folder = str(copied(config={"model_type": "llamma"}))
    one_line_error(lambda: load(folder, field=FIELD), folder, "llamma")
    (tmp_path / "empty").mkdir()
    one_line_error(lambda: load(f"{tmp_path}/empty", field=FIELD), f"{tmp_path}/empty has no config.json")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_with_two_labels(copied, architecture):
    folder = copied(architecture, config={"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}})
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    classifier.save_pretrained(folder)
    one_line_error(lambda: load_model(str(folder), "score", FIELD), str(folder), "one label", "has 2")


def test_one_label_in_the_weights_and_two_in_the_configuration(copied):
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    folder = str(copied(task="score", config=labels))
    one_line_error(lambda: load_model(folder, "score", FIELD), folder)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_language_model_is_not_a_reward_model(copied, architecture, labels):
    names = {str(i): f"label {i}" for i in range(labels)}
    folder = str(copied(architecture, config={"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}))
    one_line_error(lambda: load_model(folder, "score", FIELD), folder)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gpt2"])  # its head is its embedding
def test_a_reward_model_is_not_a_language_model(tiny_model, architecture):
    folder = str(tiny_model(architecture, task="score"))
    one_line_error(lambda: load_model(folder, field=FIELD), folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", ["causal", "score"])
def test_model_of_a_folder(tiny_model, tmp_path, architecture, task):
    folder = str(tiny_model(architecture, task=task))
    model = load_model(folder, task)
    assert not any(module.training for module in model.modules())
    model.bfloat16().save_pretrained(tmp_path)
    again = load_model(str(tmp_path), task)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.state_dict(), {k: v.float() for k, v in model.state_dict().items()})


def test_random_weights_depend_on_the_seed_only(random_weights):
    first = load_model(random_weights()).state_dict()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    second, other = load_model(random_weights()).state_dict(), load_model(random_weights(seed=1)).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.parametrize("task", ["causal", "score"])
def test_random_weights_fit_their_tokenizer(random_weights, task):
    config = load_model(random_weights(), task).config
    assert config.vocab_size == 38
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)
    given = load_model(random_weights(vocab_size=64, eos_token_id=5), task)
    assert given.config.vocab_size == given.get_input_embeddings().num_embeddings == 64
    assert (given.config.bos_token_id, given.config.eos_token_id, given.config.pad_token_id) == (2, 5, 0)


def test_random_reward_model_has_one_label(random_weights):
    model = load_model(random_weights(), "score")
    assert not model.training
    assert model(torch.tensor([[2, 6, 7]])).logits.shape == (1, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llamma"}, "llamma"),
        ({}, "model_type is missing"),
        (SHAPE | {"hidden_size": 15}, "15"),
        ({"model_type": "t5"}, "language model"),
    ],
    ids=["unknown type", "no type", "sizes that do not fit", "no decoder"],
)
def test_random_weights_of_a_bad_configuration(tiny_model, config, said):
    source = RandomWeights(config=config, tokenizer=str(tiny_model()))
    one_line_error(lambda: load_model(source, field=FIELD), rf"^{FIELD}\.config: ", said)
