"""Does an export compute what its source computes? Both are loaded by stock loaders and compared."""

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from dynlora.export.source import PREFIX, PlainAdapter

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

_OUTPUTS = ("logits", "start_logits", "last_hidden_state")


def compare_outputs(
    adapter: PlainAdapter, source: Path, exported: Path, *, base: str, merged: bool
) -> tuple[float, float]:
    """Outputs of source and export on random token ids, in fp32.

    Args:
        adapter: what was exported.
        source: folder of the adapter it came from.
        exported: folder that was written.
        base: folder or hub id of the base model.
        merged: whether ``exported`` is a whole model.

    Returns:
        Largest absolute difference, and largest absolute output of the source.

    Raises:
        ValueError: the base model takes no token ids.
    """
    build = _model_class(adapter)
    options = _label_options(adapter)
    model = build.from_pretrained(base, dtype=torch.float32, **options)
    expected = _outputs(PeftModel.from_pretrained(model, str(source)))
    if merged:
        model = build.from_pretrained(str(exported), dtype=torch.float32)
    else:
        model = build.from_pretrained(base, dtype=torch.float32, **options)
        model = PeftModel.from_pretrained(model, str(exported))
    return float((_outputs(model) - expected).abs().max()), float(expected.abs().max())


def _model_class(adapter: PlainAdapter) -> Any:
    task = getattr(adapter.fields.get("task_type"), "value", adapter.fields.get("task_type"))
    mapping = adapter.fields.get("auto_mapping") or {}
    name = mapping.get("base_model_class") or _BY_TASK.get(str(task), "AutoModel")
    library = str(mapping.get("parent_library", "transformers"))
    holder = (
        importlib.import_module(library) if library.startswith("transformers") else transformers
    )
    return getattr(holder, name)


def _label_options(adapter: PlainAdapter) -> dict[str, int]:
    for key in ("score.weight", "classifier.weight", "classifier.out_proj.weight"):
        if PREFIX + key in adapter.others:
            return {"num_labels": adapter.others[PREFIX + key].shape[0]}
    return {}


@torch.no_grad()
def _outputs(model: nn.Module) -> Tensor:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "vocab_size", None) is None:
        raise ValueError(
            f"model={type(model).__name__} takes no token ids, so --verify cannot feed it; compare its "
            "outputs in a script of your own."
        )
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(1, text.vocab_size, (2, 16), generator=draws)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    output = model.eval()(**inputs)
    return next(output[name] for name in _OUTPUTS if name in output).float()
