"""``dynlora bench --quick``: a suite that proves the machinery on a tiny untrained model, offline."""

import csv
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

from dynlora_lab.bench.suite import Suite, check_recipes, suite_from
from dynlora_lab.tasks.labelled_texts import shipped_sample

VOCABULARY = 2000
CLASSES = ("noun.animal", "noun.artifact", "noun.person", "noun.plant")


def quick_suite(folder: Path) -> Suite:
    """Two small tasks, two methods, two learning rates, two seeds: 12 cells of a few seconds each.

    Args:
        folder: the model and the data are made here, the same every time; made if missing.
    """
    model, data = folder / "tiny-bert", folder / "glosses.csv"
    folder.mkdir(parents=True, exist_ok=True)
    _write_data(data)
    _write_model(model, data)
    recipe = {
        "task": "text-classification",
        "model": str(model),
        "data": {
            "name": str(data),
            "held_out": 0.2,
            "evals": {"validation": "held_out", "test": "test"},
            "max_train_rows": 640,
            "max_eval_rows": 96,
        },
        "training": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
            "eval_on_start": False,
        },
        "adapter": {"target_r": 2, "prune_interval": 2},
    }
    suite = suite_from(
        {
            "name": "quick",
            "defaults": recipe,
            "tasks": {
                "glosses": {"options": {"max_length": 24}},
                "short-glosses": {"options": {"max_length": 6}},
            },
            "methods": {
                "lora": {"method": "lora"},
                "dynlora": {"method": "dynlora"},
            },
            "learning_rates": [0.01, 0.03],
            "seeds": [0, 1],
        }
    )
    check_recipes(suite)
    return suite


def _write_data(path: Path) -> None:
    """WordNet glosses of four kinds of things."""
    texts = shipped_sample()
    with path.open("w", encoding="utf8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label", "split"))
        for split, examples in (("train", texts.train), ("test", texts.test)):
            rows.writerows((e.text, e.label, split) for e in examples if e.label in CLASSES)


def _write_model(folder: Path, data: Path) -> None:
    """A BERT of two layers with random weights, and a tokenizer for the data."""
    if (folder / "config.json").is_file():
        return
    words = BertWordPieceTokenizer()
    words.train([str(data)], vocab_size=VOCABULARY, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)  # its config.json comes last: then all is there
