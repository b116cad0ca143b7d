"""Two lines beside a LoRA script: transformers.Trainer with DynLoraCallback."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from dynlora import AdapterFileError, DynLoraCallback, DynLoraConfig, DynLoraModel, dem_loss
from small_net import SmallNet, data, small_net


class WithLoss(nn.Module):
    """The small net with the (loss, logits) output that Trainer expects."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet()

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else ((logits - labels) ** 2).mean()
        return {"loss": loss, "logits": logits}


def model_with(config=None, **fields):
    torch.manual_seed(0)
    settings = {"init_r": 4, "target_r": 2, "target_modules": ["0", "1", "2"], "prune_interval": 3}
    return get_peft_model(WithLoss(), config or DynLoraConfig(**{**settings, **fields}))


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
        callbacks=[DynLoraCallback()] if callbacks is None else callbacks,
    )


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(data()[0])["logits"]


class Witness(TrainerCallback):
    """Sees the model at the end of training, before the adapter becomes a plain LoRA."""

    def on_train_end(self, args, state, control, *, model, **_kwargs):
        self.logits = logits(model)
        self.was_gated = isinstance(model.base_model, DynLoraModel)


# -- the end of a run ----------------------------------------------------------------------------


def test_two_lines_make_a_plain_lora_with_the_same_function(tmp_path):
    witness, callback = Witness(), DynLoraCallback()
    run = trainer(tmp_path, callbacks=[witness, callback])
    run.train()
    model = run.model
    assert witness.was_gated
    assert type(model.peft_config["default"]) is LoraConfig
    assert not isinstance(model.base_model, DynLoraModel)
    assert not [n for n, _ in model.named_parameters() if n.endswith(".c")]
    torch.testing.assert_close(logits(model), witness.logits, rtol=0, atol=1e-5)
    assert sum(callback.ranks.values()) == 6
    assert [event["budget"] for event in callback.history][-1] == 6


def test_what_it_saves_loads_where_dynlora_is_not_installed(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "out"))
    torch.save(logits(run.model), tmp_path / "expected.pt")
    torch.save(base_state(run.model), tmp_path / "base.pt")
    script = """
import sys; sys.modules["dynlora"] = None; sys.path.insert(0, sys.argv[2])
import torch
from peft import PeftModel
from torch import nn
class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 4)])
    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)
class Base(nn.Module):
    def __init__(self):
        super().__init__(); self.net = SmallNet()
    def forward(self, x): return self.net(x)
base = Base(); base.load_state_dict(torch.load(sys.argv[1] + "/base.pt"))
model = PeftModel.from_pretrained(base, sys.argv[1] + "/out").eval()
x = torch.load(sys.argv[1] + "/x.pt")
torch.save(model(x).detach(), sys.argv[1] + "/actual.pt")
try:
    import dynlora
except ModuleNotFoundError: pass
else: raise SystemExit("dynlora could be imported")
"""
    torch.save(data()[0], tmp_path / "x.pt")
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, str(tmp_path), "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actual, expected = (torch.load(tmp_path / f"{n}.pt") for n in ("actual", "expected"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "LORA"


def base_state(model):
    """Base weights of an adapted model, named as before the adapter came."""
    state = model.get_base_model().state_dict()
    inside = {k: ".base_layer.".join(k.rsplit(".", 1)) for k in WithLoss().state_dict()}
    return {k: state.get(k, state.get(inside[k])) for k in inside}


# -- DEM and accumulation ------------------------------------------------------------------------


class CustomLoss(Trainer):
    """A trainer whose compute_loss ignores the model's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **_kwargs):
        outputs = model(x=inputs["x"])
        loss = nn.functional.l1_loss(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class KeepFirstGradients(TrainerCallback):
    """Gradients after clipping and before the step, and after the step."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **_kwargs):
        self.before = self.before or grads(model)
        self.expected = getattr(self, "expected", None) or dem_grads(model)

    def on_optimizer_step(self, args, state, control, *, model, **_kwargs):
        self.after = self.after or grads(model)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dem_grads(model):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
    gradient = torch.autograd.grad(dem_loss(model), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, gradient, strict=True) if g is not None}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("cls", [Trainer, CustomLoss])
