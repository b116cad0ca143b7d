"""What does allocation cost: share of a step, launches, temporaries, and how it all grows?

    python benchmarks/allocator_cost.py [--device cuda]

One allocator step is what happens around one optimizer step before the first cut: a look for NaN, scores,
moving averages and the schedule, and with the paper's settings the gradient of DEM. Layers are real
tensors of the real shapes; larger models are extrapolated from one and two layers by the model time =
fixed + layers x slope.
"""

import itertools
import statistics
from typing import Any, Literal

import torch
from arms import FOREVER, LORA_INITIAL, adamw, step_arms
from cases import LLAMA_1B, LLAMA_8B, LLAMA_70B, ROBERTA, Shape, StepCase
from measuring import arguments, interleaved, seconds, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dynlora import RankAllocator

RANKS = (4, 8, 16, 32, 64)
WIDTHS = (256, 512, 1024, 2048, 4096)
MODULES = (10, 100, 1000, 10_000)
ON_THE_HOST = {"aten::detach", "aten::alias", "aten::_unsafe_view", "aten::promote_types"}
MULTI_TENSOR = 60  # tensors that one launch of a foreach kernel serves, roughly

Sizes = list[tuple[int, int]]  # (in, out) of every adapted module
Preset = Literal["paper"] | None

SETTINGS: dict[Preset, str] = {None: "defaults", "paper": "the paper's settings"}


def layer_sizes(shape: Shape) -> Sizes:
    """The adapted modules of one layer of a model."""
    with torch.device("meta"):
        config = shape.config(num_hidden_layers=1, **shape.fields)
        model = shape.model(config, **shape.options)
    return [
        (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] in shape.targets
    ]


def allocator_of(
    sizes: Sizes, rank: int, device: str, preset: Preset = None, dtype: torch.dtype = torch.float32
) -> RankAllocator:
    """An allocator over modules of these sizes, all with gradients, adapters in ``dtype``."""
    bases = [nn.utils.skip_init(nn.Linear, i, o, bias=False, device=device) for i, o in sizes]
    names = [str(i) for i in range(len(sizes))]
    config = LoraConfig(r=rank, target_modules=names)
    model = get_peft_model(nn.Sequential(*bases), config).to(dtype)
    allocator = RankAllocator(
        model, adamw(model), target_r=rank / 2, total_steps=FOREVER, preset=preset
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return allocator


def allocator_step(allocator: RankAllocator) -> None:
    """What the optimizer's hooks do before and after one step."""
    allocator._before_step(allocator.optimizer, (), {})
    allocator._after_step(allocator.optimizer, (), {})


class Launches(TorchDispatchMode):
    """Counts operations that would each launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; a foreach operation counts as often as it would launch."""
        result = func(*args, **(kwargs or {}))
        is_empty = isinstance(result, Tensor) and result.numel() == 0
        if not func.is_view and not is_empty and func._schema.name not in ON_THE_HOST:
            is_many = func._schema.name.startswith("aten::_foreach")
            self.count += -(-len(args[0]) // MULTI_TENSOR) if is_many else 1
        return result


def count_launches(
    sizes: Sizes, rank: int, preset: Preset, dtype: torch.dtype = torch.float32
) -> int:
    """Operations of one allocator step, views not counted, as an accelerator would run them.

    They are counted on tensors without data, which take every branch an accelerator takes, and where
    waiting for a number raises.
    """
    allocator = allocator_of(sizes, rank, "meta", preset, dtype)
    with Launches() as launches:
        allocator_step(allocator)
    return launches.count


def peak_temporary_bytes(allocator: RankAllocator, device: str) -> int:
    """Highest sum of living temporaries of one allocator step."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        allocator_step(allocator)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        allocator_step(allocator)
    changes = [
        event.nbytes() for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]  # fmt: skip
    return max(itertools.accumulate(changes), default=0)


def describe(sizes: Sizes, rank: int, options: Any, preset: Preset = None) -> dict[str, Any]:
    """Time, operations and temporaries of one allocator step."""
    allocator = allocator_of(sizes, rank, options.device, preset)
    allocator_step(allocator)
    times = [
        seconds(lambda: allocator_step(allocator), options.device) for _ in range(options.rounds)
    ]
    return {
        "modules": len(sizes),
        "rank": rank,
        "adapter_bytes": sum(4 * rank * (i + o) for i, o in sizes),
        "seconds": statistics.median(times),
        "launches": count_launches(sizes, rank, preset),
        "peak_temporary_bytes": peak_temporary_bytes(allocator, options.device),
    }


def share_of_a_step(case: StepCase, options: Any, preset: Preset) -> dict[str, Any]:
    """Allocator time over step time; both from the same layers, taking turns."""
    arms = step_arms(case, options.device)
    sizes = layer_sizes(case.shape) * case.layers
    allocator = allocator_of(sizes, case.init_r, options.device, preset)
    times = interleaved(
        {"step": arms[LORA_INITIAL], "allocator": lambda: allocator_step(allocator)},
        rounds=options.rounds,
        device=options.device,
    )
    shares = [a / s for a, s in zip(times["allocator"], times["step"], strict=True)]
    return {
        "case": f"{case.name}, {SETTINGS[preset]}",
        "share": statistics.median(shares),
        "worst": max(shares),
    }


def extrapolated(shape: Shape, rank: int, options: Any) -> dict[str, Any]:
    """One and two layers measured, the whole model by a straight line; three layers as its check."""
    sizes = layer_sizes(shape)
    one, two, three = (describe(sizes * n, rank, options) for n in (1, 2, 3))
    slope = two["seconds"] - one["seconds"]
    return {
        "model": shape.name,
        "rank": rank,
        "layers": shape.depth,
        "one_layer": one,
        "two_layers": two,
        "three_layers": three,
        "three_layers_predicted_s": one["seconds"] + 2 * slope,
        "whole_model_s": one["seconds"] + (shape.depth - 1) * slope,
        "whole_model_state_bytes": 5 * rank * len(sizes) * shape.depth,  # fp32 EMA and bool mask
    }


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__ or "")
    shares = [
        share_of_a_step(case, options, preset)
        for preset in SETTINGS
        for case in (StepCase(ROBERTA, 1, 16, 128), StepCase(LLAMA_1B, 1, 1, 256))
    ]
    print(shares)
    whole = {
        f"{shape.name}, {setting}": describe(layer_sizes(shape) * shape.depth, 12, options, preset)
        for preset, setting in SETTINGS.items()
        for shape in (ROBERTA, LLAMA_1B)
    }
    print(whole)
    growth = {
        "modules": [describe([(64, 64)] * n, 4, options) for n in MODULES],
        "rank": [describe([(768, 768)] * 24, r, options) for r in RANKS],
        "width": [{"width": w} | describe([(w, w)] * 24, 12, options) for w in WIDTHS],
    }
    print(growth)
    scale = [extrapolated(shape, 24, options) for shape in (LLAMA_8B, LLAMA_70B)]
    write(
        "allocator_cost",
        options,
        {"shares": shares, "whole": whole, "growth": growth, "scale": scale},
    )


if __name__ == "__main__":
    main()
