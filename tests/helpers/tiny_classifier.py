"""A BERT encoder of two layers with random weights and a ten-word tokenizer, saved to a folder."""

import itertools

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["good", "fine", "bad", "poor", "a", "film"]


def tiny_tokenizer():
    numbers = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(numbers, SPECIAL[1]))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=32,
        **dict(zip(["pad_token", "unk_token", "cls_token", "sep_token"], SPECIAL, strict=True)),
    )


def save_encoder(folder, config_class=BertConfig, model_class=BertModel, **sizes):
    """An encoder without a head, and its tokenizer; returns the folder as a string."""
    set_seed(0)
    defaults = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.3,  # words far apart: learnt in a few steps
    }
    config = config_class(vocab_size=len(SPECIAL + WORDS), **(sizes or defaults))
    model_class(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_texts(path):
    """A CSV file of 48 texts whose label follows from each of their words."""
    words = {"pos": ("good", "fine"), "neg": ("bad", "poor")}
    rows = [
        f"{' '.join(mix)},{label}"
        for label, pair in words.items()
        for length in (2, 3, 4)
        for mix in itertools.product(pair, repeat=length)
        if label == "pos" or length < 4 or mix[0] == "bad"
    ]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf8")
    return path
