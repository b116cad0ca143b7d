"""Mistakes of a first day: two callbacks, one used twice, a score that is none."""

import pytest
import torch

from dynlora import DynLoraCallback, RankAllocator
from small_net import adamw, adapted, attached, train
from test_trainer import trainer


def by_gate(layers, _step):
    for gated in layers:
        gated.ema.copy_(gated.gate.detach().abs())


# -- two allocators ------------------------------------------------------------------------------


def test_two_callbacks_are_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[DynLoraCallback(), DynLoraCallback()])
    with pytest.raises(ValueError, match="'default' has a RankAllocator on this optimizer already"):
        run.train()
    assert run.state.global_step == 0


def test_a_second_allocator_takes_over_once_the_first_is_detached():
    model, optimizer, first = attached()
    with pytest.raises(ValueError, match=r"detach\(\) the first"):
        RankAllocator(model, optimizer, total_steps=20)
    first.detach()
    second = RankAllocator(model, optimizer, total_steps=20)
    train(model, optimizer, 20)
    assert (first.step, second.step) == (0, 20)
    assert sum(second.ranks().values()) == second.target_components


def test_a_new_optimizer_takes_a_new_allocator_while_the_old_one_is_alive():
    model, _, first = attached()
    optimizer = adamw(model)
    second = RankAllocator(model, optimizer, total_steps=20)
    train(model, optimizer, 20)
    assert (first.step, second.step) == (0, 20)


# -- one callback, several runs ------------------------------------------------------------------


def test_training_on_after_the_end_says_that_the_adapter_is_plain(tmp_path):
    run = trainer(tmp_path)
    run.train()
    with pytest.raises(
        ValueError, match=r"plain LoRA: train it on without dynlora, or .* warm_start_"
    ):
        run.train()


def test_one_callback_serves_one_trainer_after_the_other(tmp_path):
    callback = DynLoraCallback()
    trainer(tmp_path / "first", callbacks=[callback]).train()
    first = callback.ranks
    trainer(tmp_path / "second", callbacks=[callback]).train()
    assert callback.ranks == first
    assert callback.allocator.step == 20


def test_an_interrupted_trainer_trains_anew_with_the_same_callback(tmp_path):
    callback = DynLoraCallback()
    run = trainer(tmp_path, callbacks=[callback])
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
    assert sum(callback.ranks.values()) == 6


# -- scores --------------------------------------------------------------------------------------


def test_the_name_of_an_importance_is_no_score():
    model = adapted()
    with pytest.raises(
        TypeError, match=r"score='norm' must be .* DynLoraConfig\(importance='norm'\)"
    ):
        RankAllocator(model, adamw(model), total_steps=20, score="norm")


def test_scores_that_are_returned_instead_of_written_are_refused_at_the_first_step():
    model = adapted()
    optimizer = adamw(model)
    allocator = RankAllocator(
        model, optimizer, total_steps=20, score=lambda layers, _: [m.gate for m in layers]
    )
    with pytest.raises(TypeError, match="score returned a list, which nobody reads"):
        train(model, optimizer, 1)
    assert allocator.history == []


def test_scores_that_were_never_written_prune_nothing():
    model = adapted()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=20, score=lambda *_: None)
    with pytest.raises(ValueError, match=r"score has left every layer.ema at 0 after \d+ steps"):
        train(model, optimizer, 20)
    assert all(bool(m.live.all()) for m in allocator.layers)


def test_a_nan_of_the_users_score_is_not_blamed_on_the_weights():
    def score(layers, step):
        by_gate(layers, step)
        layers[1].ema[0] = torch.nan

    model = adapted()
    optimizer = adamw(model)
    RankAllocator(model, optimizer, total_steps=20, score=score)
    with pytest.raises(
        FloatingPointError, match="in module 'layers.1' .* from your score function"
    ):
        train(model, optimizer, 20)


@pytest.mark.parametrize(("score", "name"), [(None, "share"), (by_gate, "own")])
def test_the_plan_names_what_components_are_ranked_by(score, name):
    model = adapted(importance="share")
    allocator = RankAllocator(model, adamw(model), total_steps=20, score=score)
    assert allocator.plan()["importance"] == name
