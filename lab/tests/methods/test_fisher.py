"""Method ``fim``: Fisher information of B, ranks in proportion to it, and the budget."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from dynlora_lab.methods import AdapterOptions
from dynlora_lab.methods.config_fields import component_sizes
from dynlora_lab.methods.fisher import fisher_scores, proportional_ranks
from tiny_methods import adapted, batches, logits, scalings, target_of, tiny

MODULES = ["query", "intermediate.dense"]


def test_scores_are_the_mean_square_of_the_full_gradient_times_a():
    options = AdapterOptions(target_r=2, target_modules=MODULES)
    target, other = target_of(), tiny()
    set_seed(3)  # A is drawn
    scores = fisher_scores(options, target, rank=2)

    set_seed(3)
    config = LoraConfig(r=2, target_modules=MODULES)
    a = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight
        for name, module in get_peft_model(other, config).named_modules()
        if hasattr(module, "lora_A")
    }
    model = tiny()
    expected = dict.fromkeys(a, 0.0)
    for batch in batches()[:8]:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in a:
            of_b = model.get_submodule(name).weight.grad @ a[name].detach().T
            expected[name] += float(of_b.square().mean()) / 8
    assert scores == pytest.approx(expected, rel=1e-4)
    assert len(set(scores.values())) == 4


def test_scores_leave_the_model_as_it_was():
    target = target_of()
    fisher_scores(AdapterOptions(target_r=2), target, rank=2)
    assert [n for n, _ in target.model.named_parameters() if "lora_" in n] == []
    assert torch.equal(logits(target.model), logits(tiny()))


def test_ranks_are_in_proportion_to_the_scores_and_add_up():
    scores = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 2.0}
    sizes = dict.fromkeys(scores, 10)
    ranks = proportional_ranks(scores, sizes, rank=4, budget="components")
    assert ranks == {"a": 2, "b": 4, "c": 6, "d": 4}
    assert ranks == proportional_ranks(scores, sizes, rank=4, budget="parameters")


def test_what_a_module_cannot_take_goes_to_the_others():
    scores = {"a": 100.0, "b": 2.0, "c": 1.0, "d": 0.0}
    ranks = proportional_ranks(scores, dict.fromkeys(scores, 1), rank=3, budget="components")
    assert ranks == {"a": 6, "b": 3, "c": 2, "d": 1}


@pytest.mark.parametrize("budget", ["parameters", "components"])
def test_the_budget_is_used_up_in_its_unit(budget):
    scores = {"a": 5.0, "b": 1.5, "c": 0.5, "d": 2.0}
    sizes = {"a": 4, "b": 16, "c": 10, "d": 7}
    ranks = proportional_ranks(scores, sizes, rank=8, budget=budget)
    costs = sizes if budget == "parameters" else dict.fromkeys(sizes, 1)
    left = 8 * sum(costs.values()) - sum(costs[name] * rank for name, rank in ranks.items())
    assert 0 <= left < min(costs[name] for name, rank in ranks.items() if rank < 16)


def test_the_adapter_has_the_parameters_of_lora_and_ranks_that_differ():
    made, lora = adapted("fim"), adapted("lora")
    least = min(component_sizes(AdapterOptions(target_r=2), target_of()).values())
    assert lora.parameters() - least < made.parameters() <= lora.parameters()
    assert 1 <= min(made.ranks().values()) < max(made.ranks().values()) <= 4
    assert scalings(made.model) == scalings(lora.model)


def test_a_rank_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="target_r=1.5 must be a whole number for fim"):
        adapted("fim", AdapterOptions(target_r=1.5))
