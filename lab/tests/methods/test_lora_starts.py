"""Method ``lora`` with PEFT's starts, LoRA+, and on a part of the modules."""

import pytest
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification, TrainingArguments

from dynlora_lab.methods import METHODS, AdapterOptions, Target
from dynlora_lab.methods.options import STARTS
from dynlora_lab.tasks.plan import plan
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from tiny_classifier import save_encoder, save_texts
from tiny_methods import HEAD, adapted, batches, logits, scalings, tiny

# torch's, of PEFT's hooks on layers that no trained weight stands before
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")

REWRITING = ("lora_ga", "olora", "pissa", "pissa_niter_4")


def lora(**fields):
    return adapted("lora", AdapterOptions(target_r=2, **fields))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_encoder(folder / "tiny"), str(save_texts(folder / "texts.csv"))


@pytest.fixture
def recipe(tmp_path, inputs):
    model, data = inputs

    def make(**fields):
        values = {
            "task": "text-classification",
            "model": model,
            "method": "lora",
            "output": str(tmp_path / "out"),
            "data": {"name": data},
            "adapter": {"target_r": 2, **fields},
            "training": {
                "learning_rate": 1e-2,
                "max_steps": 4,
                "per_device_train_batch_size": 8,
                "eval_strategy": "no",
                "save_strategy": "no",
            },
        }
        return recipe_from(values)

    return make


@pytest.mark.parametrize("start", [*STARTS, "pissa_niter_4"])
def test_no_start_changes_the_function_or_the_number_of_components(start):
    made = lora(init_lora_weights=start)
    assert torch.allclose(logits(made.model), logits(tiny()), atol=1e-6)
    assert made.model.peft_config["default"].init_lora_weights == start
    assert sum(made.ranks().values()) == 2 * 13
    assert scalings(made.model) == {4.0}  # lora_alpha 8 over target_r 2


def a_and_b(model):
    return [
        (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for module in model.modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]


def test_evas_rows_are_orthonormal_directions_of_the_inputs_with_ranks_of_their_own():
    made = lora(init_lora_weights="eva")
    assert len(set(made.ranks().values())) > 1
    for a, b in a_and_b(made.model):
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)
        assert not b.any()


def test_evas_directions_depend_on_the_tokens_that_count_alone():
    def start(padding):
        def padded():
            return [
                {
                    "input_ids": torch.cat([b["input_ids"], torch.full((8, 2), padding)], 1),
                    "attention_mask": torch.nn.functional.pad(b["attention_mask"], (0, 2)),
                    "labels": b["labels"],
                }
                for b in batches()
            ]

        target = Target(model=tiny(), head=HEAD, task_type="SEQ_CLS", seed=0, batches=padded)
        options = AdapterOptions(target_r=2, init_lora_weights="eva")
        return a_and_b(METHODS["lora"](options, target).model)

    for (a, _), (other, _) in zip(start(3), start(17), strict=True):
        assert torch.allclose(a, other, atol=1e-4)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_lora_gas_rows_are_the_first_directions_of_the_gradient():
    model = without_dropout(tiny())
    options = AdapterOptions(target_r=2, init_lora_weights="lora_ga")
    made = adapted("lora", options, without_dropout(tiny()))
    for batch in batches()[:8]:
        model(**batch).loss.backward()
    gradient = model.bert.encoder.layer[0].output.dense.weight.grad
    _, _, vt = torch.linalg.svd(gradient)
    layer = made.model.base_model.model.bert.encoder.layer[0].output.dense
    rows = layer.lora_A["default"].weight
    assert torch.allclose((rows @ vt[:2].T).abs(), torch.eye(2), atol=1e-2)


def test_rslora_scales_by_the_square_root_of_the_rank():
    assert scalings(lora(use_rslora=True).model) == {8 / 2**0.5}


def test_loraplus_trains_b_faster(tmp_path):
    made = lora(loraplus_lr_ratio=16)
    arguments = TrainingArguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, report_to="none")
    groups = made.optimizer(arguments).param_groups
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for a, b in a_and_b(made.model):
        assert rates[id(a)] == (1e-3, 0.1)
        assert rates[id(b)] == (pytest.approx(16e-3), 0.1)
    assert len(rates) == sum(p.requires_grad for p in made.model.parameters())


def test_the_trainer_takes_the_optimizer_of_loraplus(recipe):
    optimizer = run(recipe(loraplus_lr_ratio=16)).trainer.optimizer
    first = {g["initial_lr"] for g in optimizer.param_groups if g["params"]}
    assert first == {0.01, 0.16}


@pytest.mark.parametrize(
    ("placement", "in_attention"), [("attention", True), ("feed-forward", False)]
)
def test_a_part_of_the_modules_gets_the_parameters_of_the_whole(placement, in_attention):
    made = lora(placement=placement)
    assert {"attention" in name for name in made.ranks()} == {in_attention}
    ranks = made.ranks().values()
    assert max(ranks) - min(ranks) == 1
    whole = adapted("lora").parameters()
    component = 16 + (16 if in_attention else 24)
    assert abs(made.parameters() - whole) <= component / 2
    assert scalings(made.model) == {4.0}


def test_a_part_without_modules_is_refused():
    with pytest.raises(ValueError, match="placement='attention' leaves no module: target_modules"):
        lora(placement="attention", target_modules=["intermediate.dense"])


@pytest.mark.parametrize("start", ["eva", *REWRITING])
def test_what_a_run_from_a_start_saves_is_a_plain_lora_over_the_base_as_it_was(start, recipe):
    chosen = recipe(init_lora_weights=start)
    result = run(chosen)
    batch = {"input_ids": torch.tensor([[2, 4, 9, 3]])}
    with torch.no_grad():
        expected = result.trainer.model.eval()(**batch).logits
        base = BertForSequenceClassification.from_pretrained(chosen.model)
        again = PeftModel.from_pretrained(base, chosen.output).eval()(**batch).logits
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("start", ["eva", "lora_ga", "pissa"])
def test_a_dry_run_counts_without_computing_a_start(start, recipe):
    counted = plan(recipe(init_lora_weights=start)).parameters["adapter_start"]
    assert counted == plan(recipe()).parameters["adapter_start"]
