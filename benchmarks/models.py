"""The models of the speed benchmarks: Llama policies whose responses have geometrically distributed lengths.

    python benchmarks/models.py FOLDER [--hidden 256] [--layers 6] [--vocabulary 4096] [--mean-length 64] [--prompt 32]

Writes FOLDER/policy (a language model) and FOLDER/reward (a classifier with one label and the same shape), each with a
word-level tokenizer, and FOLDER/prompts.jsonl. All weights are random.

The end of sequence has the same probability, about 1 / mean-length, at every step: the embedding sets one entry of the
hidden state to a constant, no layer writes to it, and only the rows of EOS and padding in the output matrix read it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS = 0, 1
WORDS = 4  # ids below are special
CONSTANT = 0  # the entry of the hidden state that is the same for every token


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words t4, t5, …, one token each, with ``vocabulary`` tokens in all."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(WORDS, vocabulary))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def write_models(
    folder: Path,
    *,
    hidden: int = 256,
    layers: int = 6,
    vocabulary: int = 4096,
    mean_length: float = 64.0,
    prompts: int = 512,
    prompt: int = 32,
) -> Path:
    """Write the models and the prompts, and return the folder."""
    tokenizer = word_tokenizer(vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=2,
        num_labels=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config).eval()
    _end_after(policy, mean_length)
    for name, model in (("policy", policy), ("reward", LlamaForSequenceClassification(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = torch.randint(WORDS, vocabulary, (prompts, prompt), generator=torch.Generator().manual_seed(1))
    lines = (json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) for row in drawn.tolist())
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@torch.no_grad()
def _end_after(policy: LlamaForCausalLM, mean_length: float) -> None:
    """Set EOS's logit to a constant, so that on average one token in ``mean_length`` is EOS; rule padding out."""
    trunk, output = policy.model, policy.lm_head.weight
    trunk.embed_tokens.weight[:, CONSTANT] = 0.1
    for layer in trunk.layers:
        layer.self_attn.o_proj.weight[CONSTANT] = 0.0
        layer.mlp.down_proj.weight[CONSTANT] = 0.0
    tokens = torch.randint(WORDS, len(output), (32, 32))
    constant = trunk(input_ids=tokens).last_hidden_state[..., CONSTANT].mean()
    output[:, CONSTANT] = 0.0
    others = math.log(len(output) - 2)  # the other logits are near 0
    for token, logit in ((EOS, others - math.log(max(mean_length - 1, 1e-3))), (PAD, -20.0)):
        output[token] = 0.0
        output[token, CONSTANT] = logit / constant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--mean-length", type=float, default=64.0)
    parser.add_argument("--prompt", type=int, default=32)
    write_models(**vars(parser.parse_args()))
