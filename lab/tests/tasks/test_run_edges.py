"""Runs at their edges: several processes, what cannot resume, damaged records, Ctrl-C, quantised bases."""

import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from dynlora_lab.tasks import interrupt
from dynlora_lab.tasks import run as run_module
from dynlora_lab.tasks.interrupt import Interrupted
from dynlora_lab.tasks.progress import Listener
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from dynlora_lab.tasks.run_files import INTERRUPTED, read_run, write_run
from dynlora_lab.tasks.training import training_arguments
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_classifier import save_encoder, save_texts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_encoder(folder / "tiny"), str(save_texts(folder / "texts.csv"))


@pytest.fixture
def recipe(tmp_path, inputs):
    def make(method="dynlora", output="out", base=None, **training):
        fixed = {"learning_rate": 1e-2, "max_steps": 12, "per_device_train_batch_size": 8}
        fixed |= {"eval_strategy": "no", "save_strategy": "no"}
        values = {"task": "text-classification", "model": inputs[0], "method": method}
        values |= {"output": str(tmp_path / output), "data": {"name": inputs[1]}}
        values |= {"adapter": {"target_r": 2, "prune_interval": 2}}
        return recipe_from({**values, "base": base or {}, "training": {**fixed, **training}})

    return make


HEAD = "base_model.model.classifier.modules_to_save.default.weight"


def interrupting(step):
    def on_step(done, _total, _rank):
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Listener(on_step=on_step)


def test_of_several_processes_the_first_alone_saves_a_sharded_adapter_and_its_tokenizer(
    recipe, monkeypatch
):
    chosen = recipe()
    prepared, adapted = run_module.build_model(chosen, run_module.checked_data(chosen))
    trainer = run_module.make_trainer(chosen, prepared, adapted, training_arguments(chosen), [])
    monkeypatch.setattr(run_module, "_is_sharded", lambda _model: True)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    run_module._save(trainer, chosen, adapted)
    assert not (chosen.output / "tokenizer.json").exists()


def test_a_method_that_cannot_resume_says_so_before_anything_is_touched(recipe):
    chosen = recipe("adalora")
    write_run(chosen.output, {"status": INTERRUPTED, "recipe": chosen.to_dict()})
    checkpoint = chosen.output / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    before = read_run(chosen.output)
    with pytest.raises(RecipeError, match="--resume: method 'adalora' cannot go on from a checkp"):
        run(chosen, resume=True)
    assert read_run(chosen.output) == before


def test_checkpointed_activations_change_nothing_that_is_learnt(recipe):
    plain, saving = recipe(), recipe(output="saving", gradient_checkpointing=True)
    ours, theirs = run(plain).record, run(saving).record
    assert ours["ranks"] == theirs["ranks"]
    ours, theirs = (load_file(r.output / "adapter_model.safetensors") for r in (plain, saving))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json cannot be read: "),
        ('{"format": 99}', "run.json is no record of a run that this version reads"),
        ("[]", "run.json is no record of a run that this version reads"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_run(tmp_path)


def test_an_overwritten_run_leaves_no_checkpoint_to_go_on_from(recipe):
    with pytest.raises(Interrupted):
        run(recipe(), listener=interrupting(2))
    assert (recipe().output / "checkpoint-2").is_dir()
    run(recipe(max_steps=12), overwrite=True)
    assert [*recipe().output.glob("checkpoint-*")] == []


# -- Ctrl-C ----------------------------------------------------------------------------------------


def test_ctrl_c_that_a_launcher_passes_on_is_one_press_and_a_later_one_stops_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with interrupt.StopOnInterrupt():
        for seconds in (0.0, 0.5):
            now[0] = 100.0 + seconds
            signal.raise_signal(signal.SIGINT)
        now[0] = 101.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_leaves_signals_alone():
    seen = []

    def run_beside():
        with interrupt.StopOnInterrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    beside = threading.Thread(target=run_beside)
    beside.start()
    beside.join()
    assert seen == [before]


# -- quantised bases -------------------------------------------------------------------------------


def test_a_quantised_base_is_trained_around_and_stays_as_it_is(recipe):
    """Of the head, whose last layer has a bias, nothing is quantised: it could not be trained."""
    pytest.importorskip("bitsandbytes", reason="8-bit bases need bitsandbytes")
    chosen = recipe("lora", base={"quantization": {"load_in_8bit": True}})
    _, adapted = run_module.build_model(chosen, run_module.checked_data(chosen))
    drawn = dict(adapted.model.named_parameters())[HEAD]
    done = run(chosen)
    assert done.record["steps"] == 12
    kept = load_file(chosen.output / "adapter_model.safetensors")
    head = kept["base_model.model.classifier.weight"]
    assert head.dtype == torch.float32
    assert head.shape == drawn.shape
    assert not torch.equal(head, drawn)
    quantised = [n for n, p in done.trainer.model.named_parameters() if p.dtype == torch.int8]
    assert len(quantised) == 2 * 6 + 1  # linear layers of two blocks, and the pooler's
    assert not any("classifier" in name for name in quantised)
