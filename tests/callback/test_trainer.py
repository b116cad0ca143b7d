"""One argument beside a LoRA script: transformers.Trainer with DynLoraCallback."""

import contextlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from dynlora import DynLoraCallback, NotFiniteError, dem_loss
from small_trainer import (
    SAVE_ALL,
    StopsAt,
    WithLoss,
    callback_with,
    logits,
    losses_of,
    model_with,
    rows,
    trainer,
    trainer_of,
    weights,
)

POOR = {"target_r": 0.5}  # modules end at rank 0
both_kinds = pytest.mark.parametrize("gated", [False, True])


class Witness(TrainerCallback):
    """Sees the model at the end of training, before pruned components leave it."""

    def on_train_end(self, args, state, control, *, model, **_kwargs):
        self.logits = logits(model)


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


# -- one argument --------------------------------------------------------------------------------


@both_kinds
def test_one_argument_makes_a_plain_small_lora_with_the_same_function(tmp_path, gated):
    witness = Witness()
    run, callback = trainer_of(tmp_path, gated=gated, callbacks=[witness], **POOR)
    run.train()
    assert type(run.model.peft_config["default"]) is LoraConfig
    assert type(run.model.base_model) is LoraModel
    torch.testing.assert_close(logits(run.model), witness.logits, rtol=0, atol=1e-5)
    assert 0 in callback.ranks.values()
    assert sum(p.numel() for p in weights(run.model).values()) <= 0.5 * 34
    assert callback.history[-1]["ranks"] == callback.ranks


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_until_the_first_cut_the_run_is_the_one_without_the_callback(tmp_path, optimizer):
    """Losses, weights and optimizer state at step 9, with clipping, accumulation and dropout."""
    arguments = {
        "optim": optimizer, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05,
        "per_device_train_batch_size": 4, "weight_decay": 0.1, "warmup_steps": 3,
        "save_strategy": "steps", "save_steps": 9,
    }  # fmt: skip
    fields = {"prune_interval": 7, "dropout": 0.1, "lora_dropout": 0.1}
    ends = {}
    for kind, callbacks in (("with", [callback_with(**fields)]), ("without", [])):
        run = trainer(tmp_path / kind, model_with(**fields), callbacks, **arguments)
        run.train()
        folder = tmp_path / kind / "checkpoint-9"
        state = torch.load(folder / "optimizer.pt")
        ends[kind] = losses_of(run)[:9], state, (folder / "adapter_model.safetensors").read_bytes()
        configs = json.loads((folder / "adapter_config.json").read_text())
        assert configs["peft_type"] == "LORA"
    assert ends["with"][0] == ends["without"][0]
    torch.testing.assert_close(ends["with"][1], ends["without"][1], rtol=0, atol=0)
    assert ends["with"][2] == ends["without"][2]


def test_the_config_of_the_user_is_never_changed(tmp_path):
    config = LoraConfig(r=4, target_modules=["0", "1", "2"])
    before = config.to_dict()
    from peft import get_peft_model

    torch.manual_seed(0)
    trainer(tmp_path, get_peft_model(WithLoss(), config), [callback_with(**POOR)]).train()
    assert config.to_dict() == before


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
        self.before, self.after, self.expected = {}, {}, None

    def on_pre_optimizer_step(self, args, state, control, *, model, **_kwargs):
        self.before = self.before or grads(model)
        self.expected = self.expected or dem_grads(model)

    def on_optimizer_step(self, args, state, control, *, model, **_kwargs):
        self.after = self.after or grads(model)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dem_grads(model):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
    gradient = torch.autograd.grad(dem_loss(model), list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, gradient, strict=True) if g is not None}


@pytest.mark.parametrize(("cls", "accumulation"), [(Trainer, 1), (CustomLoss, 4)])
def test_the_dem_gradient_is_autograds(tmp_path, cls, accumulation):
    kept = KeepFirstGradients()
    run = trainer(
        tmp_path, cls=cls, gradient_accumulation_steps=accumulation,
        callbacks=[callback_with(dem_weight=0.3), kept],
    )  # fmt: skip
    run.train()
    assert len(kept.expected) == 6  # A and B of three modules
    for name, penalty in kept.expected.items():
        added = kept.after[name] - kept.before[name]
        torch.testing.assert_close(added, 0.3 * penalty, rtol=1e-5, atol=1e-7)


