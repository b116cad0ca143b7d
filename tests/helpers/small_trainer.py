"""The small net under transformers.Trainer; the window of its 20 steps is 3 to 10."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynlora import DynLoraCallback
from small_net import SmallNet, configured, data

SETTINGS = {"target_r": 2, "prune_interval": 3}


class WithLoss(nn.Module):
    """The small net with the (loss, logits) output that Trainer expects."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = SmallNet()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, labels=None):
        logits = self.net(self.dropout(x))
        loss = None if labels is None else ((logits - labels) ** 2).mean()
        return {"loss": loss, "logits": logits}


def model_with(*, dropout=0.0, **fields):
    """The net with an adapter; settings of an allocator are those of a gated one's config."""
    torch.manual_seed(0)
    config, _ = configured(**{**SETTINGS, **fields})
    return get_peft_model(WithLoss(dropout), config)


def callback_with(*, gated=False, score=None, rank_image=None, freeze_on_stop=False, **fields):
    """The callback for a model of ``model_with(**fields)``."""
    fields.pop("dropout", None)
    _, settings = configured(gated=gated, **{**SETTINGS, **fields})
    return DynLoraCallback(
        score=score, rank_image=rank_image, freeze_on_stop=freeze_on_stop, **settings
    )


def rows():
    x, y = data(rows=64)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def trainer(path, model=None, callbacks=None, cls=Trainer, **arguments):
    settings = {
        "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "label_names": ["labels"], "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(
        model=model or model_with(),
        args=TrainingArguments(str(path), **{**settings, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows()[:16],
        callbacks=[callback_with()] if callbacks is None else callbacks,
    )


def trainer_of(path, *, gated=False, callbacks=(), arguments=None, **fields):
    """Trainer and callback of one run with these fields."""
    callback = callback_with(gated=gated, **fields)
    for name in ("score", "rank_image", "freeze_on_stop"):
        fields.pop(name, None)
    model = model_with(gated=gated, **fields)
    return trainer(path, model, [*callbacks, callback], **(arguments or {})), callback


class StopsAt(TrainerCallback):
    """Ends training after a step, as early stopping does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_kwargs):
        control.should_training_stop = state.global_step >= self.step


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(data()[0])["logits"]


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def losses_of(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


SAVE_ALL = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
