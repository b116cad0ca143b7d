"""Tiny models and tables for whole runs of a task family: seconds, no download."""

from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer(texts, **options):
    """A word-piece tokenizer that knows the words of ``texts``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, **names, **options
    )


def save_model(folder: Path, model, tokenizer) -> str:
    """A folder that ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def splits_of(train, evaluation=None, features=None):
    """Rows (a list of dicts) as the run takes them."""
    return Splits(
        train=Dataset.from_list(train, features=features),
        evals={"": Dataset.from_list(evaluation or train, features=features)},
        where="rows of a test",
    )


def run_rows(folder: Path, splits, *, task, model, options=None, training=None, **fields):
    """Run a recipe on given rows; ``run.json`` as a mapping, and the result."""
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    recipe = recipe_from(
        {
            "task": task,
            "model": model,
            "output": str(folder / "run"),
            "data": {"name": "unused"},
            "options": options or {},
            "adapter": {"target_r": 2, "init_r": 3, "prune_interval": 2},
            "training": {**defaults, **(training or {})},
            **fields,
        }
    )
    return run(recipe, splits=splits)
