"""deepcopy of the model in the middle of a run."""

import copy

import pytest
import torch

from lora_runs import adapted, logits, ranks_of, train

MOMENTS = {"before the window": 1, "inside the window": 4, "after the freeze": 8}


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
def test_a_deep_copy_does_not_change_with_the_run(steps):
    model = adapted()
    copies = []

    def copy_once(allocator):
        if allocator.step == steps:
            copies.append((copy.deepcopy(model), logits(model), ranks_of(model)))

    train(model, each=copy_once)
    twin, then, ranks = copies[0]
    assert torch.equal(logits(twin), then)
    assert ranks_of(twin) == ranks


def test_a_run_with_copies_ends_where_it_ends_without():
    plain, copied = adapted(), adapted()
    _, expected = train(plain)
    _, found = train(copied, each=lambda _: copy.deepcopy(copied))
    assert found == expected


def test_a_deep_copy_from_before_the_cut_can_be_trained_by_an_allocator_of_its_own():
    model = adapted()
    train(model, steps=1)
    twin = copy.deepcopy(model)
    train(twin)[0].finalize_()
    assert ranks_of(model) != ranks_of(twin)
    assert set(ranks_of(model).values()) == {4}
