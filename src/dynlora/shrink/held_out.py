"""The loss of cuts of an adapter on held-out texts, and what each triplet means for it."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from dynlora.shrink.choice import everything
from dynlora.shrink.layout import Cut, Layout
from dynlora.shrink.rows import Rows

VERIFY_TOLERANCE = 1e-4
"""Of the largest output, in float32; a wrong scale is off by far more."""

_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")

Batch = tuple[dict[str, Tensor], int]
"""Inputs of the model, labels among them, and what its mean loss counts: tokens or texts."""


class HeldOut:
    """A base model with the adapter on it, and the batches to measure it on.

    Dropped triplets become zero columns of B, so one model serves for every cut. With it the factors
    are rotated into singular vectors, which changes nothing but rounding.

    Args:
        layout: the adapter.
        base: folder or hub id of its base model.
        rows: texts, with labels for a classifier; None if only outputs are compared.
        batch_size: texts in a batch.
        max_length: tokens of a text; longer ones are cut.

    Raises:
        ValueError: the adapter's task is not understood, labels are missing or wrong, or the adapter
            does not fit on the base.
    """

    def __init__(
        self, layout: Layout, base: str, rows: Rows | None, *, batch_size: int, max_length: int
    ) -> None:
        self._layout = layout
        self._base = base
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._is_classifier = _is_classifier(layout)
        self._model: PeftModel = self._loaded(layout.adapter.folder)
        self._b, self._columns = self._place_factors()
        self._batches: list[Batch] = []
        if rows is not None:
            self._batches += self._encoded(rows, batch_size=batch_size, max_length=max_length)
            if not self._batches:
                raise ValueError("data holds no text of two tokens or more, so there is no loss.")

    @torch.no_grad()
    def loss(self, cut: Cut) -> float:
        """Mean loss over all tokens (language model) or texts (classifier).

        Raises:
            ValueError: it is NaN or infinite.
        """
        self._keep(cut)
        total = sum(float(self._model(**inputs).loss) * count for inputs, count in self._batches)
        mean = total / sum(count for _, count in self._batches)
        if not torch.isfinite(torch.tensor(mean)):
            raise ValueError(
                f"the held-out loss is {mean}: adapter or base compute no numbers on this data. Try a "
                "base in float32, and look at the texts."
            )
        return mean

    def sensitivity(self) -> list[Tensor]:
        """|σ · ∂L/∂σ| of each triplet, summed over batches, from one backward pass over the data.

        L is a batch's loss, not divided by its tokens or texts.
        By the chain rule it is ⟨bᵢ, ∂L/∂bᵢ⟩, whatever part of σᵢ is in bᵢ.
        """
        self._keep(everything(self._layout.spectra))
        self._model.requires_grad_(False)
        for b in self._b:
            b.requires_grad_(True)
        totals = [torch.zeros(s.sigma.shape[1], dtype=torch.float64) for s in self._layout.spectra]
        for inputs, count in self._batches:
            loss = self._model(**inputs).loss * count
            gradients = torch.autograd.grad(loss, self._b, allow_unused=True)
            for total, b, gradient, spectrum in zip(
                totals, self._b, gradients, self._layout.spectra, strict=True
            ):
                if gradient is not None:  # an expert that no text was sent to
                    products = (b.detach().double() * gradient.double()).transpose(0, 1).flatten(1)
                    slots = products.sum(1).view(-1, spectrum.update.num_experts).sum(1)
                    total += slots[: len(total)].abs().cpu()
        return totals

    @torch.no_grad()
    def verify(self, cut: Cut, folder: Path) -> float:
        """Load the written adapter with stock PEFT on a fresh base; compare outputs on random tokens.

        The model that losses were measured with is given up, so that there is one base in memory.

        Returns:
            Largest absolute difference, in parts of the largest output.

        Raises:
            RuntimeError: it is beyond rounding.
        """
        self._keep(cut)
        expected = self._outputs()
        self._b.clear()
        self._columns.clear()
        del self._model
        gc.collect()
        self._model = self._loaded(folder)
        found = self._outputs()
        difference = float((found.float() - expected.float()).abs().max() / expected.abs().max())
        limit = max(VERIFY_TOLERANCE, 8 * torch.finfo(found.dtype).eps)
        if not difference <= limit:
            raise RuntimeError(
                f"verification failed: loaded with PEFT, outputs differ by {difference:.2g} of the "
                f"largest, more than {limit:.2g}. Nothing was written."
            )
        return difference

    def _loaded(self, folder: Path) -> PeftModel:
        kind: Any = transformers.AutoModelForCausalLM
        options: dict[str, int] = {}
        if self._is_classifier:
            kind = transformers.AutoModelForSequenceClassification
            options = _label_options(self._layout)
        model = kind.from_pretrained(self._base, dtype="auto", **options).to(self._device)
        try:
            return PeftModel.from_pretrained(model, str(folder)).eval()
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(self._wrong_base(folder)) from error

    def _wrong_base(self, what: object) -> str:
        return (
            f"model={self._base!r} has no place for {what}: the adapter was trained on another base. Name "
            "that one."
        )

    def _place_factors(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Put factors of singular vectors into the model.

        Returns:
            The parameters that hold B, by update, and B with all triplets.
        """
        found = dict(self._model.named_parameters(remove_duplicate=False))
        parameters, columns = [], []
        for spectrum in self._layout.spectra:
            update, all_of_it = spectrum.update, spectrum.sigma.new_ones(spectrum.sigma.shape[1])
            factors = spectrum.rotated(all_of_it.bool(), update.rank)
            names = [_in_model(key) for key in (update.a_key, update.b_key)]
            for name, factor in zip(names, factors, strict=True):
                if name not in found or found[name].shape != factor.shape:
                    raise ValueError(self._wrong_base(f"{name} of shape {tuple(factor.shape)}"))
                found[name].data.copy_(factor)
            parameters.append(found[names[1]])
            columns.append(found[names[1]].detach().clone())
        return parameters, columns

    @torch.no_grad()
    def _keep(self, cut: Cut) -> None:
        for b, whole, spectrum, mask in zip(
            self._b, self._columns, self._layout.spectra, cut, strict=True
        ):
            update = spectrum.update
            stays = torch.zeros(update.rank, dtype=torch.bool)
            stays[: len(mask)] = mask
            slots = stays.repeat_interleave(update.num_experts).view(-1, *[1] * (whole.ndim - 2))
            b.copy_(whole * slots.to(whole.device))

    def _outputs(self) -> Tensor:
        config = self._model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(1, text.vocab_size, (1, 16), generator=draws).to(self._device)
        return self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def _encoded(self, rows: Rows, *, batch_size: int, max_length: int) -> Iterator[Batch]:
        tokenizer = self._tokenizer()
        labels = self._class_numbers(rows.labels) if self._is_classifier else None
        self._model.config.pad_token_id = tokenizer.pad_token_id
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
                yield {k: v.to(self._device) for k, v in inputs.items()}, count

    def _tokenizer(self) -> Any:
        folder = self._layout.adapter.folder
        own = any(folder.glob("tokenizer*"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder) if own else self._base)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _class_numbers(self, labels: list[Any] | None) -> list[float] | list[int]:
        if labels is None:
            raise ValueError(
                "data needs a column 'label' beside 'text': the adapter is a classifier."
            )
        if self._model.config.num_labels == 1:
            return [float(label) for label in labels]
        known = {str(name): number for name, number in self._model.config.label2id.items()}
        numbers = []
        for label in labels:
            number = known.get(str(label))
            if number is None and str(label).isdigit():
                number = int(label)
            if number is None or number >= self._model.config.num_labels:
                raise ValueError(
                    f"label {label!r} in data is not a class of the model, which has "
                    f"{self._model.config.num_labels}; write the numbers 0, 1, … of the training, or the "
                    f"names in the base's config: {sorted(known)}."
                )
            numbers.append(number)
        return numbers


def _is_classifier(layout: Layout) -> bool:
    """Whether the adapter's task is text classification; else it is a language model."""
    task = layout.adapter.stored.get("task_type")
    if task not in {"SEQ_CLS", "CAUSAL_LM", None}:
        raise ValueError(
            f"task_type {task!r} of the adapter has no loss here: only CAUSAL_LM and SEQ_CLS have. Leave "
            "model and data out, and cut by energy, rank or size."
        )
    return task == "SEQ_CLS"


def _label_options(layout: Layout) -> dict[str, int]:
    """How many classes the trained head has, if there is one; else the base's own config says it."""
    for key, tensor in layout.adapter.others.items():
        if key.endswith(_HEADS):
            return {"num_labels": tensor.shape[0]}
    return {}


def _in_model(key: str) -> str:
    """The name that a key of the file has in a PeftModel whose adapter is called default.

    >>> _in_model("base_model.model.q.lora_A.weight"), _in_model("e.lora_embedding_B")
    ('base_model.model.q.lora_A.default.weight', 'base_model.model.e.lora_embedding_B.default')
    """
    name = "base_model.model." + key.removeprefix("base_model.model.")
    stem = name.removesuffix(".weight")
    return f"{stem}.default{name[len(stem) :]}"
