"""Whole runs of a recipe on a tiny model: what they leave, what is equal, how they go on."""

import json
import os
import signal

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from dynlora.lora.components import find_components
from dynlora_lab.methods import METHODS
from dynlora_lab.tasks import run as run_module
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.interrupt import Interrupted
from dynlora_lab.tasks.model_card import card
from dynlora_lab.tasks.plan import plan
from dynlora_lab.tasks.progress import Listener
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from dynlora_lab.tasks.training import planned_steps, training_arguments
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_classifier import save_encoder, save_texts

# PEFT takes a module that its AdaLoRA cut to rank 0 for a shard that was not gathered
pytestmark = pytest.mark.filterwarnings(r"ignore:.*LoRA tensor\(s\) have invalid shape")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_encoder(folder / "tiny"), str(save_texts(folder / "texts.csv"))


@pytest.fixture
def recipe(tmp_path, inputs):
    model, data = inputs

    def make(method="dynlora", output="out", **training):
        values = {
            "task": "text-classification",
            "model": model,
            "method": method,
            "output": str(tmp_path / output),
            "data": {"name": data},
            "adapter": {"target_r": 2, "prune_interval": 2},
            "training": {
                "learning_rate": 1e-2,
                "max_steps": 10,
                "per_device_train_batch_size": 8,
                "eval_strategy": "no",
                "save_strategy": "no",
                **training,
            },
        }
        return recipe_from(values)

    return make


PRUNING = (
    "dynlora",
    "dynlora-gated",
    "random",
    "lora-svd",
    "cont-squeeze",
    "in-squeeze",
    "dynlora-rotated",
)


