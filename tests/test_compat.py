"""One test for each assumption of `lit_rlhf.compat` about other libraries; no other module makes such assumptions."""

import abc
import argparse
import ast
import errno
import importlib
import inspect
import logging
import os
import re
import sys
import typing
import warnings
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import datasets
import jsonargparse
import lightning
import preloaded
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import lit_rlhf
from lit_rlhf import Averaging, compat

PACKAGE = Path(lit_rlhf.__file__).parent
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "limit_train_batches": 4,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
}


@contextmanager
def contract(library: str, relied_on: str):
    """Report every failure in this block under the name of the library."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{library}: {relied_on} no longer holds ({type(error).__name__}: {error})")


# torch


class Sharded(BoringModel):
    """A model that is sharded over one process and trained for four steps."""

    def configure_model(self):
        if not isinstance(self.layer, torch.distributed.fsdp.FSDPModule):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


@pytest.fixture(scope="module")
def distributed_checkpoint(tmp_path_factory):
    """Return a checkpoint folder written by Lightning's FSDP2 strategy, and the weights in it."""
    folder = tmp_path_factory.mktemp("run") / "last.ckpt"
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    module = Sharded()
    trainer = lightning.Trainer(strategy=strategy, default_root_dir=folder.parent, **QUIET)
    try:
        trainer.fit(module)
        trainer.save_checkpoint(folder)
        yield folder, {name: value.full_tensor() for name, value in module.state_dict().items()}
    finally:
        torch.distributed.destroy_process_group()


def test_torch_reads_a_distributed_checkpoint_in_one_process(distributed_checkpoint):
    folder, weights = distributed_checkpoint
    with contract("torch", "torch.distributed.checkpoint has _EmptyStateDictLoadPlanner and _load_state_dict"):
        found = compat.read_distributed_checkpoint(folder)["state_dict"]
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_torch_multiplies_by_weights_in_blocks():
    with contract("torch", "torch.ops.mkldnn has _reorder_linear_weight and _linear_pointwise"):
        x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
        found = compat.multiply_by_blocks(compat.block_weight(weight, 3), bias, x)
        torch.testing.assert_close(found, nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_torch_limits_the_variants_of_a_compiled_function():
    with contract("torch", "torch._dynamo.config.recompile_limit is the number of variants of a compiled function"):
        import torch._dynamo.config as options

        for limit, allowed in ((8, 3), (2, 3)):
            with options.patch(recompile_limit=limit):
                compat.allow_variants(allowed)
                assert options.recompile_limit == max(limit, allowed)


def test_torch_computes_shapes_without_memory():
    with contract("torch", "FakeTensorMode, with autocast, and storages that die with their tensors"):
        seen, died = [], []
        with compat.tensors_without_memory(), compat.watch_results(seen.append):
            weight = torch.zeros(2**20, 2**20, requires_grad=True)  # 4 TiB
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = torch.zeros(1, 2**20) @ weight
            result.sum().backward()
        assert (result.shape, result.dtype, weight.grad.shape) == ((1, 2**20), torch.bfloat16, weight.shape)
        assert any(x.shape == weight.shape and x.dtype == torch.bfloat16 for x in seen)
        storage = result.untyped_storage()
        assert storage is result[:, :1].untyped_storage()
        assert storage.nbytes() == 2 * 2**20
        weakref.finalize(storage, died.append, True)
        seen.clear()
        del storage, result
        assert died == [True]


def test_torch_hooks_into_the_forward_passes_of_fsdp2(distributed_checkpoint):
    with contract("torch", "FSDP2's hooks are methods of its state, and its forward methods are set on the module"):
        module = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        register_fsdp_forward_method(module, "extra_repr")
        before = [*module._forward_pre_hooks, *module._forward_hooks, *vars(module)]
        assert "extra_repr" in before
        with compat.without_forward_hooks(module, ["extra_repr", "another"]):
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
            assert "extra_repr" not in vars(module)
        assert [*module._forward_pre_hooks, *module._forward_hooks, *vars(module)] == before


def test_torch_reports_a_lost_gloo_peer(tmp_path):
    program = """if True:
        import os, sys, time, torch
        from torch import distributed
        rank = int(os.environ["RANK"])
        distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
        distributed.barrier()
        if rank == 1:
            time.sleep(0.5)
            os._exit(0)
        distributed.recv(torch.ones(1), src=1)
    """
    (tmp_path / "program.py").write_text(program)
    said = preloaded.torchrun(2, str(tmp_path / "program.py"), str(tmp_path / "meeting"))[0].stderr
    with contract("torch", "waiting for a gloo peer that dies raises RuntimeError with the first phrase of LOST_PEER"):
        assert "RuntimeError: " in said
        assert compat.LOST_PEER[0] in said, said


def test_the_system_reports_a_connection_reset():
    with contract("gloo", "it passes on the system's message of ECONNRESET"):
        assert os.strerror(errno.ECONNRESET) in compat.LOST_PEER


def test_torch_gives_meta_tensors_memory_and_keeps_ties():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2, device="meta"))
    model[1].weight = model[0].weight
    model.register_buffer("known", torch.ones(3))
    with contract("torch", "Module._apply swaps parameters, so that tied ones stay tied, and keeps what has a value"):
        compat.materialize(model, torch.device("cpu"))
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model[1].weight is model[0].weight
        assert model.known.tolist() == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_nccl_reports_a_lost_peer():
    import ctypes

    try:
        nccl = ctypes.CDLL("libnccl.so.2")
    except OSError:
        pytest.skip("this torch contains NCCL, but not as a separate library")
    with contract("NCCL", "ncclGetErrorString(ncclRemoteError) contains a phrase of LOST_PEER"):
        text = nccl.ncclGetErrorString
        text.restype = ctypes.c_char_p
        assert any(phrase in text(6).decode() for phrase in compat.LOST_PEER), text(6)


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.9 does not warn")
def test_torch_warns_about_leaf_specs():
    from torch.utils import _pytree

    with contract("torch", "LeafSpec() warns with LEAF_SPEC_WARNING"):
        with pytest.warns(FutureWarning) as caught:
            _pytree.LeafSpec()
        assert any(re.match(compat.LEAF_SPEC_WARNING, str(warning.message)) for warning in caught)


