from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_rlhf.modules.decoding import token_texts


def test_a_character_of_several_tokens_is_the_text_of_the_last():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a token is a byte
    bytewise = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    tokens = tokenizer("é 🙂!")["input_ids"]
    assert len(tokens) == 8
    assert token_texts(tokenizer, tokens) == ["", "é", " ", "", "", "", "🙂", "!"]
    assert token_texts(tokenizer, tokens[:1]) == ["\N{REPLACEMENT CHARACTER}"]  # cut within a character
    assert token_texts(tokenizer, []) == []
