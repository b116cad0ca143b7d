"""Perplexity that counts every token once, however the tokens are spread over rows and batches."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # transformers' label of a token that is not to be predicted


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """What each row of a causal language model's batch adds to the perplexity.

    Made for the Trainer's ``preprocess_logits_for_metrics``: it keeps three numbers a row instead of
    (tokens, vocabulary) logits.

    Args:
        logits: (rows, tokens, vocabulary); position t predicts token t + 1.
        labels: (rows, tokens), -100 where a token does not count.

    Returns:
        (rows, 3) float32: summed -log p of the tokens that count, how many count, and how many of
        these have the largest logit.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    counted = targets != IGNORED
    right = (logits[:, :-1].argmax(-1) == targets) & counted
    return torch.stack([losses.sum(1), counted.float().sum(1), right.float().sum(1)], dim=1)


def perplexity(rows: NDArray[np.floating]) -> dict[str, float]:
    """exp(-(1/n) sum log p) over all n tokens that count, and the share of them predicted right.

    The Trainer's ``eval_loss`` averages over batches instead, so that a token in a short batch weighs
    more; exp(eval_loss) is not the perplexity of the text.

    Args:
        rows: what :func:`row_losses` returned, for all batches, (rows, 3).

    Raises:
        ValueError: no token counts.

    >>> scores = perplexity(np.array([[np.log(4) * 3, 3.0, 1.0], [np.log(4), 1.0, 1.0]]))
    >>> round(scores["perplexity"], 6), scores["token_accuracy"]
    (4.0, 0.5)
    """
    total, counted, right = np.asarray(rows, dtype=np.float64).sum(axis=0)
    if not counted:
        raise ValueError("no token of the evaluation set counts; each row needs an answer.")
    return {
        "perplexity": float(np.exp(total / counted)),
        "nll": float(total / counted),
        "token_accuracy": float(right / counted),
        "tokens": float(counted),
    }