def test_accumulated_micro_batches_count_as_one_step(tmp_path):
    run, callback = trainer_of(
        tmp_path,
        arguments={
            "max_steps": 12, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2
        },
    )  # fmt: skip
    run.train()
    assert callback.allocator.step == 12
    assert callback.allocator.is_frozen


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"compact": False}, {"gated": True}], ids=str)
def test_a_run_resumes_bit_for_bit_from_any_checkpoint(tmp_path, fields):
    fields = {**POOR, **fields}
    whole, _ = trainer_of(tmp_path, arguments=SAVE_ALL, **fields)
    whole.train()
    for step in (1, 7, 10, 11, 20):  # before, inside, at and after the freeze at step 10
        resumed, callback = trainer_of(tmp_path, **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed)[:20] == losses_of(whole)
        assert_same(weights(resumed.model), weights(whole.model))
        configs = [run.model.peft_config["default"].to_dict() for run in (resumed, whole)]
        assert configs[0] == configs[1]
    assert 0 in callback.ranks.values()


def best_at(step):
    """Metrics that are best at one step of evaluations at every second one."""

    def metrics(prediction):
        metrics.logits.append(torch.tensor(prediction.predictions))
        return {"score": float(2 * len(metrics.logits) == step)}

    metrics.logits = []
    return metrics


def warned_of_a_large_best_model():
    return pytest.warns(UserWarning, match="weights are of a checkpoint from before the freeze")


BEST = {
    "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True,
}  # fmt: skip