def test_the_dem_gradient_is_autograds(tmp_path, cls, accumulation):
    kept = KeepFirstGradients()
    run = trainer(
        tmp_path, model=model_with(dem_weight=0.3), cls=cls,
        gradient_accumulation_steps=accumulation, callbacks=[DynLoraCallback(), kept],
    )  # fmt: skip
    run.train()
    assert len(kept.expected) == 6  # A and B of three modules
    for name, penalty in kept.expected.items():
        added = kept.after[name] - kept.before[name]
        torch.testing.assert_close(added, 0.3 * penalty, rtol=1e-6, atol=1e-8)


def test_accumulated_micro_batches_count_as_one_step(tmp_path):
    callback = DynLoraCallback()
    run = trainer(
        tmp_path, max_steps=8, gradient_accumulation_steps=4, per_device_train_batch_size=2,
        callbacks=[callback],
    )  # fmt: skip
    run.train()
    assert callback.allocator.step == 8
    assert sum(callback.ranks.values()) == 6


# -- checkpoints ---------------------------------------------------------------------------------


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("compact", [True, False])
def test_a_run_resumes_bit_for_bit_from_any_checkpoint(tmp_path, compact):
    config = {"compact": compact, "target_r": 1}
    whole = trainer(
        tmp_path, model_with(**config), save_strategy="steps", save_steps=1, save_total_limit=None
    )
    whole.train()
    expected = [log["loss"] for log in whole.state.log_history if "loss" in log]
    for step in (1, 4, 9, 10, 11, 17, 20):  # before, inside, at and after the freeze at step 10
        resumed = trainer(tmp_path, model_with(**config))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        losses = [log["loss"] for log in resumed.state.log_history if "loss" in log]
        assert losses[:20] == expected
        ours, theirs = weights(resumed.model), weights(whole.model)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert resumed.model.peft_config["default"].rank_pattern == (
            whole.model.peft_config["default"].rank_pattern
        )


@pytest.mark.parametrize("best", [2, 4, 8, 10, 18])  # the window is 3 to 10
def test_load_best_model_at_end_gives_the_best_models_function(tmp_path, best):
    """Before the freeze it has more components than the budget, and a warning says so."""

    def metrics(prediction):
        metrics.calls += 1
        metrics.logits.append(torch.tensor(prediction.predictions))
        return {"score": float(metrics.calls * 2 == best)}

    metrics.calls, metrics.logits = 0, []
    run = trainer(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.compute_metrics = metrics
    run.train()
    x = torch.stack([row["x"] for row in rows()[:16]])
    run.model.eval()
    torch.testing.assert_close(
        run.model(x)["logits"].detach(), metrics.logits[best // 2 - 1], rtol=0, atol=1e-5
    )
    rank = sum(m.r["default"] for n, m in run.model.named_modules() if hasattr(m, "lora_A"))
    assert rank == (12 if best < 10 else 6)


def test_the_best_model_from_before_the_freeze_survives_a_resume_from_after_it(tmp_path):
    def run(best_at):
        scores = iter(range(2, 21, 2))
        settings = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        made = trainer(
            tmp_path, model_with(target_r=1), load_best_model_at_end=True,
            metric_for_best_model="score", greater_is_better=True, **settings,
        )  # fmt: skip
        made.compute_metrics = lambda _prediction: {"score": float(next(scores) == best_at)}
        return made

    whole, resumed = run(best_at=8), run(best_at=None)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_early_stopping_before_the_freeze_warns_and_keeps_the_function(tmp_path):
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        callbacks=[DynLoraCallback(), EarlyStoppingCallback(2)],
    )  # fmt: skip
    run.compute_metrics = lambda _prediction: {"score": 1.0}
    with pytest.warns(UserWarning, match="ended after 3 of 20 steps, before the ranks are frozen"):
        run.train()
    assert type(run.model.peft_config["default"]) is LoraConfig


def test_a_native_checkpoint_loads_with_its_ragged_ranks(tmp_path):
    run = trainer(tmp_path, model_with(target_r=1), save_strategy="steps", save_steps=10)
    run.train()
    torch.manual_seed(0)
    base = WithLoss()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-20"))
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-5)


