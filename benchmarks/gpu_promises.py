"""What a run on a GPU must keep, on a small model: each function tells what happened."""

import math
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from cases import LLAMA_1B
from gpu_arms import (
    GpuCase,
    Training,
    adamw,
    allocated,
    base_model,
    direction,
    finalized,
    gpu_case,
    lora_model,
    tiny,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SMALL = tiny(gpu_case(LLAMA_1B, 2, 8, autocast=True))


def nan_in_a_gradient(device: str) -> dict[str, Any]:
    """A NaN in one gradient: is it refused, and is a finalized model finite?"""
    training = _training(device)
    training.step()
    training.gradients()
    name, weight = next((n, p) for n, p in training.model.named_parameters() if p.requires_grad)
    weight.grad[0, 0] = math.nan
    seen: dict[str, Any] = {"put_into": name, "step": _outcome(training.optimizer.step)}
    seen["trained_weights_finite"] = _is_finite(training.model)
    seen["next_step"] = _outcome(training.step)
    seen["freeze"] = _outcome(training.allocator.freeze_)
    seen["finalize"] = _outcome(lambda: finalized(training))
    seen["final_weights_finite"] = _is_finite(training.model)
    return seen


def grad_scaler_fp16(device: str) -> dict[str, Any]:
    """Five steps in fp16 with a GradScaler that begins much too high: skipped steps do not count."""
    case = GpuCase(SMALL.shape, 2, 2, 16, dtype=torch.float32)
    training = allocated(case, base_model(case, device), fused=False)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    optimizer, allocator = training.optimizer, training.allocator
    counts, scales, x = [], [], case.inputs(device)
    readout = direction(x)
    for _ in range(40):
        with torch.autocast(device, torch.float16):
            loss = (training.model(inputs_embeds=x).last_hidden_state * readout).mean()
        scaler.scale(loss).backward()
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
    """Ten steps in fp32, deterministic: does an allocator that only reads change a loss?"""
    case = GpuCase(SMALL.shape, 2, 2, 16, dtype=torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        losses = {
            name: _losses_without_fast_attention(
                allocated(
                    case,
                    base_model(case, device),
                    fused=False,
                    is_attached=attached,
                    dem_weight=0.0,
                    target_r=case.init_r,
                    optimizer={"lr": 1e-3},
                )
            )
            for name, attached in (("without", False), ("with", True))
        }
    finally:
        torch.use_deterministic_algorithms(False)
    return {"is_bit_equal": losses["with"] == losses["without"], "losses": losses}


def split_over_devices(device: str) -> dict[str, Any]:
    """A base whose first layer lies on the CPU, with the hooks that ``device_map`` sets."""
    case = GpuCase(SMALL.shape, 2, 2, 16, dtype=torch.float32)
    base = base_model(case, device)
    for layer, where in zip(base.layers, ("cpu", device), strict=True):
        add_hook_to_module(layer, AlignDevicesHook(where))
    training = allocated(case, base, fused=False, optimizer={"lr": 1e-3})
    training.x = case.inputs(device)
    losses = _losses(training, steps=3)
    training.allocator.freeze_()
    losses += _losses(training, steps=2)
    devices = {str(p.device) for p in training.model.parameters() if p.requires_grad}
    finalized(training)
    return {"losses": losses, "devices": sorted(devices), "finite": _is_finite(training.model)}


def graph_of_stock_lora(device: str) -> dict[str, Any]:
    """A whole step of stock LoRA as one CUDA graph."""
    model = lora_model(SMALL, base_model(SMALL, device), 8)
    return _captured(Training(model, SMALL, adamw(model, capturable=True, lr=1e-3)), device)


def graph_with_allocator(device: str) -> dict[str, Any]:
    """The same with the allocator attached: its hooks are inside the step that is captured."""
    return _captured(_training(device, optimizer={"capturable": True}), device)


def _captured(training: Training, device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"not_run": "needs a CUDA device"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    before = training.allocator.step if training.allocator else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step()
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(float(loss.detach()))
    after = training.allocator.step if training.allocator else None
    return {"losses": losses, "allocator_steps": [before, after], "replays": 5}


def _training(device: str, **choice: Any) -> Training:
    choice["optimizer"] = {"lr": 1e-3} | choice.get("optimizer", {})
    return allocated(SMALL, base_model(SMALL, device), fused=False, **choice)


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
        work()
    except (FloatingPointError, RuntimeError, ValueError) as refused:
        return f"{type(refused).__name__}: {refused}"
    return "no error"