@both_kinds
@pytest.mark.parametrize("best", [4, 8, 10, 18])  # the window is 3 to 10
def test_load_best_model_at_end_gives_the_best_models_function(tmp_path, best, gated):
    """Before the freeze it has more components than the budget."""
    run, callback = trainer_of(tmp_path, gated=gated, arguments=BEST, **POOR)
    run.compute_metrics = metrics = best_at(best)
    with warned_of_a_large_best_model() if best < 10 else contextlib.nullcontext():
        run.train()
    x = torch.stack([row["x"] for row in rows()[:16]])
    found = run.model.eval()(x)["logits"].detach()
    torch.testing.assert_close(found, metrics.logits[best // 2 - 1], rtol=0, atol=1e-5)
    size = sum(p.numel() for p in weights(run.model).values())
    assert (size <= 17) == (best >= 10)
    assert callback.ranks == {
        n: m.r.get("default", 0) if hasattr(m, "r") else 0
        for n, m in run.model.get_base_model().named_modules()
        if n in callback.ranks
    }


def test_the_best_model_from_before_the_freeze_survives_a_resume_from_after_it(tmp_path):
    def run(best):
        made, _ = trainer_of(tmp_path, arguments=BEST, **POOR)
        made.compute_metrics = best_at(best)
        return made

    whole, resumed = run(8), run(None)
    with warned_of_a_large_best_model():
        whole.train()
    with warned_of_a_large_best_model():
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert_same(weights(resumed.model), weights(whole.model))


STOPPED = {**BEST, "save_steps": 1, "eval_steps": 1}


def test_early_stopping_before_the_freeze_warns_and_keeps_the_function(tmp_path):
    run, _ = trainer_of(tmp_path, callbacks=[EarlyStoppingCallback(2)], arguments=STOPPED)
    run.compute_metrics = lambda _prediction: {"score": 1.0}
    with pytest.warns(UserWarning, match="ended after 3 of 20 steps, before the ranks are frozen"):
        run.train()
    assert sum(p.numel() for p in weights(run.model).values()) == 4 * 34


def test_early_stopping_cuts_to_the_target_if_it_is_asked_to(tmp_path):
    arguments = {k: v for k, v in STOPPED.items() if k != "load_best_model_at_end"}
    run, callback = trainer_of(
        tmp_path, callbacks=[StopsAt(5)], arguments=arguments, freeze_on_stop=True, **POOR
    )
    run.compute_metrics = lambda _prediction: {"score": 1.0}
    run.train()
    assert callback.allocator.is_frozen
    assert 0 < sum(p.numel() for p in weights(run.model).values()) <= 17


@both_kinds
def test_a_checkpoint_loads_with_its_ragged_ranks(tmp_path, gated):
    run, _ = trainer_of(tmp_path, gated=gated, arguments={**SAVE_ALL, "save_steps": 10}, **POOR)
    run.train()
    loaded = PeftModel.from_pretrained(with_loss(), str(tmp_path / "checkpoint-20"))
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-5)


def with_loss():
    torch.manual_seed(0)
    return WithLoss()


# -- several runs --------------------------------------------------------------------------------


def test_one_callback_serves_one_trainer_after_the_other(tmp_path):
    callback = callback_with(**POOR)
    trainer(tmp_path / "first", callbacks=[callback]).train()
    first = callback.ranks
    trainer(tmp_path / "second", callbacks=[callback]).train()
    assert callback.ranks == first
    assert callback.allocator.step == 20


def test_an_interrupted_trainer_trains_anew_with_the_same_callback(tmp_path):
    run, callback = trainer_of(tmp_path)
    step = run.training_step

    def interrupted(*args, **kwargs):
        if run.state.global_step == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    run.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.training_step = step
    run.train()
    assert callback.allocator.step == 20
    assert callback.allocator.is_frozen


@both_kinds
@pytest.mark.parametrize("target_r", [0.8, "auto"])
def test_a_new_trainer_goes_on_from_what_an_interrupted_one_has_cut(tmp_path, gated, target_r):
    """A notebook cell stopped after the freeze and run again: modules of rank 0 are in the model."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_kwargs):
            if state.global_step == 15:
                raise KeyboardInterrupt

    first, before = trainer_of(
        tmp_path / "first", gated=gated, callbacks=[Interrupt()], target_r=0.8
    )
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert before.allocator.is_frozen
    left = sum(before.allocator.ranks().values())
    assert 0 in before.allocator.ranks().values()
    if gated:
        first.model.peft_config["default"].target_r = target_r
    again = callback_with(gated=gated, target_r=target_r)
    trainer(tmp_path / "second", first.model, [again]).train()
    assert again.allocator.step == 20
    assert 0 < sum(again.ranks.values()) <= left


def test_a_second_run_on_what_came_out_makes_it_smaller(tmp_path):
    """Modules of rank 0 of the first run are not there any more, and nothing trips over them."""
    first, callback = trainer_of(tmp_path / "first", target_r=1)
    first.train()
    first.save_model(str(tmp_path / "out"))
    model = PeftModel.from_pretrained(with_loss(), tmp_path / "out", is_trainable=True)
    again = callback_with(target_r=0.6, budget="components")
    trainer(tmp_path / "second", model, [again]).train()
    assert again.ranks.keys() == {name for name, rank in callback.ranks.items() if rank}
    assert sum(again.ranks.values()) < sum(callback.ranks.values())


def test_a_model_built_by_model_init_takes_the_callback_too(tmp_path):
    callback = callback_with(**POOR)
    run = trainer(tmp_path, callbacks=[callback])
    run.model_init = lambda: model_with()
    run.train()
    assert 0 in callback.ranks.values()


@both_kinds
def test_two_adapters_train_one_after_the_other(tmp_path, gated):
    first, _ = trainer_of(tmp_path, gated=gated)
    first.train()
    from peft import get_peft_model

    second = get_peft_model(
        first.model.merge_and_unload(), LoraConfig(r=2, target_modules=["0", "1", "2"])
    )
    callback = callback_with(target_r=1)
    trainer(tmp_path, second, callbacks=[callback]).train()
    assert sum(p.numel() for p in weights(second).values()) <= 34


# -- resuming what cannot be resumed -------------------------------------------------------------


def checkpointed(tmp_path, **fields):
    trainer_of(tmp_path, arguments={**SAVE_ALL, "save_steps": 5}, **fields)[0].train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_r": 3}, "target_r=3 differs from the interrupted run's 2"),
        ({"dem_weight": 0.3}, "dem_weight=0.3 differs"),
        ({"importance": "norm"}, "importance='norm' differs"),
        ({"lora_alpha": 99}, "scaling=24.75 of module 'net.layers.0' differs"),
    ],
    ids=str,
)
@both_kinds
def test_resuming_with_other_settings_is_refused(tmp_path, fields, message, gated):
    checkpointed(tmp_path, gated=gated)
    for step in (5, 15):  # in the window and after it
        again, _ = trainer_of(tmp_path, gated=gated, **fields)
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_resuming_with_another_number_of_steps_is_refused(tmp_path):
    checkpointed(tmp_path)
    again, _ = trainer_of(tmp_path, arguments={"max_steps": 40})
    with pytest.raises(ValueError, match="total_steps=40 differs from the interrupted run's 20"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_what_may_change_at_a_resume_changes_nothing_else(tmp_path):
    """Learning rate, dropout, compact: documented in docs/design.md."""
    checkpointed(tmp_path)
    again, callback = trainer_of(
        tmp_path, lora_dropout=0.1, compact=False, arguments={"learning_rate": 5e-3}
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.allocator.step == 20


@pytest.mark.parametrize("gated", [False])
def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path, gated):
    run = trainer(tmp_path, model_with(), callbacks=[], **{**SAVE_ALL, "save_steps": 5})
    run.train()
    again, _ = trainer_of(tmp_path)
    with pytest.raises(
        ValueError, match="checkpoint at step 5 holds no progress of DynLoraCallback"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def by_size(modules, _step):
    for module in modules:
        module.ema.copy_(module.probes[0].parameter.detach().square().sum(0))


def test_a_run_with_a_score_of_ones_own_is_resumed_with_it_and_not_without(tmp_path):
    whole, _ = trainer_of(tmp_path, score=by_size, arguments=SAVE_ALL, **POOR)
    whole.train()
    for step in (7, 15):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        again, callback = trainer_of(tmp_path, score=by_size, **POOR)
        again.train(resume_from_checkpoint=checkpoint)
        assert_same(weights(again.model), weights(whole.model))
        assert callback.ranks
        other, _ = trainer_of(tmp_path, **POOR)
        with pytest.raises(ValueError, match="differs from the interrupted run's 'own'"):
            other.train(resume_from_checkpoint=checkpoint)


def test_callbacks_rebuilt_from_a_checkpoint_are_refused(tmp_path):
    """They would lose their functions, and the user's own callback would stay empty."""
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True would"):
        trainer_of(tmp_path, arguments={"restore_callback_states_from_checkpoint": True})


class Subclass(DynLoraCallback):
    """A callback of the user's own kind."""


def test_a_subclass_of_the_callback_resumes(tmp_path):
    whole = trainer(tmp_path, callbacks=[Subclass(0.5, prune_interval=3)], **SAVE_ALL)
    whole.train()
    again = trainer(tmp_path, callbacks=[Subclass(0.5, prune_interval=3)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(weights(again.model), weights(whole.model))


# -- failing loudly ------------------------------------------------------------------------------


def test_gates_without_the_callback_fail_at_the_first_step(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"Add callbacks=\[DynLoraCallback\(\)\] to your Trainer"
    ):
        trainer(tmp_path, model_with(gated=True), callbacks=[]).train()


def test_the_callback_without_an_adapter_fails_before_the_first_step(tmp_path):
    run = trainer(tmp_path, WithLoss())
    with pytest.raises(ValueError, match="no LoRA adapter"):
        run.train()
    assert run.state.global_step == 0


def test_a_wrong_setting_fails_when_the_callback_is_made():
    with pytest.raises(TypeError, match="DynLoraCallback has no argument 'prune_stop'"):
        DynLoraCallback(8, prune_stop=0.5)
    with pytest.raises(ValueError, match="target_r is missing"):
        DynLoraCallback(prune_end=0.5)
    with pytest.raises(ValueError, match=r"ema_beta=2 must lie in \[0, 1\)"):
        DynLoraCallback(8, ema_beta=2)


def test_two_callbacks_are_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[callback_with(), callback_with()])
    with pytest.raises(ValueError, match="'default' already has a RankAllocator on this optimizer"):
        run.train()
    assert run.state.global_step == 0


class SwapsOptimizer(TrainerCallback):
    """Replaces the stepping of the optimizer behind everybody's back."""

    def on_train_begin(self, args, state, control, *, optimizer, **_kwargs):
        optimizer.step = lambda *_a, **_k: None


@pytest.mark.filterwarnings(
    "ignore:Seems like `optimizer.step"
)  # torch notices too, but only warns
def test_an_optimizer_that_is_not_stepped_is_noticed_at_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[callback_with(), SwapsOptimizer()])
    with pytest.raises(RuntimeError, match="finished step 1, but the optimizer .* was not stepped"):
        run.train()


def test_a_callback_added_too_late_says_so(tmp_path):
    class AddsLate(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            run.add_callback(callback_with())

    run = trainer(tmp_path, callbacks=[AddsLate()])
    with pytest.raises(RuntimeError, match="added after training had begun"):
        run.train()


class SpoilsABatch(Trainer):
    """The loss of one step is NaN."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == self.spoil else loss


@pytest.mark.parametrize("spoil", [2, 8, 12])
@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_a_nan_is_named_before_a_spoiled_weight_is_saved(tmp_path, monkeypatch, where, spoil):
    if where == "accelerator":
        for module in ("allocator", "checks"):
            monkeypatch.setattr(
                f"dynlora.allocator.{module}.reading_is_free", lambda _modules: False
            )
    arguments = {**SAVE_ALL, "logging_strategy": "no"}
    run = trainer(tmp_path, cls=SpoilsABatch, callbacks=[callback_with(**POOR)], **arguments)
    run.spoil = spoil
    with pytest.raises(NotFiniteError, match=f"NaN or infinite gradient .*step {spoil + 1}"):
        run.train()
    saved = sorted(int(f.name.rpartition("-")[2]) for f in tmp_path.glob("checkpoint-*"))
    assert saved == list(range(1, spoil + 1))