def test_attribute_in_which_ddp_looks_for_what_it_leaves_out():
    with contract("torch", "the name _ddp_params_and_buffers_to_ignore"):
        assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(nn.parallel.DistributedDataParallel)


# Lightning


def test_lightning_names_the_parts_of_a_distributed_checkpoint(distributed_checkpoint):
    folder, _ = distributed_checkpoint
    with contract("lightning", "a distributed checkpoint has METADATA_FILE, and the keys state_dict and optimizer_0"):
        assert (folder / compat.METADATA_FILE).is_file()
        assert compat.read_distributed_checkpoint(folder).keys() == {"state_dict", "optimizer_0"}


def test_lightning_knows_whether_validation_is_due(tmp_path):
    class Watch(Callback):
        said, done = [], []

        def on_train_batch_end(self, trainer, *args):
            self.said.append(compat.validation_is_due(trainer))
            self.done.append(False)

        def on_validation_end(self, *args):
            self.done[-1] = True

    with contract("lightning", "the loops of Trainer.fit have _should_check_val_fx and _data_fetcher"):
        watch = Watch()
        lightning.Trainer(callbacks=[watch], val_check_interval=2, default_root_dir=tmp_path, **QUIET).fit(
            BoringModel()
        )
        assert watch.said == watch.done == [False, True, False, True]


def test_lightning_refuses_a_long_interval_with_this_message(tmp_path):
    with contract("lightning", "its refusal of val_check_interval begins with LONG_VAL_CHECK_INTERVAL"):
        trainer = lightning.Trainer(val_check_interval=100, default_root_dir=tmp_path, **QUIET)
        with pytest.raises(ValueError, match=rf"^\s*{re.escape(compat.LONG_VAL_CHECK_INTERVAL)}"):
            trainer.fit(BoringModel())


def test_a_lightning_module_has_no_trainer_before_the_run():
    module, trainer = BoringModel(), lightning.Trainer(**QUIET)
    with contract("lightning", "LightningModule.trainer raises RuntimeError without a Trainer"):
        assert compat.strategy_of(module) is None
        module.trainer = trainer
        assert compat.strategy_of(module) is trainer.strategy


def test_lightning_blocks_the_synchronization_of_gradients():
    with contract("lightning", "DDPStrategy.block_backward_sync is a context"):
        assert inspect.unwrap(DDPStrategy.block_backward_sync).__name__ == "block_backward_sync"
        strategy = DDPStrategy()
        strategy.model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(strategy.model)
        strategy.model.require_backward_grad_sync = True
        with compat.no_gradient_sync(strategy):
            assert not strategy.model.require_backward_grad_sync


