"""One fine-tuning run: a text classifier with dynamic ranks, measured, saved and re-loaded."""

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from dynlora import DynLoraCallback, DynLoraConfig
from dynlora.tasks.assets import pretrained_encoder
from dynlora.tasks.labelled_texts import (
    LabelledTexts,
    accuracy,
    majority_share,
    read_labelled_texts,
    sequence_classifier,
    shipped_sample,
    tokenised,
)
from dynlora.tasks.reload_check import logits_on_cpu, reload_difference
from dynlora.tasks.run_record import RunResult, RunSettings, check_output, write_record

NUM_RELOAD_ROWS = 32


def run_classification(
    settings: RunSettings,
    *,
    announce: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> RunResult:
    """Train, measure, save to ``settings.output`` and re-load.

    Args:
        settings: what to run.
        announce: called with a line at the start of each stage.
        on_step: called with (steps done, steps in all) after each optimizer step.

    Raises:
        ValueError: settings or data are unfit, or the output folder holds something else.
        AssetError: the default encoder cannot be fetched.
        ReloadError: the saved adapter does not load with stock PEFT.
    """
    config = _adapter_config(settings)
    check_output(settings.output)
    texts = read_labelled_texts(settings.data) if settings.data else shipped_sample()
    announce(
        f"{len(texts.train)} training and {len(texts.test)} held-out texts in "
        f"{len(texts.labels)} classes"
    )
    encoder = pretrained_encoder(settings.model, announce=announce)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    base, new_modules = sequence_classifier(encoder, labels=texts.labels, tokenizer=tokenizer)
    config.modules_to_save = config.exclude_modules = new_modules or None
    model = get_peft_model(base, config)
    write_record(settings, None)

    ranks = DynLoraCallback()
    trainer = _trainer(model, settings, texts, tokenizer, callbacks=[ranks, _StepReport(on_step)])
    announce("Measuring accuracy before training")
    accuracy_before = trainer.evaluate()["eval_accuracy"]
    parameters_start = _adapter_parameters(model)
    announce("Training")
    started = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - started
    announce("Measuring accuracy after training")
    accuracy_after = trainer.evaluate()["eval_accuracy"]

    rows = [trainer.eval_dataset[i] for i in range(min(NUM_RELOAD_ROWS, len(texts.test)))]
    batch = {k: v for k, v in trainer.data_collator(rows).items() if k != "labels"}
    logits = logits_on_cpu(model, batch)
    trainer.save_model(str(settings.output))
    announce("Re-loading the saved adapter with stock PEFT in a process without dynlora")
    difference = reload_difference(
        settings.output,
        batch,
        base=encoder,
        pad_token_id=tokenizer.pad_token_id,
        expected=logits,
    )
    adapter_file = settings.output / "adapter_model.safetensors"
    result = RunResult(
        majority_accuracy=majority_share(texts),
        accuracy_before=accuracy_before,
        accuracy_after=accuracy_after,
        ranks=ranks.ranks,
        init_r=settings.init_r,
        components_start=settings.init_r * len(ranks.ranks),
        components_end=sum(ranks.ranks.values()),
        components_target=ranks.allocator.target_components if ranks.allocator else 0,
        parameters_start=parameters_start,
        parameters_end=_adapter_parameters(model),
        adapter_file=str(adapter_file),
        adapter_bytes=adapter_file.stat().st_size,
        reload_difference=difference,
        optimizer_steps=trainer.state.global_step,
        train_s=train_s,
    )
    write_record(settings, result)
    return result


def _adapter_config(settings: RunSettings) -> DynLoraConfig:
    return DynLoraConfig(
        init_r=settings.init_r,
        target_r=settings.target_r,
        lora_alpha=8,
        init_std=0.02,  # the gates carry the learning: small factors suit their large step
        target_modules="all-linear",
        task_type="SEQ_CLS",
    )


def _trainer(
    model: PreTrainedModel,
    settings: RunSettings,
    texts: LabelledTexts,
    tokenizer: Any,
    *,
    callbacks: list[TrainerCallback],
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs or 1,
        max_steps=settings.max_steps or -1,
        warmup_steps=0.06,  # a share of the run
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=tokenised(texts.train, labels=texts.labels, tokenizer=tokenizer),
        eval_dataset=tokenised(texts.test, labels=texts.labels, tokenizer=tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _adapter_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


class _StepReport(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self.on_step = on_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        self.on_step(state.global_step, state.max_steps)
