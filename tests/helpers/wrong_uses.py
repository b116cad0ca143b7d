"""Wrong uses by name, first of a stock LoRA, then of gates; test_errors.py keeps each message."""

import warnings

from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraCallback, DynLoraConfig, RankAllocator, export_lora, finalize_
from small_net import TARGETS, adamw, adapted, attached, small_net, train
from small_trainer import model_with, trainer, trainer_of
from wrong_settings import REFUSED


def allocate(model=None, optimizer=None, **settings):
    """An allocator with all that it needs, unless ``settings`` say otherwise."""
    model = adapted() if model is None else model
    settings = {"total_steps": 8, "target_r": 2, **settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    return RankAllocator(model, optimizer or adamw(model), **settings)


def trained(steps=3, **fields):
    """Model, optimizer and allocator after some steps."""
    model, optimizer, allocator = attached(**fields)
    train(model, optimizer, steps)
    return model, optimizer, allocator


def resumed(change=None, **fields):
    """A run that goes on from the state of another, with ``change`` in the state or other ``fields``."""
    state = trained()[2].state_dict()
    attached(**fields)[2].load_state_dict({**state, **(change or {})})


def with_scores(**parts):
    """A change of the state in one module's scores."""
    scores = trained()[2].state_dict()["scores"]
    return {"scores": {**scores, "layers.1": {**scores["layers.1"], **parts}}}


def grouped(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot merge it either
        return get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), config)


def stepped_by_another():
    model, _, allocator = attached()
    train(model, adamw(model), 1)
    return allocator  # held until here: one that nobody holds may be garbage before the step


def spoiled(what):
    """A run in which one element of the weights, or of their gradient, has become NaN."""
    model, optimizer, allocator = trained()
    weight = model.base_model.model.layers[1].lora_B["default"].weight
    (weight.grad if what == "gradient" else weight.data)[0, 0] = float("nan")
    return optimizer.step() if what == "gradient" else allocator.finalize_()


def clearing(model):
    """An optimizer that clears the gradients before they are read."""
    optimizer = adamw(model)
    optimizer.register_step_pre_hook(lambda opt, *_: opt.zero_grad())
    return optimizer


def export_to_a_file(folder):
    (folder / "file").write_text("mine")
    export_lora(trained()[0], folder / "file")


def trained_with(*callbacks, model=None, **arguments):
    """A Trainer run with these callbacks; its folder is never written to before the failure."""
    return lambda folder: trainer(
        folder, model or model_with(), list(callbacks), **arguments
    ).train()


def without_held_out(folder):
    run = trainer(folder, model_with(), [DynLoraCallback(target_r="auto")])
    run.eval_dataset = None
    run.train()


def resumed_without_progress(folder):
    run, callback = trainer_of(folder)
    run.state.global_step = 5
    callback.allocator = attached()[2]
    callback._saved_progress(run.state)


def negative(modules, _step):
    for module in modules:
        module.ema.fill_(-1)


def auto(loss):
    """Training until the freeze of target_r="auto", with this held-out loss."""
    model = adapted()
    optimizer = adamw(model)
    allocate(model, optimizer, target_r="auto", evaluate=lambda: loss, prune_end=0.5)
    train(model, optimizer, 8)


def frozen(model):
    return model.requires_grad_(False)