def record_of(recipe):
    return json.loads((recipe.output / "run.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_leaves_its_record_weights_and_card(method, recipe):
    chosen = recipe(method)
    run(chosen)
    record = record_of(chosen)
    assert record["status"] == "done"
    assert record["recipe"]["method"] == method
    assert record["steps"] == 10
    assert record["data"] == {"labels": ["neg", "pos"], "train_rows": 40, "eval_rows": {"": 8}}
    assert set(record["metrics"]) >= {"eval_loss", "eval_accuracy"}
    assert record["evaluations"][0]["step"] == 0
    assert record["budget"]["head_parameters"] == 2 * 16 + 2
    budget = record["budget"]
    if method in (*PRUNING, "adalora", "lora-initial"):
        assert budget["components_start"] == 3 * 13
    if method in ("lora", "gated", "adalora"):
        assert budget["components_end"] == sum(record["ranks"].values()) == 2 * 13
    if method in PRUNING:
        lora = plan(recipe("lora")).parameters["adapter_start"]
        assert 0.9 * lora < budget["parameters_end"] <= lora
        assert budget["components_end"] == sum(record["ranks"].values())
    card = (chosen.output / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == chosen.model
    assert f"| accuracy | {record['metrics']['eval_accuracy']:.4f} |" in card
    assert [*chosen.output.glob("*.safetensors")]
    assert (chosen.output / "tokenizer.json").is_file()


@pytest.mark.parametrize("method", ["dynlora", "lora-svd", "bitfit", "full"])
def test_the_model_card_tells_how_to_load_what_was_measured(method, recipe):
    chosen = recipe(method)
    result = run(chosen)
    code = (chosen.output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("this-folder", str(chosen.output)), names)  # noqa: S102 (it is our own card)
    assert isinstance(names["model"], PeftModel) == (method in ("dynlora", "lora-svd"))
    classes = result.trainer.model.config.id2label
    assert names["model"].config.id2label == classes
    assert set(classes.values()).isdisjoint({"LABEL_0", "LABEL_1"})
    batch = {"input_ids": torch.tensor([[2, 4, 9, 3]])}
    with torch.no_grad():
        expected = result.trainer.model.eval()(**batch).logits
        assert torch.allclose(names["model"].eval()(**batch).logits, expected, atol=1e-6)


def test_the_card_of_an_offline_model_names_its_hub_copy_and_loads_it_offline(recipe):
    chosen = recipe()
    record = run(chosen).record
    text = card(recipe_from({**chosen.to_dict(), "model": "offline:all-MiniLM-L6-v2"}), record)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    code = text.split("```python\n")[1].split("```")[0]
    assert 'from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=' in code
    assert "# or the folder that this prints: dynlora assets fetch all-MiniLM-L6-v2\n" in code
    assert "import dynlora" not in code
    assert "from dynlora" not in code
    assert len(metadata["tags"]) == len(set(metadata["tags"]))
    compile(code, "card", "exec")


@pytest.mark.parametrize("method", ["dynlora", "dynlora-gated"])
def test_a_sharded_adapter_is_saved_as_a_plain_lora_without_what_is_pruned(
    recipe, method, monkeypatch
):
    chosen = recipe(method)
    prepared, adapted = run_module.build_model(chosen, run_module.checked_data(chosen))
    trainer = run_module.make_trainer(chosen, prepared, adapted, training_arguments(chosen), [])
    monkeypatch.setattr(run_module, "_is_sharded", lambda _model: True)
    module = find_components(adapted.model, "default")[0]
    for factor in module.factors:  # as the end of sharded training leaves a pruned module
        torch.nn.init.zeros_(factor.parameter)
    run_module._save(trainer, chosen, adapted)
    config = PeftConfig.from_pretrained(chosen.output)
    assert config.peft_type == "LORA"
    assert module.name not in config.rank_pattern
    assert (chosen.output / "adapter_model.safetensors").is_file()
    assert (chosen.output / "tokenizer.json").is_file()


def test_a_run_that_fails_says_so_in_its_record(recipe):
    def broken(done, _total, _rank):
        if done == 2:
            raise FloatingPointError("a gradient is not finite")

    with pytest.raises(FloatingPointError):
        run(recipe(), listener=Listener(on_step=broken))
    record = record_of(recipe())
    assert record["status"] == "failed"
    assert record["parts"][0]["step"] == 2


def test_full_saves_a_whole_model(recipe):
    chosen = recipe("full", max_steps=2)
    run(chosen)
    model = AutoModelForSequenceClassification.from_pretrained(chosen.output)
    assert model.config.id2label == {0: "neg", 1: "pos"}


def test_methods_see_the_same_rows_in_the_same_order_and_start_from_the_same_head(
    recipe, monkeypatch
):
    seen, heads = {}, {}
    make_trainer = run_module.make_trainer

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, train_dataloader, **kwargs):
            seen[args.output_dir] = [b["input_ids"].tolist() for b in train_dataloader]
            heads[args.output_dir] = {
                n.split("classifier.")[1].split(".")[-1]: p.detach().clone()
                for n, p in model.named_parameters()
                if "classifier" in n and p.requires_grad
            }

    def recorded(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(Recorder())
        return trainer

    monkeypatch.setattr(run_module, "make_trainer", recorded)
    for method in ("dynlora", "lora", "full", "houlsby"):
        run(recipe(method, output=method, max_steps=12))
    orders, starts = list(seen.values()), list(heads.values())
    assert len(orders) == 4
    assert all(order == orders[0] for order in orders)
    for start in starts:
        assert {n: t.tolist() for n, t in start.items()} == {
            n: t.tolist() for n, t in starts[0].items()
        }


def test_accumulated_batches_are_the_batch_they_make_up(recipe, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = save_encoder(tmp_path / "still", **sizes, **still, intermediate_size=24)
    norms = []
    for batch, accumulated in [(8, 1), (4, 2)]:
        fields = {"gradient_accumulation_steps": accumulated, "logging_steps": 1}
        chosen = recipe("lora", output=f"of {batch}", max_steps=3, **fields)
        chosen = recipe_from({**chosen.to_dict(), "model": model})
        chosen.training["per_device_train_batch_size"] = batch
        history = run(chosen).trainer.state.log_history
        norms.append([entry["grad_norm"] for entry in history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_matched_and_mismatched_come_from_one_run(recipe, inputs):
    rows = [
        {"premise": "good film", "hypothesis": ("good", "bad")[i % 2], "label": i % 2}
        for i in range(24)
    ]
    values = {
        **recipe().to_dict(),
        "data": {"name": "unused", "evals": {"matched": "m", "mismatched": "mm"}},
        "options": {"texts": ["premise", "hypothesis"]},
    }
    made = Splits(
        train=Dataset.from_list(rows),
        evals={"matched": Dataset.from_list(rows[:8]), "mismatched": Dataset.from_list(rows[:4])},
    )
    chosen = recipe_from(values, ["--load_best_model_at_end", "true", "--eval_strategy", "steps"])
    chosen.training.update(eval_steps=5, save_strategy="steps", save_steps=5, max_steps=20)
    record = run(chosen, splits=made).record
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= set(record["metrics"])
    assert [entry["step"] for entry in record["evaluations"]] == [0, 5, 10, 15, 20]
    assert record["best"]["step"] >= 10  # from the freeze on
    assert record_of(chosen)["metric"] == "eval_matched_accuracy"


def interrupting(step):
    def on_step(done, _total, _rank):
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Listener(on_step=on_step)


@pytest.mark.parametrize("step", [3, 8])  # inside the pruning window and behind it
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_ends_bit_identically(recipe, step):
    whole, broken = recipe(output="whole", max_steps=12), recipe(output="broken", max_steps=12)
    run(whole)
    with pytest.raises(Interrupted) as caught:
        run(broken, listener=interrupting(step))
    assert (caught.value.step, caught.value.has_checkpoint) == (step, True)
    assert record_of(broken)["status"] == "interrupted"
    run(broken, resume=True)
    a, b = record_of(whole), record_of(broken)
    assert [part["step"] for part in b["parts"]] == [step, 12]
    assert a["ranks"] == b["ranks"]
    assert a["budget"] == b["budget"]
    ours, theirs = (load_file(r.output / "adapter_model.safetensors") for r in (whole, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(RecipeError, match="this run is finished"):
        run(broken, resume=True)


def test_adalora_stops_without_a_checkpoint(recipe):
    with pytest.raises(Interrupted) as caught:
        run(recipe("adalora"), listener=interrupting(2))
    assert not caught.value.has_checkpoint
    assert not [*recipe().output.glob("checkpoint-*")]


def test_a_run_goes_on_only_with_its_own_recipe(recipe):
    with pytest.raises(RecipeError, match="is missing: .* holds no run"):
        run(recipe(), resume=True)
    with pytest.raises(Interrupted):
        run(recipe(), listener=interrupting(2))
    with pytest.raises(RecipeError, match=r"another training\.learning_rate \(was 0.01, is 0.02\)"):
        run(recipe(learning_rate=2e-2), resume=True)
    for file in recipe().output.glob("checkpoint-*/trainer_state.json"):
        file.write_text("{")
    with pytest.raises(RecipeError, match="holds no whole checkpoint; start anew with --overwrite"):
        run(recipe(), resume=True)


def test_a_folder_is_never_taken_from_another_run_or_anything_else(recipe):
    chosen = recipe(max_steps=12)
    chosen.output.mkdir()
    (chosen.output / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="is not empty and no run made it"):
        run(chosen, overwrite=True)
    (chosen.output / "thesis.txt").unlink()
    run(chosen)
    with pytest.raises(RecipeError, match="holds another run; go on with it by --resume"):
        run(chosen)
    again = run(recipe("lora", max_steps=2), overwrite=True)
    assert again.record["recipe"]["method"] == "lora"
    assert not (chosen.output / "history.jsonl").exists()
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        run(recipe(output="out/README.md"))


def test_mistakes_are_found_before_the_folder_is_touched(recipe):
    for changed, message in [
        (recipe("adalora", load_best_model_at_end=True), "load_best_model_at_end"),
        (recipe_from({**recipe().to_dict(), "model": "/absent"}), "model '/absent' cannot be read"),
        (recipe_from(recipe().to_dict(), ["--options.label", "y"]), "column 'y' is missing"),
        (recipe_from(recipe().to_dict(), ["--target_modules", "[q]"]), "No modules were"),
    ]:
        with pytest.raises(RecipeError, match=message):
            run(changed)
        assert not changed.output.exists()


def test_quantised_weights_are_not_trained(recipe):
    values = {**recipe("full").to_dict(), "base": {"quantization": {"load_in_4bit": True}}}
    with pytest.raises(RecipeError, match="which base.quantization freezes"):
        plan(recipe_from(values))


@pytest.mark.parametrize("method", ["dynlora", "houlsby"])
def test_a_dry_run_foretells_the_run(recipe, method):
    chosen = recipe(method, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    foretold = plan(chosen)
    assert not chosen.output.exists()
    record = run(chosen).record
    assert foretold.steps == record["steps"] == 9
    assert foretold.parameters["adapter_start"] == record["budget"]["parameters_start"]
    assert foretold.parameters["head"] == record["budget"]["head_parameters"]
    assert foretold.train_rows == record["data"]["train_rows"]
    if method == "dynlora":
        lines = (chosen.output / "history.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        costs = [(e["step"], e["cost"]) for e in history if e["event"] == "prune"]
        (first, whole), *pruned = foretold.schedule
        assert (first, whole) == (0, record["budget"]["parameters_start"])
        assert [step for step, _ in pruned] == [step for step, _ in costs]
        assert all(cost <= budget for (_, cost), (_, budget) in zip(costs, pruned, strict=True))
        assert pruned[-1][1] == plan(recipe("lora")).parameters["adapter_start"]
        assert record["budget"]["parameters_end"] == costs[-1][1]
    else:
        assert foretold.schedule == []


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (40, {"num_train_epochs": 2.5}),
        (41, {"gradient_accumulation_steps": 4, "num_train_epochs": 3}),
        (41, {"dataloader_drop_last": True, "num_train_epochs": 2}),
        (3, {"gradient_accumulation_steps": 8}),
    ],
)
def test_steps_are_counted_as_trainer_counts_them(recipe, rows, fields):
    chosen = recipe(max_steps=-1, **fields)
    arguments = training_arguments(chosen)
    data = Dataset.from_dict({"input": range(rows)})
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data)
    counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert planned_steps(arguments, rows) == counted
