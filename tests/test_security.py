"""What docs/security.md says: nothing in a model, a checkpoint or a record is executed, and no key is stored."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from torch.distributed.checkpoint.metadata import Metadata

import lit_rlhf
from lit_rlhf import RemoteReward, VLLMEngine
from lit_rlhf.checkpoint_folders import CHECKSUMS, checksum, write_checksums
from lit_rlhf.checkpoints import AnyCheckpoint, read_checkpoint
from lit_rlhf.data.prompts import PromptEncoder
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_model, load_tokenizer
from lit_rlhf.rewards.chat import ChatEndpoint

PACKAGE = Path(lit_rlhf.__file__).parent
EXECUTED = "executed"


class Evil:
    """An object whose unpickling makes a folder in the working folder."""

    def __reduce__(self):
        return Path.mkdir, (Path(EXECUTED),)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Work in an empty folder, in which nothing may be executed."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / EXECUTED).exists()


def test_the_evil_object_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / EXECUTED).exists()


@pytest.fixture
def model(inside, tiny_model):
    shutil.copytree(tiny_model("llama"), inside / "model")
    (inside / "model" / "own.py").write_text("from pathlib import Path\nPath('executed').mkdir()\n")
    return inside / "model"


def with_fields(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(load) -> str:
    with pytest.raises(UserError) as error:
        load()
    return str(error.value)


def test_the_code_of_a_tokenizer_is_not_executed(model, capfd):
    with_fields(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert "lit-rlhf never executes" in refusal(lambda: load_tokenizer("./model", "model.actor"))
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_the_code_of_a_model_is_not_executed(model, capfd):
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    with_fields(model / "config.json", model_type="own", auto_map=classes)
    message = refusal(lambda: load_model("./model", "causal", "model.actor"))
    assert message.startswith("model.actor: ./model")
    assert "lit-rlhf never executes" in message
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_the_weights_of_a_model_are_not_executed(model):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model / "pytorch_model.bin")
    assert "model.actor" in refusal(lambda: load_model("./model", "causal", "model.actor"))


@pytest.mark.parametrize("read", [read_checkpoint, AnyCheckpoint().load_checkpoint])
def test_a_checkpoint_file_is_not_executed(inside, read):
    torch.save({"state_dict": {}, "callbacks": Evil()}, inside / "last.ckpt")
    with pytest.raises((pickle.UnpicklingError, UserError)):
        read(inside / "last.ckpt")


METADATA = ".metadata"


def with_checksums(folder):
    """Give a checkpoint folder the right checksums, as somebody who wants its code to run would do."""
    names = [path.name for path in folder.iterdir() if path.name != CHECKSUMS]
    write_checksums(folder, {name: checksum(folder / name) for name in names})
    return folder


@pytest.fixture
def folder(inside):
    """Return a checkpoint folder as several processes write it."""
    folder = inside / "last.ckpt"
    optimizer = {
        "state": {"w": {"step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"], "foreach": None}],
    }
    state = {"state_dict": {"w": torch.ones(2), "b": torch.ones(3).bfloat16()}, "optimizer_0": optimizer}
    distributed.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.6.0"}, folder / "meta.pt")
    return with_checksums(folder)


def test_a_checkpoint_folder_is_read(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint["state_dict"]["w"].tolist() == [1.0, 1.0]
    assert checkpoint["epoch"] == 3


def test_the_list_of_a_folder_is_not_executed(folder):
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.planner_data = Evil()
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert "its index names pathlib.Path.mkdir" in refusal(lambda: read_checkpoint(with_checksums(folder)))


def test_no_attribute_of_a_class_in_the_list_is_reached(folder):
    """A name with dots would lead from an allowed class to everything else."""
    name = b"Metadata.__init__.__globals__"
    module = Metadata.__module__.encode()
    text = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
    (folder / METADATA).write_bytes(text)
    assert "Metadata.__init__" in refusal(lambda: read_checkpoint(with_checksums(folder)))


def test_the_parts_of_a_folder_are_not_executed(folder):
    shutil.rmtree(folder)
    distributed.save({"state_dict": {"w": torch.ones(2), "evil": Evil()}}, checkpoint_id=folder, no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.0"}, folder / "meta.pt")
    assert "could run code" in refusal(lambda: read_checkpoint(with_checksums(folder)))


def test_a_folder_names_no_file_outside(folder):
    metadata = pickle.loads((folder / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert "names the file ../secret outside" in refusal(lambda: read_checkpoint(with_checksums(folder)))


def test_the_rest_of_a_folder_is_not_executed(folder):
    torch.save({"callbacks": Evil()}, folder / "meta.pt")
    with pytest.raises((pickle.UnpicklingError, UserError)):
        read_checkpoint(folder)


def calls(path):
    """Yield the names of the calls in a file, and their keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "testing"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_of_the_package_reads_code(path):
    """Pickles go only to and from the worker processes that the run starts, and through the restricted unpickler."""
    own = {"generation/worker.py": "pickle.loads", "generation/workers.py": "pickle.loads"}
    for name, options in calls(path):
        text = {option: ast.unparse(value) for option, value in options.items()}
        if name == "torch.load":
            assert "weights_only" in text
        if name in ("pickle.load", "pickle.loads", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"):
            assert own.get(path.relative_to(PACKAGE).as_posix()) == name
        if name.rpartition(".")[2] in ("from_pretrained", "from_config") and ("Auto" in name or "_tokenizer" in name):
            assert text["trust_remote_code"] == "False"
        assert text.get("trust_remote_code", "False") == "False"
        assert text.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("url", ["http://me:swordfish@judge:8000/v1", "https://judge/v1?api_key=swordfish"])
@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda url: ChatEndpoint(url, "large"), "rewards.endpoint.base_url"),
        (RemoteReward, "rewards.url"),
        (lambda url: VLLMEngine(url=url), "model.engine.url"),
    ],
)
def test_an_address_with_a_password_is_refused(url, make, option):
    message = refusal(lambda: make(url))
    assert message.startswith(f"{option} must not contain a password")
    assert "swordfish" not in message


def test_a_field_with_a_key_is_refused():
    body = {"chat_template_kwargs": {"enable_thinking": False}, "max_completion_tokens": 9}
    ChatEndpoint("http://judge/v1", "large", extra_body=body)
    message = refusal(lambda: ChatEndpoint("http://judge/v1", "large", extra_body={"x": {"api_key": "swordfish"}}))
    assert "extra_body must not contain api_key" in message
    assert "swordfish" not in message


@pytest.mark.parametrize("value", ["{answer}", "{0.__class__}", "%s {}", "{{ 7 * 7 }}"])
def test_a_value_of_a_record_is_not_a_template(value):
    record = {"question": value, "answer": "secret", "extra": {"topic": value}}
    encoder = PromptEncoder(template="Q: {question} T: {extra.topic}")
    assert encoder.prompt(record, "record 1") == f"Q: {value} T: {value}"


@pytest.mark.parametrize("template", ["{question.__class__}", "{question[0].__class__}", "{extra.__class__.mro}"])
def test_a_template_reads_no_attributes(template):
    with pytest.raises(UserError, match=r"data\.template"):
        PromptEncoder(template=template).prompt({"question": "w1", "extra": {"topic": "w2"}}, "record 1")