STOCK = {
    # settings
    "no target_r": lambda _: allocate(target_r=None),
    "no target_r in a callback": trained_with(DynLoraCallback()),
    "unknown setting": lambda _: allocate(prune_stop=0.5),
    "unknown preset": lambda _: allocate(preset="papers"),
    "steps for a callback": lambda _: DynLoraCallback(2, total_steps=5),
    "no batches to evaluate": lambda _: DynLoraCallback("auto", eval_batches=0),
    "tolerance of 0": lambda _: DynLoraCallback("auto", tolerance=0),
    "no number of steps": lambda _: allocate(total_steps=None),
    **{
        str(fields): lambda _, fields=fields: DynLoraCallback(**{"target_r": 8, **fields})
        for fields in {min(fields): fields for fields, _ in REFUSED}.values()  # one of each field
        if "total_steps" not in fields
    },
    # the budget
    "target above the start": lambda _: attached(target_r=5),
    "target below the floors": lambda _: attached(target_r=0.5, bias="all"),
    "target below one component": lambda _: attached(target_r=0.1),
    "auto without evaluate": lambda _: attached(target_r="auto"),
    "auto without held-out data": without_held_out,
    "auto with a loss of NaN": lambda _: auto(float("nan")),
    # the model
    "no target matches": lambda _: adapted(target_modules=["nowhere"]),
    "no adapter": lambda _: RankAllocator(n := small_net(), adamw(n), total_steps=5, target_r=2),
    "an adapter of another method": lambda _: allocate(
        get_peft_model(small_net(), IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS))
    ),
    "adapter of no such name": lambda _: allocate(adapter="other"),
    "frozen adapter": lambda _: allocate(frozen(adapted()), adamw(adapted())),
    "weight-decomposed DoRA": lambda _: allocate(adapted(use_dora=True)),
    "grouped convolution": lambda _: allocate(grouped(LoraConfig(r=2, target_modules=["0"]))),
    "PiSSA at the freeze": lambda _: trained(4, total_steps=4, init_lora_weights="pissa"),
    # optimizer and score
    "optimizer by name": lambda _: allocate(optimizer="adamw"),
    "optimizer of something else": lambda _: allocate(optimizer=adamw(nn.Linear(2, 2))),
    "two allocators": lambda _: allocate(*attached()[:2]),
    "another optimizer steps": lambda _: stepped_by_another(),
    "score by name": lambda _: allocate(score="norm"),
    "score that returns": lambda _: trained(1, score=lambda modules, step: [1.0]),
    "score below 0": lambda _: trained(40, score=negative),
    "gradients cleared in the step": lambda _: trained(40, optimizer=clearing),
    "importance that nothing has yet": lambda _: trained(2, total_steps=2),
    # the run
    "steps past the end": lambda _: trained(9, total_steps=8),
    "finalize before a step": lambda _: attached()[2].finalize_(),
    "finalize before the freeze": lambda _: trained()[2].finalize_(),
    "NaN in a gradient": lambda _: spoiled("gradient"),
    "NaN in a weight": lambda _: spoiled("weight"),
    "averaged copy of another model": lambda _: attached()[2].also_compact(adapted(r=2)),
    # resuming
    "state that is a list": lambda _: attached()[2].load_state_dict([1]),
    "auto with a state that is a list": lambda _: allocate(
        target_r="auto", evaluate=lambda: 1.0
    ).load_state_dict([1]),
    "state of another version": lambda _: resumed({"version": 1}),
    "state without a window": lambda _: resumed({"window": [5, 5]}),
    "state whose step is text": lambda _: resumed({"step": "5"}),
    "state with scores of NaN": lambda _: resumed(with_scores(ema=[float("nan")] * 4)),
    "resumed with another target": lambda _: resumed(target_r=3),
    "resumed with other modules": lambda _: resumed(target_modules=["0"]),
    "resumed with another alpha": lambda _: resumed(lora_alpha=16),
    "resumed without the weights": lambda _: resumed(with_scores(ema=[1.0], live=[True])),
    "resumed without progress": resumed_without_progress,
    "callbacks rebuilt from a checkpoint": trained_with(
        DynLoraCallback(2), restore_callback_states_from_checkpoint=True
    ),
    # functions
    "export onto a file": export_to_a_file,
}

GATED = {
    "settings beside a DynLoraConfig": lambda _: allocate(adapted(gated=True)),
    "no allocator": lambda _: train(m := adapted(gated=True), adamw(m), 1),
    "finalize untrained gates": lambda _: finalize_(adapted(gated=True, init="kaiming")),
    "weighted gated adapters": lambda _: adapted(gated=True).add_weighted_adapter(
        ["default"], [1.0], "new"
    ),
    **{
        f"DynLoraConfig {fields}": lambda _, fields=fields: DynLoraConfig(**fields)
        for fields in (
            {"init_r": 4}, {"init_r": 8.5}, {"init_r": 8, "r": 6}, {"init": "zeros"}, {"init_std": 0.0},
            {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"rank_pattern": {"q": -1}},
        )
    },
}  # fmt: skip

WRONG_USES = {**STOCK, **GATED}
