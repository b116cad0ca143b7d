"""What a run on a GPU must keep, on a small model: each function tells what happened."""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from arms import adamw, freeze_
from cases import LLAMA_1B
from gpu_arms import (
    GpuCase,
    Training,
    allocated,
    base_model,
    direction,
    gpu_case,
    lora,
    lora_model,
    tiny,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynlora import DynLoraCallback

SMALL = tiny(gpu_case(LLAMA_1B, 2, 8, autocast=True))
EXACT = GpuCase(SMALL.shape, 2, 2, 16, dtype=torch.float32)


def nan_in_a_gradient(device: str) -> dict[str, Any]:
    """A NaN in one gradient: who refuses what afterwards, and are weights pruned by it?"""
    training = _training(device)
    training.step()
    training.gradients()
    name, weight = next((n, p) for n, p in training.model.named_parameters() if p.requires_grad)
    weight.grad[0, 0] = math.nan  # type: ignore[index]
    allocator = training.allocator
    seen: dict[str, Any] = {"put_into": name, "step": _outcome(training.optimizer.step)}
    training.optimizer.zero_grad()
    seen["trained_weights_finite"] = _is_finite(training.model)
    seen["next_step"] = _outcome(training.step)
    seen["check_finite"] = _outcome(allocator.check_finite)
    seen["freeze"] = _outcome(allocator.freeze_)
    seen["finalize"] = _outcome(allocator.finalize_)
    return seen | {"was_pruned": bool(allocator.history), "is_frozen": allocator.is_frozen}


class _Spoil(hf.TrainerCallback):
    """Puts a NaN into a gradient before the second step."""

    def on_pre_optimizer_step(
        self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any
    ) -> None:
        """Spoil it."""
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)


def nan_under_a_trainer(device: str) -> dict[str, Any]:
    """The same under a Trainer that saves two steps later: is a spoiled weight ever saved?"""
    case = SMALL
    config = case.shape.config(num_hidden_layers=2, **case.shape.fields)
    model = get_peft_model(
        hf.LlamaForCausalLM(config), LoraConfig(r=12, target_modules=case.shape.targets)
    )
    ids = torch.arange(16) % 1000
    data = [{"input_ids": ids, "labels": ids}] * 16
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.TrainingArguments(
            folder,
            max_steps=8,
            per_device_train_batch_size=2,
            save_steps=3,
            logging_steps=100,
            report_to=[],
            use_cpu=device == "cpu",
            disable_tqdm=True,
        )
        trainer = hf.Trainer(
            model,
            arguments,
            train_dataset=data,
            callbacks=[_Spoil(), DynLoraCallback(target_r=8)],
        )
        said = _outcome(trainer.train)
        saved = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*.safetensors"))
        return {"train": said, "at_step": trainer.state.global_step, "saved": saved}


def grad_scaler_fp16(device: str, *, fused: bool | None = None) -> dict[str, Any]:
    """Forty steps in fp16 with a GradScaler that begins much too high: skipped steps do not count."""
    training = allocated(EXACT, base_model(EXACT, device), optimizer={"fused": fused})
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    optimizer, allocator = training.optimizer, training.allocator
    counts, scales, x = [], [], EXACT.inputs(device)
    readout = direction(x)
    for _ in range(40):
        with torch.autocast(device, torch.float16):
            loss = (training.model(inputs_embeds=x).last_hidden_state * readout).mean()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(allocator.step)
        scales.append(scaler.get_scale())
    halved = sum(b < a for a, b in zip([2.0**40, *scales], scales, strict=False))
    return {
        "steps_asked": len(counts),
        "steps_skipped": halved,
        "steps_counted": counts[-1],
        "weights_finite": _is_finite(training.model),
        "check_finite": _outcome(allocator.check_finite),
        "freeze": _outcome(allocator.freeze_),
    }


def other_adamw(device: str, **options: bool) -> dict[str, Any]:
    """Five steps of AdamW in another implementation against the default one, both with the allocator."""
    usual, other = (_training(device, optimizer=chosen) for chosen in ({}, options))
    losses = {
        name: [float(t.step().detach()) for _ in range(5)]
        for name, t in (("default", usual), ("other", other))
    }
    pairs = zip(usual.model.parameters(), other.model.parameters(), strict=True)
    apart = max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
    return {"options": options, "losses": losses, "largest_weight_difference": apart}


