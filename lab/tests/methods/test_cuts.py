"""One trained LoRA at many sizes: what each cut is, and that the whole comes back."""

import pytest
import torch

from dynlora_lab.methods import AdapterOptions
from dynlora_lab.methods.cuts import RANKS
from tiny_methods import adapted, batches, logits


@pytest.fixture
def made():
    found = adapted("lora-cuts", AdapterOptions(target_r=6, init_r=6))
    optimizer = torch.optim.AdamW([p for p in found.model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        found.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_each_cut_is_of_its_size_and_both_orders_lose_more_as_they_shrink(made):
    whole = logits(made.model)
    distances = {}
    for cut in made.cuts():
        assert cut["parameters"] <= made.parameters() * cut["rank"] / 6
        assert cut["parameters"] > made.parameters() * (cut["rank"] - 0.5) / 6
        distances[cut["order"], cut["rank"]] = float((logits(made.model) - whole).norm())
    ranks = [rank for rank in RANKS if rank < 6]
    assert list(distances) == [(o, r) for o in ("singular values", "curvature") for r in ranks]
    for order in ("singular values", "curvature"):
        assert distances[order, 5] < distances[order, 2] < distances[order, 0]
    assert distances["curvature", 0] == pytest.approx(distances["singular values", 0])
    assert torch.equal(logits(made.model), whole)


def test_the_gradients_that_are_measured_train_nothing(made):
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    for _ in made.cuts():
        pass
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert all(p.grad is None for p in made.model.parameters())