# -- failing loudly ------------------------------------------------------------------------------


def test_without_the_callback_training_fails_at_the_first_step(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"Add callbacks=\[DynLoraCallback\(\)\] to your Trainer"
    ):
        trainer(tmp_path, callbacks=[]).train()


def test_the_callback_without_an_adapter_fails_before_the_first_step(tmp_path):
    plain = model_with(LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="no DynLora adapter"):
        trainer(tmp_path, plain).train()


class SwapsOptimizer(TrainerCallback):
    """Replaces the stepping of the optimizer behind everybody's back."""

    def on_train_begin(self, args, state, control, *, optimizer, **_kwargs):
        optimizer.step = lambda *_a, **_k: None


@pytest.mark.filterwarnings(
    "ignore:Seems like `optimizer.step"
)  # torch notices too, but only warns
def test_an_optimizer_that_is_not_stepped_is_noticed_at_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[DynLoraCallback(), SwapsOptimizer()])
    with pytest.raises(RuntimeError, match="finished step 1, but the optimizer .* was not stepped"):
        run.train()


def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path):
    run = trainer(
        tmp_path,
        model_with(init_r=2, target_r=2),
        callbacks=[],
        save_strategy="steps",
        save_steps=5,
    )
    run.train()
    again = trainer(tmp_path, model_with(init_r=2, target_r=2))
    with pytest.raises(
        ValueError, match="checkpoint at step 5 holds no progress of DynLoraCallback"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_resuming_with_another_number_of_steps_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    again = trainer(tmp_path, max_steps=40)
    with pytest.raises(ValueError, match="total_steps=40 differs from the interrupted run's 20"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_r": 3}, "(target_components=9 differs from|target_r=3 asks for 9 components)"),
        ({"dem_weight": 0.3}, "dem_weight=0.3 differs"),
        ({"lora_alpha": 99}, "scaling=24.75 of module 'net.layers.0' differs"),
        ({"init_r": 5}, "scaling=1.6 of module 'net.layers.0' differs"),
        ({"target_modules": ["0", "1"], "target_r": 3}, r"modules differ: .*\['net.layers.2'\]"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*were found in the checkpoint|.*[Mm]issing.*key")
def test_resuming_with_another_config_is_refused(tmp_path, fields, message):
    trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    for step in (5, 15):  # in the window and after it
        again = trainer(tmp_path, model_with(**fields))
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_what_may_change_at_a_resume_changes_nothing_else(tmp_path):
    """Batch size, learning rate, dropout, prune settings of the past: documented in docs/design.md."""
    trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    again = trainer(tmp_path, model_with(lora_dropout=0.1, compact=False), learning_rate=5e-3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert type(again.model.peft_config["default"]) is LoraConfig


def test_a_plain_lora_is_no_checkpoint_to_resume_from(tmp_path):
    plain = trainer(
        tmp_path / "plain", model_with(LoraConfig(r=4, target_modules=["0", "1", "2"])), callbacks=[],
        save_strategy="steps", save_steps=5,
    )  # fmt: skip
    plain.train()
    with pytest.raises(AdapterFileError, match="this is a plain LoRA, not a DynLora adapter"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-5"))


def test_a_callback_added_too_late_says_so(tmp_path):
    class AddsLate(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            run.add_callback(DynLoraCallback())

    run = trainer(tmp_path, model_with(init_r=2, target_r=2), callbacks=[AddsLate()])
    with pytest.raises(RuntimeError, match="added after training had begun"):
        run.train()


def test_two_dynamic_adapters_train_one_after_the_other(tmp_path):
    first = trainer(tmp_path)
    first.train()
    merged = first.model.merge_and_unload()
    second = get_peft_model(
        merged, DynLoraConfig(init_r=2, target_r=1, target_modules=["0", "1", "2"])
    )
    callback = DynLoraCallback()
    trainer(tmp_path, second, callbacks=[callback]).train()
    assert sum(callback.ranks.values()) == 3


def test_small_net_is_the_one_of_the_subprocess():
    assert [tuple(p.shape) for p in small_net().parameters()][::2] == [(7, 6), (5, 7), (4, 5)]
