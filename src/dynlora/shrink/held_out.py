"""The loss of cuts of an adapter on held-out texts, and the triplets of its curvature."""

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from dynlora.export.models import BaseModel, agreement, outputs
from dynlora.lora.curvature import metrics_of, worth_of
from dynlora.shrink.rows import Rows
from dynlora.shrink.spectrum import Cut, Spectra

Batch = tuple[dict[str, Tensor], int]
"""Inputs of the model, labels among them, and what its mean loss counts: tokens or texts."""


class HeldOut:
    """A base model with the adapter of a folder on it, and the batches to measure it on.

    Dropped triplets become zeros of A and B, so one model serves for every cut. ``rows`` may be None where
    only outputs are compared.
    """

    def __init__(
        self, spectra: Spectra, folder: Path, base: str, rows: Rows | None, *,
        batch_size: int, max_length: int,
    ) -> None:  # fmt: skip
        task = spectra.adapter.fields.get("task_type")
        if task not in {"SEQ_CLS", "CAUSAL_LM", None}:
            raise ValueError(
                f"task_type {task!r} of the adapter has no loss here: only CAUSAL_LM and SEQ_CLS have. "
                "Leave model and data out, and cut by energy, rank or size."
            )
        self._is_classifier = task == "SEQ_CLS"
        self._spectra, self._folder = spectra, folder
        self._base = BaseModel(base, spectra.adapter.fields, arguments=("model",))
        self._model: PeftModel = self._loaded(folder)
        self._batches: list[Batch] = []
        if rows is not None:
            self._batches += self._encoded(rows, batch_size=batch_size, max_length=max_length)
            if not self._batches:
                raise ValueError("data holds no text of two tokens or more, so there is no loss.")

    def loss(self, spectra: Spectra, cut: Cut) -> float:
        """Mean loss over all tokens (language model) or texts (classifier)."""
        self._put(spectra, cut)
        with torch.no_grad():
            total = sum(float(self._model(**batch).loss) * count for batch, count in self._batches)
        mean = total / sum(count for _, count in self._batches)
        if not torch.isfinite(torch.tensor(mean)):
            raise ValueError(
                f"the held-out loss is {mean}: adapter or base compute no numbers on this data. Try a "
                "base in float32, and look at the texts."
            )
        return mean

    def curved(self) -> tuple[Spectra, list[Tensor]] | None:
        """The adapter by the triplets of the loss's curvature, and what each is worth to the loss.

        One backward pass over the data: see ``dynlora.lora.curvature``. L is a batch's loss, not divided by
        its tokens or texts. None if no batch has gradients that are all finite.
        """
        modules = self._spectra.modules
        factors = [b for _, b in self._put(self._spectra, self._spectra.everything)]
        self._model.requires_grad_(False)
        for b in factors:
            b.requires_grad_(True)
        sums = [torch.zeros(2, *m.sigma.shape, m.count, dtype=torch.float64) for m in modules]
        is_known = False
        for batch, count in self._batches:
            loss = self._model(**batch).loss * count
            gradients = torch.autograd.grad(loss, factors, allow_unused=True)
            if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
                continue
            is_known = True
            for pair, b, gradient, module in zip(sums, factors, gradients, modules, strict=True):
                if gradient is None:  # an expert that no text was sent to
                    continue
                columns, slopes = (
                    dataclasses.replace(module.update, b=f.detach().cpu()).stacked()[0].double()
                    for f in (b, gradient)
                )
                c = (columns.mT @ slopes)[:, : module.count, : module.count]
                pair += metrics_of(c)
        if not is_known:
            return None
        turned, worth = [], []
        for module, (left, right) in zip(modules, sums, strict=True):
            spectrum, squares = module.turned(left, right)
            turned.append(spectrum)
            worth.append(worth_of(squares, left))
        return dataclasses.replace(self._spectra, modules=turned), worth

    def verify(self, spectra: Spectra, cut: Cut, folder: Path) -> float:
        """Load the written adapter with stock PEFT on a fresh base; compare outputs on random tokens.

        The model that losses were measured with is given up, so that there is one base in memory.

        Returns:
            Largest absolute difference, in parts of the largest output.
        """
        self._put(spectra, cut)
        expected = outputs(self._model)
        del self._model
        gc.collect()
        self._model = self._loaded(folder)
        found = agreement(expected, outputs(self._model), self._model.dtype)
        return found["max_difference"] / found["max_output"]

    def _loaded(self, folder: Path) -> PeftModel:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self._base.adapted(folder, dtype="auto").to(device)

    @torch.no_grad()
    def _put(self, spectra: Spectra, cut: Cut) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Put the factors of a cut into the model; gives back its parameters A and B, by update."""
        found = dict(self._model.named_parameters(remove_duplicate=False))
        pairs = []
        for module, mask in zip(spectra.modules, cut, strict=True):
            update = module.cut(mask, module.update.rank)
            a, b = (found[_in_model(key)] for key in update.keys)
            a.copy_(update.a)
            b.copy_(update.b)
            pairs.append((a, b))
        return pairs

    def _encoded(self, rows: Rows, *, batch_size: int, max_length: int) -> Iterator[Batch]:
        own = any(self._folder.glob("tokenizer*"))
        place = str(self._folder) if own else self._base.name
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._model.config.pad_token_id = tokenizer.pad_token_id
        labels = self._class_numbers(rows.labels) if self._is_classifier else None
        for start in range(0, len(rows.texts), batch_size):
            inputs = tokenizer(
                rows.texts[start : start + batch_size],
                padding=True, truncation=True, max_length=max_length, return_tensors="pt",
            )  # fmt: skip
            if labels is not None:
                inputs["labels"] = torch.tensor(labels[start : start + batch_size])
                count = len(inputs["labels"])
            else:
                mask = inputs["attention_mask"] == 1
                inputs["labels"] = inputs["input_ids"].masked_fill(~mask, -100)
                count = int((inputs["labels"][:, 1:] != -100).sum())
            if count:
                yield {k: v.to(self._model.device) for k, v in inputs.items()}, count

    def _class_numbers(self, labels: list[Any] | None) -> list[float] | list[int]:
        if labels is None:
            raise ValueError(
                "data needs a column 'label' beside 'text': the adapter is a classifier."
            )
        classes = self._model.config.num_labels
        if classes == 1:
            return [float(label) for label in labels]
        names = {str(name): number for name, number in self._model.config.label2id.items()}
        known = names | {str(number): number for number in range(classes)}
        for label in labels:
            if str(label) not in known:
                raise ValueError(
                    f"label {label!r} in data is not a class of the model, which has {classes}; write the "
                    f"numbers 0, 1, … of the training, or the names in the base's config: {sorted(names)}."
                )
        return [known[str(label)] for label in labels]


def _in_model(key: str) -> str:
    """The name that a key of the file has in a PeftModel whose adapter is called default.

    >>> _in_model("base_model.model.q.lora_A.weight"), _in_model("base_model.model.e.lora_embedding_B")
    ('base_model.model.q.lora_A.default.weight', 'base_model.model.e.lora_embedding_B.default')
    """
    stem = key.removesuffix(".weight")
    return f"{stem}.default{key[len(stem) :]}"
