"""The Trainer's held-out loss, and its gradients: what they are, and what they leave as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, modeling_utils

from dynlora import DynLoraCallback
from dynlora.callback.held_out import HeldOutLoss
from small_trainer import model_with, trainer
from tiny_models import VOCABULARY, tiny_llama


def held_out(folder, **arguments):
    run = trainer(folder, model_with(dropout=0.5), [], **arguments)
    run.model.train()
    x = torch.stack([row["x"] for row in run.eval_dataset])
    y = torch.stack([row["labels"] for row in run.eval_dataset])
    return run, x, y


def parameters_of(run):
    return [p for p in run.model.parameters() if p.requires_grad]


def test_each_gradient_is_that_of_one_batch_of_the_training_size_without_dropout(tmp_path):
    run, x, y = held_out(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=8)
    loss = HeldOutLoss(run, 2)
    found = [[p.grad.clone() for p in parameters_of(run)] for _ in loss.backward()]
    assert len(found) == 4  # two batches of 8 are four of 4
    run.model.eval()
    for i, gradients in enumerate(found):
        rows = slice(4 * i, 4 * i + 4)
        expected = torch.autograd.grad(
            run.model(x[rows], labels=y[rows])["loss"], parameters_of(run)
        )
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    whole = run.model(x, labels=y)["loss"].item()
    assert loss() == pytest.approx(whole, rel=1e-5)


def test_gradients_random_numbers_and_the_mode_of_training_stay_as_they_were(tmp_path):
    run, x, y = held_out(tmp_path)
    run.model(x, labels=y)["loss"].backward()
    before = [p.grad for p in parameters_of(run)]
    values = [g.clone() for g in before]
    loss = HeldOutLoss(run, 2)
    state = torch.get_rng_state()
    for _ in loss.backward():
        pass
    loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in run.model.modules())
    assert all(p.grad is g for p, g in zip(parameters_of(run), before, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(before, values, strict=True))
    stopped = loss.backward()  # an error in the middle of it
    next(stopped)
    stopped.close()
    assert all(p.grad is g for p, g in zip(parameters_of(run), before, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_are_checkpointed_where_training_does_and_nothing_else_changes(
    tmp_path, reentrant, monkeypatch
):
    runs = []

    def counted(*args, **kwargs):
        runs.append(1)
        return real(*args, **kwargs)

    real = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    gradients = {}
    for is_on in (False, True):
        model = get_peft_model(
            tiny_llama(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
        )
        rows = [{"input_ids": torch.arange(i, i + 8) % VOCABULARY} for i in range(8)]
        for row in rows:
            row["labels"] = row["input_ids"]
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4,
            gradient_checkpointing=is_on, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        run = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        if is_on:
            run.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            run.model.enable_input_require_grads()
        run.model.train()
        gradients[is_on] = []
        for _ in HeldOutLoss(run, 1).backward():
            gradients[is_on].append([p.grad.clone() for p in parameters_of(run)])
        assert bool(runs) == is_on
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-5, atol=1e-7)


def test_auto_is_given_the_gradients_and_its_answer_is_no_larger_than_without(tmp_path):
    costs = {}
    for name in ("with", "without"):
        model = model_with(r=8, target_r=8)
        callback = DynLoraCallback(target_r="auto", tolerance=0.05)
        run = trainer(tmp_path / name, model, [callback])
        if name == "without":
            loss = HeldOutLoss(run, 8)
            callback.evaluate = lambda loss=loss: loss()
        run.train()
        costs[name] = callback.history[-1]["auto"]["budget"]
    assert costs["with"] <= costs["without"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("not enough"), RuntimeError("no graph")])
def test_where_gradients_cannot_be_had_the_search_goes_on_without_them(
    tmp_path, monkeypatch, error
):
    def backward(_self):
        yield
        raise error

    monkeypatch.setattr(HeldOutLoss, "backward", backward)
    callback = DynLoraCallback(target_r="auto", tolerance=0.05)
    with pytest.warns(UserWarning, match=f"not ordered by curvature.*{error}"):
        trainer(tmp_path, model_with(r=8, target_r=8), [callback]).train()
    assert callback.history[-1]["auto"]["order"] in ("energy", "scores")


def test_without_a_batch_of_finite_gradients_curvature_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(HeldOutLoss, "backward", lambda _self: iter(()))
    callback = DynLoraCallback(target_r="auto", tolerance=0.05)
    trainer(tmp_path, model_with(r=8, target_r=8), [callback]).train()
    assert callback.history[-1]["auto"]["order"] in ("energy", "scores")


@pytest.mark.parametrize("workers", [0, 1])
def test_parts_are_of_the_training_size_with_a_cached_loader_too(tmp_path, workers):
    run, _, _ = held_out(
        tmp_path, per_device_train_batch_size=3, per_device_eval_batch_size=8,
        dataloader_num_workers=workers, dataloader_persistent_workers=bool(workers),
    )  # fmt: skip
    sizes = []
    forward = run.model.forward
    run.model.forward = lambda x, **rest: sizes.append(len(x)) or forward(x, **rest)
    for _ in HeldOutLoss(run, 2).backward():
        pass
    assert sizes == [3, 3, 2, 3, 3, 2]
