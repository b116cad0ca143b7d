"""Forgetting: what training costs on text that the base model knew, measured before and after."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.data import DataSource, need_columns, need_filled, need_texts, read_splits
from dynlora_lab.tasks.scoring.perplexity import IGNORED, perplexity, row_losses

AT_ONCE = 8  # rows


def known_texts(name: str, *, column: str, rows: int) -> list[str]:
    """The first texts of the split ``train`` after a shuffle that is always the same.

    Args:
        name: of the data, as in a recipe's ``data.name``.
        column: that holds texts.
        rows: how many.

    Raises:
        RecipeError: the data or the column is missing, or a text is blank.
    """
    source = DataSource(name=name, evals="train", max_train_rows=rows, max_eval_rows=rows)
    splits = read_splits(source)  # as evals are named, nothing of train is held out
    need_columns(splits, [column], option="options.forgetting_text")
    need_texts(splits, [column])
    need_filled(splits, [column])
    texts: list[str] = splits.train[column][:]
    return texts


@torch.no_grad()
def text_loss(
    model: nn.Module, tokenizer: Tokenizer, texts: list[str], *, max_length: int
) -> dict[str, float]:
    """-log p of the next token, the mean over all tokens of the texts but the first of each.

    Args:
        model: a causal language model, with or without an adapter; its mode is left as it was.
        tokenizer: its own.
        texts: at least one of two tokens.
        max_length: tokens of a text; more are cut off.

    Returns:
        ``nll``, in nats, and over how many ``tokens``.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = []
    for first in range(0, len(texts), AT_ONCE):
        inputs = tokenizer(
            texts[first : first + AT_ONCE],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        rows.append(row_losses(logits, labels))
    model.train(was_training)
    found = perplexity(torch.cat(rows).cpu().numpy())
    return {"nll": found["nll"], "tokens": found["tokens"]}
