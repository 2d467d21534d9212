"""Models that are built without weights and placed on their devices before their weights are read from files.

Each process reads only the part of each tensor that it holds, so no process needs memory for the whole of a sharded
model, or for a second copy of any weight.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.compat import materialize
from lit_rlhf.models.quantization import has_quantized_layers

WEIGHT_FILES = "model*.safetensors"
PROBE_VOCABULARY = 16


class Location(NamedTuple):
    """The place of a tensor: a module and an attribute's name. Sharding replaces the tensor, but not the place."""

    module: nn.Module
    attribute: str

    def tensor(self) -> Tensor:
        """Return the tensor that the attribute holds now, detached from the autograd graph."""
        return getattr(self.module, self.attribute).detach()


class UnreadWeights:
    """The files of the models that were built within `unread_weights`, and where the files' tensors belong in them.

    >>> from tempfile import TemporaryDirectory
    >>> from lit_rlhf.models.loading import load_model
    >>> from lit_rlhf.testing import make_tiny_model
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_tiny_model(folder)
    ...     with unread_weights() as unread:
    ...         model = load_model(folder)
    ...     on_meta = {parameter.is_meta for parameter in model.parameters()}
    ...     unread.read(model, torch.device("cpu"))
    >>> on_meta, {parameter.is_meta for parameter in model.parameters()}
    ({True}, {False})
    """

    def __init__(self) -> None:
        self._files: list[tuple[Path, dict[str, Location]]] = []

    def add(self, model: nn.Module, folder: Path) -> bool:
        """Remember where the tensors of a folder's safetensors files belong in a model.

        Args:
            model: The model, with parameters on the meta device.
            folder: The folder of the files.

        Returns:
            Whether the files hold every parameter, under its name and in its shape; if not, nothing is remembered.
        """
        shapes = tensor_shapes(folder)
        locations: dict[str, Location] = {}
        found: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in found:  # tied: read under its first name only
                continue
            if shapes.get(name) == tensor.shape:
                locations[name] = _location(model, name)
                found.add(id(tensor))
            elif name in shapes:
                return False
        complete = all(id(parameter) in found for parameter in model.parameters())
        if complete:
            self._files.append((folder, locations))
        return complete

    def read_now(self, module: nn.Module) -> None:
        """Read the weights of one module of the model that was added last, before that model is sharded.

        Args:
            module: The module; only its own tensors are read, not those of its submodules.
        """
        folder, locations = self._files[-1]
        for name, location in list(locations.items()):
            if location.module is module:
                weight = nn.Parameter(_read_tensor(folder, name).to(location.tensor().dtype))
                setattr(module, location.attribute, weight)
                del locations[name]

    def read(self, model: nn.Module, device: torch.device) -> None:
        """Allocate memory for a model, which is already sharded or stays whole, and read its weights from the files.

        Each process reads alone, without collective operations: since each process decides for itself whether a model's
        weights are read here or by transformers, it cannot rely on the other processes to take part.

        Args:
            model: The model; parts that no file holds, such as adapters, keep their values.
            device: The device of this process's part of the model.
        """
        if has_quantized_layers(model):  # all its weights have been read, and bitsandbytes' weights cannot be swapped
            model.to(device)
            return
        materialize(model, device)
        for folder, locations in self._files:
            tensors = {name: location.tensor() for name, location in locations.items()}
            # a head that the model leaves out is still on the meta device
            here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is intended
                load(here, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


_unread: ContextVar[UnreadWeights | None] = ContextVar("unread", default=None)


@contextmanager
def unread_weights() -> Iterator[UnreadWeights]:
    """Make `load_model` build models from files without reading their weights, where possible, inside this context.

    The context yields the object that reads the weights later. Weights are loaded immediately if they are random or
    quantized, if safetensors files do not hold them under the names and in the shapes of the model's parameters, if the
    head of a sequence classifier is not a linear layer named ``score``, or if the model cannot be built on the meta
    device.
    """
    unread = UnreadWeights()
    token = _unread.set(unread)
    try:
        yield unread
    finally:
        _unread.reset(token)


@contextmanager
def weights_at_once() -> Iterator[None]:
    """Make `load_model` read weights immediately inside this context, even within `unread_weights`."""
    token = _unread.set(None)
    try:
        yield
    finally:
        _unread.reset(token)


def current_unread_weights() -> UnreadWeights | None:
    """Return the active context's `UnreadWeights`; None outside of `unread_weights` or inside `weights_at_once`."""
    return _unread.get()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters, but not the buffers, of new modules on the meta device (without memory), inside this context.

    ``torch.device("meta")`` would also discard the values of buffers, such as the frequencies of rotary embeddings.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied parameter stays the same one
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook: Callable[..., Any] = to_meta  # torch's annotation leaves out the result, which replaces the parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def local_folder(path: str) -> Path:
    """Return a model's local folder; for a hub id, download its JSON and safetensors files if they are not cached."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=["*.json", WEIGHT_FILES]))


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the shapes of all tensors in a folder's safetensors files, by name; the tensors are not read."""
    shapes = {}
    for path in sorted(folder.glob(WEIGHT_FILES)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = torch.Size(file.get_slice(name).get_shape())
    return shapes


def first_layers(config: PretrainedConfig, count: int) -> Any:
    """Return a copy of a model's configuration with only the first ``count`` decoder layers."""
    shorter: Any = deepcopy(config)
    for name, value in list(vars(shorter).items()):
        if isinstance(value, list) and len(value) == shorter.num_hidden_layers:  # one entry for each layer
            setattr(shorter, name, value[:count])
    shorter.num_hidden_layers = count
    return shorter


def with_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose weights have values, for testing how the architecture of the given model computes.

    This is the given model itself if its weights have been read. Otherwise, it is a small model of the same class with
    random float32 weights: its layers have the same shapes as the given model's layers, but there are only as many of
    the first layers as are needed to include every type of layer, and the vocabulary has 16 tokens.

    Args:
        model: The given model, some of whose parameters may be on the meta device.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model
    types = getattr(model.config, "layer_types", None) or ["layer"]
    config = first_layers(model.config, max(types.index(kind) for kind in types) + 1)
    config.vocab_size, config.pad_token_id = PROBE_VOCABULARY, None
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(config).eval()


def _read_tensor(folder: Path, name: str) -> Tensor:
    for path in folder.glob(WEIGHT_FILES):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a mapping)
                return file.get_tensor(name)
    raise KeyError(name)


def _location(model: nn.Module, name: str) -> Location:
    path, _, attribute = name.rpartition(".")
    return Location(model.get_submodule(path), attribute)
