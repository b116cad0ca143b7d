"""A plain loop goes on from a saved state bit for bit, or is told why it cannot."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from small_net import adamw, adapted, allocated, attached, small_net, train

RUN = {"total_steps": 40, "prune_interval": 3, "target_r": 0.5}


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("fields", [{}, {"compact": False}, {"gated": True}], ids=str)
@pytest.mark.parametrize("stop_at", [2, 9, 19, 20, 21, 33])
def test_a_plain_loop_resumes_bit_for_bit(stop_at, fields):
    fields = {**RUN, **fields}
    model, optimizer, allocator = attached(**fields)
    expected = train(model, optimizer, 40)
    first, optimizer, one = attached(**fields)
    losses = train(first, optimizer, stop_at)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), one.state_dict()))
    second = adapted(seed=99, **fields)
    optimizer = adamw(second)
    two = allocated(second, optimizer, **fields)  # before the weights: it lets the ranks follow
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    two.load_state_dict(through_json(saved[2]))
    losses += train(second, optimizer, 40 - stop_at)
    assert losses == expected
    assert two.ranks() == allocator.ranks()
    assert 0 in two.ranks().values()
    assert two.history == allocator.history
    whole, parts = model.state_dict(), second.state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert two.finalize_() == allocator.finalize_()
    one_config, other = (m.peft_config["default"].to_dict() for m in (model, second))
    assert one_config == other


@pytest.mark.parametrize("back_to", [4, 15])
def test_a_run_goes_back_to_a_state_from_before_the_freeze(back_to):
    """As ``load_best_model_at_end`` does; a module that was dropped comes back."""
    model, optimizer, allocator = attached(**RUN)
    train(model, optimizer, back_to)
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, 40 - back_to)
    assert 0 in allocator.ranks().values()
    model.load_state_dict(saved)
    found = model.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[k], saved[k]) for k in saved)
    assert [m.rank for m in allocator.modules] == [4, 4, 4]
    assert model.peft_config["default"].exclude_modules is None


def saved_progress(steps=8, **fields):
    model, optimizer, allocator = attached(**fields)
    train(model, optimizer, steps)
    return model.state_dict(), allocator.state_dict()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 50}, "total_steps=50 differs from the interrupted run's 40"),
        ({"target_r": 3}, "target_r=3 differs from the interrupted run's 2"),
        ({"min_r": 1}, "min_r=1 differs from the interrupted run's 0"),
        ({"prune_end": 0.7}, "prune_end=0.7 differs"),
        ({"prune_interval": 5}, "prune_interval=5 differs from the interrupted run's 10"),
        ({"ema_beta": 0.5}, "ema_beta=0.5 differs from the interrupted run's 0.9"),
        ({"revival": True}, "revival=True differs"),
        ({"importance": "share"}, "importance='share' differs from the interrupted run's 'sens"),
        (
            {"budget": "components"},
            "budget='components' differs from the interrupted run's 'parameters'",
        ),
        ({"dem_weight": 0.5}, "dem_weight=0.5 differs from the interrupted run's 0.0"),
        ({"lora_alpha": 32}, "scaling=8.0 of module 'layers.0' differs from the .* run's 2.0"),
    ],
    ids=str,
)
def test_resuming_another_plan_is_refused(fields, message, gated):
    weights, progress = saved_progress(gated=gated)
    model, _, allocator = attached(gated=gated, **fields)
    model.load_state_dict(weights)
    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict(progress)
    assert allocator.step == 0


def own_score(modules, _step):
    for module in modules:
        module.ema.copy_(module.probes[0].parameter.detach().square().sum(0))


def test_a_run_with_a_score_of_ones_own_is_not_resumed_without_it():
    model, optimizer, allocator = attached(score=own_score)
    train(model, optimizer, 3)
    _, _, other = attached()
    with pytest.raises(
        ValueError, match="importance='sensitivity' differs from the interrupted run's 'own'"
    ):
        other.load_state_dict(allocator.state_dict())
    _, _, again = attached(score=own_score)
    again.load_state_dict(allocator.state_dict())
    assert again.step == 3


def test_an_allocator_built_after_the_weights_says_that_it_must_be_built_before():
    model, optimizer, allocator = attached(**RUN)
    train(model, optimizer, 25)
    second = adapted()
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        second.load_state_dict(model.state_dict())
    third = allocated(second, adamw(second), **RUN)
    with pytest.raises(ValueError, match=r"build the RankAllocator before model.load_state_dict"):
        third.load_state_dict(allocator.state_dict())


def test_a_model_that_has_the_final_ranks_already_is_sent_on_without_dynlora(tmp_path):
    """As by a framework that builds the adapter from the checkpoint."""
    model, optimizer, allocator = attached(**RUN | {"target_r": 0.5})
    train(model, optimizer, 25)
    assert 0 in allocator.ranks().values()
    model.save_pretrained(tmp_path)
    built = PeftModel.from_pretrained(small_net(), tmp_path, is_trainable=True)
    again = allocated(built, adamw(built), **RUN | {"target_r": 0.5})
    with pytest.raises(ValueError, match="final ranks already: resume without dynlora"):
        again.load_state_dict(allocator.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"step": None}, "state holds step=None, which must be of type int"),
        ({"step": True}, "state holds step=True, which must be of type int"),
        ({"step": 41}, r"step from 0 to 40 \(here 41\)"),
        ({"step": -1}, r"step from 0 to 40 \(here -1\)"),
        ({"window": [9, 3]}, r"damaged.* window .*\(here \[9, 3\]\)"),
        ({"window": [True, "x"]}, r"damaged.* window .*\(here \[True, 'x'\]\)"),
        ({"history": [3]}, "state is damaged"),
        ({"modules": {"x": 2.0}}, r"modules differ .*: adapted only there are \['x'\]"),
        ({"modules": {}}, r"modules differ .* only here \['layers.0', 'layers.1', 'layers.2'\]"),
        ({"modules": {f"layers.{i}": "2" for i in range(3)}}, "scaling=2.0 .* run's '2'"),
        ({"scores": {}}, "state holds no scores of module 'layers.0'"),
        ({"version": 99}, "state has version 99, but this dynlora reads version 2"),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    weights, progress = saved_progress(steps=3)
    model, _, allocator = attached()
    model.load_state_dict(weights)
    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict({**progress, **damage})
    assert allocator.step == 0
    allocator.load_state_dict(progress)
    assert allocator.step == 3


@pytest.mark.parametrize("state", [{}, [1], None, "x"], ids=str)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state=.* does not come from RankAllocator.state_dict"):
        attached()[2].load_state_dict(state)


def test_scores_that_are_not_finite_are_refused():
    weights, progress = saved_progress()
    progress["scores"]["layers.2"]["ema"][0] = float("inf")
    model, _, allocator = attached()
    model.load_state_dict(weights)
    with pytest.raises(ValueError, match="module 'layers.2' that are not finite"):
        allocator.load_state_dict(progress)


def test_a_field_that_is_missing_is_named():
    _, progress = saved_progress()
    del progress["ema_beta"]
    with pytest.raises(ValueError, match=r"state is damaged.*\(missing: ema_beta\)"):
        attached()[2].load_state_dict(progress)