def test_lightning_reads_the_data_parallel_size_when_the_processes_start():
    with contract("lightning", "ModelParallelStrategy has _data_parallel_size, num_nodes and num_processes"):
        strategy = ModelParallelStrategy(tensor_parallel_size=1)
        assert strategy._data_parallel_size == "auto"
        strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
        compat.shard_over_all_processes(strategy)
        assert strategy._data_parallel_size == 6
        assert "self._data_parallel_size" in inspect.getsource(ModelParallelStrategy.setup_environment)


def test_lightning_keeps_the_device_of_a_module():
    with contract("lightning", "LightningModule.device returns _device"):
        module = BoringModel()
        compat.set_device(module, torch.device("meta"))
        assert module.device.type == "meta"
        assert module.layer.weight.device.type == "cpu"


def test_lightning_advertises_with_these_messages(caplog, monkeypatch, tmp_path):
    with contract("lightning", "its messages to ADVERTISING_LOGGERS begin with ADVERTISEMENTS"):
        for name in compat.ADVERTISING_LOGGERS:
            logger = logging.getLogger(name)
            monkeypatch.setattr(logger, "propagate", True)
            monkeypatch.setattr(logger, "filters", [])  # of the command, if an earlier test ran it in this process
            caplog.set_level("INFO", logger=name)
        monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
        trainer = lightning.Trainer(**{**QUIET, "logger": True, "default_root_dir": tmp_path})
        trainer.fit(BoringModel())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        said = [record.getMessage() for record in caplog.records if record.name in compat.ADVERTISING_LOGGERS]
        unseen = [start for start in compat.ADVERTISEMENTS if not any(text.startswith(start) for text in said)]
        assert unseen == []


