"""What does a whole run cost next to LoRA, AdaLoRA and full fine-tuning?

    python benchmarks/whole_run.py [--device cuda]

Same data, batches and number of steps; the arms take turns step by step, so that each step of one is
timed beside the same step of the others. Peak memory is what a process of its own takes for three steps of
one arm, model included, beyond what it held when everything was imported.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers as hf
from arms import adamw
from cases import ENCODER, ENCODER_TARGETS
from measuring import arguments, seconds, write
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from dynlora import RankAllocator
from dynlora.fused import fuse_

STEPS, BATCH, LENGTH, LAYERS = 20, 8, 64, 2
TARGET_R, INIT_R = 8, 12
LORA = "PEFT LoRA, target rank"
DYNLORA = ("dynlora", "dynlora fused")
ARMS = (*DYNLORA, LORA, "PEFT LoRA, initial rank", "PEFT AdaLoRA", "full fine-tuning")
ONLY = "--one-arm"


def data() -> list[dict[str, Tensor]]:
    """Batches of random tokens, the same for every arm."""
    draws = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(3, 1000, (BATCH, LENGTH), generator=draws),
            "labels": torch.randint(0, 2, (BATCH,), generator=draws),
        }
        for _ in range(STEPS)
    ]


class Arm:
    """One way to train, step by step.

    Attributes:
        model: what is trained.
        optimizer: AdamW of what is trained.
    """

    def __init__(self, name: str, device: str) -> None:
        hf.set_seed(0)
        config = hf.RobertaConfig(num_hidden_layers=LAYERS, num_labels=2, **ENCODER)
        base = hf.RobertaForSequenceClassification(config).to(device)
        shared = {"target_modules": ENCODER_TARGETS, "exclude_modules": ["classifier.dense"]}
        shared |= {"lora_alpha": 8, "task_type": "SEQ_CLS"}
        configs: dict[str, Callable[[], Any]] = {
            **dict.fromkeys(DYNLORA, lambda: LoraConfig(r=INIT_R, **shared)),
            LORA: lambda: LoraConfig(r=TARGET_R, **shared),
            "PEFT LoRA, initial rank": lambda: LoraConfig(r=INIT_R, **shared),
            "PEFT AdaLoRA": lambda: AdaLoraConfig(
                init_r=INIT_R, target_r=TARGET_R, total_step=STEPS, tinit=STEPS * 15 // 100,
                tfinal=STEPS // 2, deltaT=1, **shared,
            ),
        }  # fmt: skip
        self.name, self.device = name, device
        self.model: Any = get_peft_model(base, configs[name]()) if name in configs else base
        if name == "dynlora fused":
            fuse_(self.model)
        self.model.train()
        self.optimizer = adamw(self.model, lr=1e-4)
        self.allocator = (
            RankAllocator(
                self.model, self.optimizer, target_r=TARGET_R, total_steps=STEPS, prune_interval=1
            )
            if name in DYNLORA
            else None
        )
        self._done = 0

    def step(self, batch: dict[str, Tensor]) -> None:
        """One training step; AdaLoRA's allocator is called as its documentation asks."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self._done += 1
        if self.name == "PEFT AdaLoRA":
            self.model.base_model.update_and_allocate(self._done)

    def state_bytes(self) -> int:
        """Bytes of what is trained, its gradients and the optimizer's state."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        states = [v for p in trained for v in self.optimizer.state.get(p, {}).values()]
        scored = [] if self.allocator is None else self.allocator.modules
        extra = [t for module in scored for t in (module.ema, module.live)]
        tuner = getattr(self.model, "base_model", None)
        if self.name == "PEFT AdaLoRA":
            allocator = tuner.rankallocator
            for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                extra += kept.values()
        grads = [p.grad for p in trained if p.grad is not None]
        tensors = [t for t in (*trained, *grads, *states, *extra) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def saved_bytes(self) -> int:
        """Bytes of the weight file that the finished run leaves."""
        if self.allocator is not None:
            self.allocator.finalize_()
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(self.model, nn.Module) and hasattr(self.model, "peft_config"):
                self.model.save_pretrained(folder)
            else:
                save_file(self.model.state_dict(), Path(folder) / "model.safetensors")
            return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def peak_bytes(name: str, device: str, threads: int) -> int:
    """What a fresh process takes at most to train one arm for three steps, imports left out."""
    command = [sys.executable, "-W", "ignore", __file__, ONLY, name, device, str(threads)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1])


def _one_arm(name: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    idle = psutil.Process().memory_info().rss
    arm = Arm(name, device)
    for batch in data()[:3]:
        arm.step(batch)
        arm.optimizer.zero_grad()
    on_gpu = device == "cuda"
    print(torch.cuda.max_memory_allocated() if on_gpu else _highest_resident_bytes() - idle)


def _highest_resident_bytes() -> int:
    """Of this process since it began; ``ru_maxrss`` would begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kib) * 1024


def main() -> None:
    """Train all arms side by side and write what they took."""
    options = arguments(__doc__ or "")
    arms = {name: Arm(name, options.device) for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    states: dict[str, list[int]] = {name: [] for name in ARMS}
    for turn, batch in enumerate(data()):
        for name in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
            arm = arms[name]
            times[name].append(seconds(lambda arm=arm: arm.step(batch), options.device))  # type: ignore[misc]  # noqa: B023
            states[name].append(arm.state_bytes())
            arm.optimizer.zero_grad()
    counted = slice(1, None)  # the first step warms up
    rows = {
        name: {
            "seconds": sum(times[name][counted]),
            "to_lora": sum(times[name][counted]) / sum(times[LORA][counted]),
            "peak_bytes": peak_bytes(name, options.device, options.threads),
            "state_bytes_start": states[name][1],
            "state_bytes_end": states[name][-1],
            "saved_bytes": arms[name].saved_bytes(),
            "state_bytes": states[name],
            "times": times[name],
        }
        for name in ARMS
    }
    case = f"RoBERTa-base width, {LAYERS} layers, {BATCH}x{LENGTH} tokens, {STEPS} steps"
    write("whole_run", options, {"case": case, "arms": rows})


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == ONLY:
        _one_arm(*sys.argv[2:])
    else:
        main()
