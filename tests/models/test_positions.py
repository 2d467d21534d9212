"""Texts that are longer than a model's learned positions are refused with a message, before a lookup fails."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.positions import check_positions, learned_positions
from lit_rlhf.models.unpadded import is_unpadded, last_hidden_state


@pytest.mark.parametrize("attention", ["unpadded", "eager"])
def test_one_token_more_than_the_positions_is_refused(tiny_model, attention):
    model = load_model(str(tiny_model("gpt2")))
    if attention == "eager":
        model.set_attn_implementation("eager")
    trunk, fits, too_long = model.base_model, torch.arange(128)[None] % 32, torch.arange(129)[None] % 32
    assert is_unpadded(trunk) == (attention == "unpadded")
    assert len(last_hidden_state(trunk, fits, torch.ones_like(fits, dtype=torch.bool)).states) == 128
    with pytest.raises(
        UserError, match=r"a text of 129 tokens does not fit into the 128 positions of the model .*gpt2"
    ):
        last_hidden_state(trunk, too_long, torch.ones_like(too_long, dtype=torch.bool))


def test_only_the_longest_text_of_packed_rows_counts(tiny_model):
    trunk, tokens = load_model(str(tiny_model("gpt2"))).base_model, torch.arange(200)[None] % 32
    real = torch.ones_like(tokens, dtype=torch.bool)
    assert len(last_hidden_state(trunk, tokens, real, positions=torch.arange(200)[None] % 100).states) == 200


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "llama", "qwen2", "gpt_neox", "mistral", "bloom"])
def test_learned_positions_are_those_beyond_which_transformers_fails(kind):
    shapes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    shapes |= {"intermediate_size": 16, "ffn_dim": 16, "num_key_value_heads": 2, "rotary_dim": 4}
    shapes |= {"word_embed_proj_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    limit = {} if kind == "bloom" else {"max_position_embeddings": 24}
    config = AutoConfig.for_model(kind, **shapes, **limit)
    model, text = AutoModelForCausalLM.from_config(config), torch.arange(25)[None] + 3
    if learned_positions(config) is None:
        model(text)
        check_positions(config, 25)
    else:
        model(text[:, :24])
        check_positions(config, 24)
        with pytest.raises((IndexError, RuntimeError)):
            model(text)
        with pytest.raises(UserError):
            check_positions(config, 25)