def test_lightning_warns_with_these_messages(monkeypatch, tmp_path):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.trainer.connectors.logger_connector import result
    from lightning.pytorch.utilities.data import has_len_all_ranks

    class LogsInEpochs(BoringModel):
        def on_validation_epoch_end(self):
            self.log("value", 1.0)

    module = BoringModel()
    module.layer.eval()
    monkeypatch.setattr(sys, "argv", ["command", "word"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)  # as on a larger machine
    with (
        contract("lightning", "it warns with INAPPLICABLE_WARNINGS"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        LightningCLI(BoringModel, args=["--trainer.accelerator=cpu"], run=False, save_config_callback=None)
        trainer = lightning.Trainer(default_root_dir=tmp_path, **QUIET)
        trainer.fit(module)
        has_len_all_ranks([], trainer.strategy)
        monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
        lightning.Trainer(default_root_dir=tmp_path, **QUIET).validate(LogsInEpochs(), verbose=False)
        said = [str(warning.message) for warning in caught]
        unseen = [w for w in compat.INAPPLICABLE_WARNINGS if not any(re.match(w, text) for text in said)]
        assert unseen == []


# argparse and jsonargparse


class AdvantageEstimator(abc.ABC):
    @abc.abstractmethod
    def estimate(self): ...


class Constant(AdvantageEstimator):
    def __init__(self, value: float = 0.0, count: int | None = None, kind: typing.Literal["a", "b"] = "a"):
        self.value = value

    def estimate(self): ...


def refusal(*words: str) -> str:
    """Return jsonargparse's error message for these words of the command ``fit``."""
    fit = jsonargparse.ArgumentParser(exit_on_error=False)
    fit.add_argument("--estimator", type=AdvantageEstimator)
    fit.add_argument("--optimizer", type=typing.Callable[[Iterable], torch.optim.Optimizer])
    fit.add_argument("--limit", type=int, required=True)
    fit.add_argument("--averaging", type=Averaging | None)
    fit.add_class_arguments(Constant, "trainer")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subcommands().add_subcommand("fit", fit)
    with pytest.raises(jsonargparse.ArgumentError) as error:
        parser.parse_args(list(words))
    return str(error.value)


def test_argparse_and_jsonargparse_list_the_options():
    with contract("argparse", "ArgumentParser has _actions"):
        assert [action.dest for action in argparse.ArgumentParser()._actions] == ["help"]
    with contract("jsonargparse", "ArgumentParser has argparse's _actions, and _subcommands_action with choices"):
        fit, parser = jsonargparse.ArgumentParser(), jsonargparse.ArgumentParser()
        fit.add_argument("-l", "--limit")
        assert compat.option_names(fit) == ["help", "limit"]
        parser.add_argument("--config")
        parser.add_subcommands().add_subcommand("fit", fit)
        assert compat.option_names(parser) == ["help", "config", "limit"]


def test_integers_are_read_as_integers():
    with contract("jsonargparse", "the actions of a parser have _typehint, which the parsing of a value reads"):
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--limit", type=float | int | None)
        assert isinstance(parser.parse_args(["--limit", "1"]).limit, float)
        compat.prefer_integers(parser)
        assert isinstance(parser.parse_args(["--limit", "1"]).limit, int)
        assert parser.parse_args(["--limit", "0.5"]).limit == 0.5
        assert parser.parse_args(["--limit", "null"]).limit is None


CONSTANT = ("fit", "--estimator", f"{__name__}.Constant")
SGD = ("fit", "--optimizer", "torch.optim.SGD")


@pytest.mark.parametrize(
    ("pattern", "words", "found"),
    [
        ("PARSER_KEY", (*CONSTANT, "--estimator.count", "x"), ["estimator", "count"]),
        ("REFUSED_CLASS", (*CONSTANT, "--estimator.count", "x"), [f"{__name__}.Constant"]),
        ("REFUSED_CALLABLE", (*SGD, "--optimizer.lrr", "1"), ["torch.optim.SGD"]),
        ("UNKNOWN_CLASS", ("fit", "--estimator", "Const"), ["Const"]),
        ("OPTIONS_OR_NULL", ("fit", "--averaging", "x"), ["lit_rlhf.modules.averaging.Averaging"]),
        ("ABSTRACT_CLASS", ("fit", '--estimator={"value": 1}'), [f"{__name__}.AdvantageEstimator"]),
        ("MISSING_OPTION", ("fit",), ["fit.limit"]),
        ("UNKNOWN_COMMAND", ("fti",), [("fti", "'fit'")]),
        ("CHOICE_EXPECTED", (*CONSTANT, "--estimator.kind", "c"), [("'a', 'b'", "c")]),
        ("TYPE_EXPECTED", ("fit", "--limit", "x"), [("int", "x")]),
        ("UNION_MEMBER", (*CONSTANT, "--estimator.count", "x"), ["int", "NoneType"]),
        ("GIVEN_VALUE", (*CONSTANT, "--estimator.count", "x"), ["x"]),
    ],
)
def test_jsonargparse_refuses_values_with_these_messages(pattern, words, found):
    with contract("jsonargparse", f"its message about {' '.join(words)} matches {pattern}"):
        said = refusal(*words)
        assert getattr(compat, pattern).findall(said) == found, said


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((*CONSTANT, "--estimator.values", "1"), "values"),
        (("fit", "--limt", "1", "--limit", "1"), "limt"),
        (("fit", "--limit", "1", '--trainer={"values": 1}'), "trainer.values"),
    ],
)
def test_jsonargparse_refuses_unknown_options_with_these_messages(words, name):
    with contract("jsonargparse", f"its message about {' '.join(words)} matches one of UNKNOWN_OPTION"):
        said = refusal(*words)
        found = next(filter(None, (pattern.search(said) for pattern in compat.UNKNOWN_OPTION)), None)
        assert found is not None, said
        assert found["name"] == name, said


def test_jsonargparse_refuses_options_of_a_group_with_these_messages():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Constant, "trainer")
    with contract("jsonargparse", "its message about an unknown option of a group matches the first of UNKNOWN_OPTION"):
        with pytest.raises(jsonargparse.ArgumentError) as error:
            parser.parse_args(['--trainer={"values": 1}'])
        assert compat.UNKNOWN_OPTION[0].search(str(error.value)).group("group", "name") == ("trainer", "values")


@pytest.mark.parametrize("words", [(*CONSTANT, "--estimator.count", "x"), (*SGD, "--optimizer.lr", "fast")])
def test_jsonargparse_puts_the_message_among_remarks(words):
    with contract("jsonargparse", "the lines that do not match REMARK begin with WRONG_TYPE"):
        lines = [line.strip(" -") for line in refusal(*words).splitlines()]
        informative = [line for line in lines if line and not compat.REMARK.match(line)]
        assert informative
        assert all(line.startswith(compat.WRONG_TYPE) for line in informative), informative


# transformers


@pytest.fixture
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"))


