"""Tools for tests with pytest: tiny models, and a callback that records the metrics and weights of a run.

The module is a pytest plugin, so the fixture ``tiny_model`` is available wherever lit-rlhf is installed. Every pytest
session imports the module, whatever it tests; torch and Lightning are therefore imported only at their first use. ::

    def test_my_reward(tiny_model, tmp_path):
        recorder = Recorder()
        trainer = Trainer(callbacks=[recorder], ...)
        trainer.fit(PolicyGradient(actor=str(tiny_model("llama")), rewards=[MyReward()]), datamodule=...)
        assert recorder.metrics[-1]["objective/score"] > recorder.metrics[0]["objective/score"]
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from lit_rlhf.testing.recorder import Recorder as Recorder

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

    Returns:
        The folder.
    """
    from lit_rlhf.models.loading import RandomWeights, load_model

    tokenizer = _tokenizer(special, chat)
    tokenizer.save_pretrained(folder)
    config = {"model_type": architecture, "initializer_range": 0.3, **_SHAPES[architecture]}
    model = load_model(RandomWeights(config=config, tokenizer=str(folder), seed=seed), task)
    model.save_pretrained(folder)
    return folder


def _tokenizer(special: Special, chat: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>"]
    words = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(WORDS))])}
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


def __getattr__(name: str) -> Any:
    if name != "Recorder":
        raise AttributeError(f"module 'lit_rlhf.testing' has no attribute {name!r}")
    from lit_rlhf.testing.recorder import Recorder

    return Recorder
