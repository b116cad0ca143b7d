"""Trainers that run more than once: a smaller batch, several trials, one run after the other."""

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from lora_runs import ENDS, adapted, base, callback, logits, losses, ranks_of, trainer

FINAL = sorted(r for r in ENDS if r)


pytestmark = pytest.mark.slow  # several runs of Trainer a test


class OutOfMemoryOnce(TrainerCallback):
    """Raises what a full device raises, after one step of the first attempt."""

    def __init__(self, step):
        self.step = step
        self.attempts = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.attempts += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.attempts == 1 and state.global_step == self.step:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")


def test_auto_find_batch_size_begins_anew_before_the_cut(tmp_path):
    full = OutOfMemoryOnce(step=1)
    mine = callback()
    run = trainer(
        tmp_path, model=adapted(), callbacks=[mine], also=[full], auto_find_batch_size=True
    )
    run.train()
    assert full.attempts == 2
    assert sorted(ranks_of(run.model).values()) == FINAL
    assert mine.allocator.step == 10


def test_auto_find_batch_size_after_the_freeze_keeps_the_ranks_that_it_froze(tmp_path):
    full = OutOfMemoryOnce(step=8)
    mine = callback()
    run = trainer(
        tmp_path, model=adapted(), callbacks=[mine], also=[full], auto_find_batch_size=True
    )
    run.train()
    assert full.attempts == 2
    assert sorted(ranks_of(run.model).values()) == FINAL
    assert mine.ranks == {m.name: m.rank for m in mine.allocator.modules}
    assert sorted(mine.ranks.values()) == sorted(ENDS)


def test_hyperparameter_search_allocates_in_every_trial(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    mine = callback()
    ends = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            ends.append(sorted(ranks_of(model).values()))

    run = trainer(tmp_path, model_init=lambda _trial: adapted(), callbacks=[mine], also=[Note()])
    best = run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna",
        n_trials=2,
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
    )
    assert ends == [FINAL, FINAL]
    assert best.run_id is not None


def test_two_trainers_one_after_the_other_do_not_hear_of_each_other(tmp_path):
    first, second = callback(), callback()
    one = trainer(tmp_path / "1", model=adapted(), callbacks=[first])
    one.train()
    two = trainer(tmp_path / "2", model=adapted(), callbacks=[second])
    two.train()
    assert losses(one) == losses(two)
    assert ranks_of(one.model) == ranks_of(two.model)
    assert (first.allocator.step, second.allocator.step) == (10, 10)


def test_one_callback_serves_two_trainers(tmp_path):
    mine = callback()
    one = trainer(tmp_path / "1", model=adapted(), callbacks=[mine])
    one.train()
    two = trainer(tmp_path / "2", model=adapted(), callbacks=[mine])
    two.train()
    assert losses(one) == losses(two)
    assert ranks_of(one.model) == ranks_of(two.model)


def test_a_trainer_built_before_another_one_runs_keeps_its_own_model(tmp_path):
    one = trainer(tmp_path / "1", model=adapted(), callbacks=[callback()])
    two = trainer(tmp_path / "2", model=adapted(), callbacks=[callback()])
    two.train()
    one.train()
    assert losses(one) == losses(two)


def test_a_second_run_goes_on_from_a_compacted_model_to_a_smaller_one(tmp_path):
    model = adapted()
    trainer(tmp_path / "1", model=model, callbacks=[callback()]).train()
    before = sum(ranks_of(model).values())
    again = callback(score=None, target_r=1.0)
    trainer(tmp_path / "2", model=model, callbacks=[again]).train()
    present = len(again.allocator.modules)
    assert sum(ranks_of(model).values()) == present < before
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_a_second_train_of_one_trainer_keeps_the_ranks_of_the_first(tmp_path):
    mine = callback(score=None)
    run = trainer(tmp_path, model=adapted(), callbacks=[mine])
    run.train()
    ranks, weights = ranks_of(run.model), logits(run.model)
    run.train()
    assert ranks_of(run.model) == ranks
    assert not torch.equal(logits(run.model), weights)
    run.model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-6)
