"""Tiny models with random weights, and their tokenizer; torch is imported only when a model is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"]
Special = Literal["distinct", "bos_is_eos", "pad_is_eos"]

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
