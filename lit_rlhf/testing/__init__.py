"""Tools for tests with pytest: tiny models and data, a recorder of a run, and assertions about parts of one's own.

The module is a pytest plugin, so its fixtures are available wherever lit-rlhf is installed: ``tiny_model``,
``tiny_tokenizer``, ``tiny_prompts``, ``tiny_preferences`` and ``tiny_demonstrations``. Every pytest session imports the
module, whatever it tests; torch and Lightning are therefore imported only at their first use. ::

    from lit_rlhf.testing import assert_exact_resume, assert_learns, tiny_ppo

    def test_my_reward():
        assert_learns(tiny_ppo([MyReward()]), by=0.3)
        assert_exact_resume(lambda: tiny_ppo([MyReward()]))
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from lit_rlhf.testing.gradients import assert_gradient_matches as assert_gradient_matches
    from lit_rlhf.testing.learning import assert_learns as assert_learns
    from lit_rlhf.testing.ranks import assert_same_on_ranks as assert_same_on_ranks
    from lit_rlhf.testing.recorder import Recorder as Recorder
    from lit_rlhf.testing.resuming import assert_exact_resume as assert_exact_resume
    from lit_rlhf.testing.runs import tiny_data as tiny_data
    from lit_rlhf.testing.runs import tiny_ppo as tiny_ppo

_LAZY = {
    "Recorder": "recorder",
    "assert_exact_resume": "resuming",
    "assert_gradient_matches": "gradients",
    "assert_learns": "learning",
    "assert_same_on_ranks": "ranks",
    "tiny_data": "runs",
    "tiny_ppo": "runs",
}
"""The names that are imported at their first use, and the modules in which they are."""

Architecture = Literal["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
Special = Literal["distinct", "bos_is_eos", "pad_is_eos"]
MakeModel = Callable[..., Path]

WORDS = 32
"""The number of words w0 … w31 in the tiny models' tokenizer; each word is one token."""
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "max_position_embeddings": 128},
}  # fmt: skip
_SHAPES["qwen2"] = _SHAPES["llama"]
_SHAPES["qwen3"] = _SHAPES["llama"] | {"head_dim": 8}


def make_tiny_model(
    folder: Path,
    architecture: Architecture = "llama",
    task: Literal["causal", "score"] = "causal",
    special: Special = "distinct",
    seed: int = 0,
    chat: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """Write a model with about 20,000 random weights (GPT-2: 30,000) and its tokenizer to a folder.

    The weights are large, so that the logits differ enough for greedy responses to end at different lengths.

    Args:
        folder: The folder to write.
        architecture: The ``model_type`` of the model.
        task: ``causal`` for a language model, ``score`` for a sequence classifier with one label.
        special: ``distinct`` for different BOS, EOS and padding tokens; ``bos_is_eos`` or ``pad_is_eos`` to use the EOS
            token as the BOS or the padding token as well.
        seed: The seed of the weights.
        chat: Whether the tokenizer has a chat template.
        words: Words that the tokenizer knows besides w0 … w31.

    Returns:
        The folder.
    """
    from lit_rlhf.models.loading import RandomWeights, load_model

    tokenizer = _tokenizer(special, chat, words)
    tokenizer.save_pretrained(folder)
    config = {"model_type": architecture, "initializer_range": 0.3, **_SHAPES[architecture]}
    model = load_model(RandomWeights(config=config, tokenizer=str(folder), seed=seed), task)
    model.save_pretrained(folder)
    return folder


def _tokenizer(special: Special, chat: bool, more: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>"]
    words = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(WORDS)), *more])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = "<eos>" if special == "bos_is_eos" else "<bos>"
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        bos_token=bos,
        pad_token="<eos>" if special == "pad_is_eos" else "<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function that writes a tiny model and returns the model's folder.

    The function takes the arguments of `make_tiny_model` except ``folder``, for example
    ``tiny_model("llama", task="score", special="pad_is_eos")``. In a test session, calls with the same arguments return
    the same folder.
    """
    made: dict[Any, Path] = {}

    def make(architecture: Architecture = "llama", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: MakeModel) -> Any:
    """Return the tokenizer of the tiny models, with the words w0 … w31."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 48 prompts of one to six words, for `Prompts`."""
    return _write(tmp_path_factory, "prompts")


@pytest.fixture(scope="session")
def tiny_preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 32 pairs of responses, the better of which has more of w0 … w7, for `Preferences`."""
    return _write(tmp_path_factory, "preferences")


@pytest.fixture(scope="session")
def tiny_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 32 texts, for `Demonstrations`."""
    return _write(tmp_path_factory, "demonstrations")


def _write(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    records = getattr(importlib.import_module("lit_rlhf.testing.data"), kind)()
    path = tmp_path_factory.mktemp("tiny") / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lit_rlhf.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_rlhf.testing.{_LAZY[name]}"), name)