def bit_equality(device: str) -> dict[str, Any]:
    """Ten steps in fp32, deterministic: does an allocator that only reads change a loss or a weight?"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = {
            "without": lora(EXACT, base_model(EXACT, device), EXACT.init_r, lr=1e-3),
            "with": allocated(EXACT, base_model(EXACT, device), optimizer={"lr": 1e-3}),
        }
        losses = {name: _losses_without_fast_attention(run) for name, run in runs.items()}
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = zip(runs["without"].model.parameters(), runs["with"].model.parameters(), strict=True)
    same = all(bool(torch.equal(a, b)) for a, b in pairs)
    equal = losses["with"] == losses["without"]
    return {"losses_equal": equal, "weights_equal": same, "losses": losses}


def split_over_devices(device: str) -> dict[str, Any]:
    """A base whose first layer lies on the CPU, with the hooks that ``device_map`` sets."""
    base: Any = base_model(EXACT, device)
    for layer, where in zip(base.layers, ("cpu", device), strict=True):
        add_hook_to_module(layer, AlignDevicesHook(where))
        layer.to(where)
    training = allocated(EXACT, base, optimizer={"lr": 1e-3})
    training.x = EXACT.inputs(device)
    losses = _losses(training, steps=3)
    freeze_(training.allocator)
    losses += _losses(training, steps=2)
    devices = {str(p.device) for p in training.model.parameters() if p.requires_grad}
    ranks = training.allocator.finalize_()
    finite = _is_finite(training.model)
    return {"losses": losses, "devices": sorted(devices), "finite": finite, "ranks": ranks}


def budget_by_loss(device: str) -> dict[str, Any]:
    """A short run that finds its own budget: what was tried, and the ranks it ended with."""
    asked: list[float] = []

    def evaluate() -> float:
        with torch.no_grad():
            last = training.model(inputs_embeds=x).last_hidden_state
            asked.append(1 + float((last * direction(x)).mean()))
        return asked[-1]

    x = EXACT.inputs(device)
    settings = {"target_r": "auto", "total_steps": 10, "evaluate": evaluate}
    training = allocated(EXACT, base_model(EXACT, device), optimizer={"lr": 1e-2}, **settings)
    losses = _losses(training)
    allocator = training.allocator
    found = allocator.history[-1]["auto"]
    ranks = allocator.finalize_()
    return {"losses": losses, "evaluations": len(asked), "found": found, "ranks": ranks}


def graph_of_stock_lora(device: str) -> dict[str, Any]:
    """A whole step of stock LoRA as one CUDA graph."""
    model = lora_model(SMALL, base_model(SMALL, device), 8)
    return _captured(Training(model, SMALL, adamw(model, capturable=True, lr=1e-3)), device)


def graph_with_allocator(device: str) -> dict[str, Any]:
    """The same with the allocator attached: its hooks run once, while the step is captured."""
    return _captured(_training(device, optimizer={"capturable": True}), device)


def graph_of_gradients(device: str) -> dict[str, Any]:
    """Forward and backward pass as a graph, and the optimizer's step outside it: every step counts."""
    if device != "cuda":
        return {"not_run": "needs a CUDA device"}
    training = _training(device)
    _warm_up(training)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.gradients()
    before, losses = training.allocator.step, []
    for _ in range(5):
        graph.replay()
        training.optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "replays": 5, "allocator_steps": [before, training.allocator.step]}


def _captured(training: Training, device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"not_run": "needs a CUDA device"}
    _warm_up(training)
    before = training.allocator.step if training.allocator else None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loss = training.step()
    except RuntimeError as refused:
        return {"refused": str(refused), "context": _outcome(torch.cuda.synchronize)}
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(float(loss.detach()))
    after = training.allocator.step if training.allocator else None
    return {"losses": losses, "allocator_steps": [before, after], "replays": 5}


def _warm_up(training: Training) -> None:
    """Three steps on another stream, as torch asks before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(side)


def _training(device: str, **choice: Any) -> Training:
    choice["optimizer"] = {"lr": 1e-3} | choice.get("optimizer", {})
    return allocated(SMALL, base_model(SMALL, device), **choice)


def _losses(training: Training, steps: int = 10) -> list[float]:
    return [float(training.step().detach()) for _ in range(steps)]


def _losses_without_fast_attention(training: Training) -> list[float]:
    """Losses by the attention that has a deterministic backward pass in fp32."""
    with sdpa_kernel(SDPBackend.MATH):
        return _losses(training)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _outcome(work: Any) -> str:
    """What a call that may refuse says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except (FloatingPointError, RuntimeError, ValueError) as refused:
        return f"{type(refused).__name__}: {refused}"
    return "no error"