def test_transformers_names_the_attention_of_a_model(model):
    with contract("transformers", "config._attn_implementation is what set_attn_implementation set"):
        model.set_attn_implementation("eager")
        assert compat.attention_of(model.config) == "eager"
        model.set_attn_implementation("sdpa")
        assert compat.attention_of(model.config) == "sdpa"


def test_transformers_says_whether_the_attention_can_be_set(model):
    from transformers import BloomConfig, BloomForCausalLM

    with contract("transformers", "PreTrainedModel._can_set_attn_implementation tells architectures apart"):
        bloom = BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=8))
        assert [compat.attention_can_be_set(m) for m in (model, bloom)] == [True, False]


def test_transformers_names_the_decoder_layers(model):
    with contract("transformers", "PreTrainedModel._no_split_modules names the decoder layers"):
        assert type(model.model.layers[0]).__name__ in compat.decoder_layer_names(model)


# bitsandbytes


def test_the_layout_without_a_backward_pass_can_be_turned_off():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu").eval()
    with contract("bitsandbytes", "the attribute support_avx512bf16_for_cpu of a 4-bit layer"):
        assert hasattr(layer, "support_avx512bf16_for_cpu")
        compat.keep_4_bit_layout(layer)
        with torch.no_grad():
            layer(torch.ones(1, 64))
        x = torch.ones(1, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


# peft


def test_peft_selects_adapters_without_training_others(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with contract("peft", "LoRA layers read _active_adapter and _disable_adapters in each forward pass"):
        for name in ("first", "second"):
            inject_adapter_in_model(config, model, name)
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        layer, x = layers[0], torch.randn(1, 3, 32)
        base, alone = layer.get_base_layer()(x), {}
        for names in (["first"], ["second"], [], ["first", "second"]):
            compat.select_adapters(layers, names)
            assert all(compat.selected_adapters(layer) == tuple(names) for layer in layers)
            alone[tuple(names)] = layer(x) - base
        assert not alone[()].any()
        both = alone["first",] + alone["second",]
        torch.testing.assert_close(alone["first", "second"], both, atol=1e-5, rtol=1e-5)
        assert alone["first",].abs().max() > 1e-3
        assert not torch.allclose(alone["first",], alone["second",])
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_peft_does_not_cast_shared_inputs():
    from peft import LoraConfig, inject_adapter_in_model

    with contract("peft", "LoRA layers read cast_input_dtype_enabled before they cast their input"):
        model = inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 4))
        )
        seen: list[torch.dtype] = []
        model[0].lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        for share in (False, True):
            if share:
                compat.share_inputs([model[0]])
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.ones(1, 4, dtype=torch.bfloat16))
        assert seen == [torch.float32, torch.bfloat16]


# datasets


def test_datasets_reports_a_file_without_records(tmp_path):
    (tmp_path / "empty.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match="data") as raised:
        datasets.load_dataset("csv", data_files=str(tmp_path / "empty.csv"), split="train", cache_dir=str(tmp_path))
    with contract("datasets", f"load_dataset raises {compat.NO_RECORDS!r} for a file without records"):
        assert compat.NO_RECORDS in str(raised.value)


# the other modules do not rely on private names


SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "compat.py" and "configs" not in path.parts
)
IN_THE_STANDARD_LIBRARY = {"_current_frames", "_exit", "_replace"}  # documented members of sys, os and named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def names_defined(tree: ast.AST) -> set[str]:
    """Return the functions, classes, variables and attributes that a file defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def names_used(tree: ast.AST) -> set[str]:
    """Return the private attributes that a file reads or sets, also by a string, and the private names it imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_rlhf"):
            found.update([*(node.module or "").split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            found.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return {name for name in found if is_private(name)}


def test_private_names_of_other_libraries_are_used_only_in_compat():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    defined = set().union(*map(names_defined, trees.values())) | IN_THE_STANDARD_LIBRARY
    used = {str(path.relative_to(PACKAGE)): names_used(tree) - defined for path, tree in trees.items()}
    assert {path: names for path, names in used.items() if names} == {}


def test_no_private_method_of_another_library_is_overridden():
    found = []
    for path in SOURCES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        for _, cls in inspect.getmembers(module, inspect.isclass):
            foreign = [base for base in cls.__mro__ if not base.__module__.startswith("lit_rlhf")]
            methods = [name for name, value in vars(cls).items() if is_private(name) and inspect.isfunction(value)]
            if cls.__module__ == module.__name__:
                found += [f"{cls.__name__}.{m}" for m in methods if any(m in vars(base) for base in foreign)]
    assert found == []
