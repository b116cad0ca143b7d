"""What the GPU check times: whole steps, what modules of rank 0 save, and the allocator's share."""

import random
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from arms import (
    AFTER,
    AFTER_FUSED,
    BEFORE,
    BEFORE_FUSED,
    FLOOR,
    LORA_INITIAL,
    LORA_TARGET,
    PEERS,
    WINDOW,
    adamw,
    freeze_,
)
from gpu_arms import (
    ARMS,
    GpuCase,
    Training,
    allocated,
    base_model,
    fresh,
    lora,
    lora_model,
    quantised_model,
)
from gpu_timing import Clock, allocated_bytes, compared, memory_of, milliseconds, synchronize
from torch import nn

LORA_FUSED = f"{LORA_TARGET}, fused"
_CUDA = torch.autograd.DeviceType.CUDA
Attempt = Callable[[Callable[[], Any]], dict[str, Any]]
COMPILED = (
    LORA_TARGET,
    LORA_INITIAL,
    BEFORE,
    BEFORE_FUSED,
    AFTER_FUSED,
    FLOOR,
)  # the floor can be had elsewhere


class Costs:
    """The timed cases.

    Args:
        device: "cuda" or "cpu".
        clock: the time there is.
        attempt: calls a function; gives ``{"value": ...}`` or ``{"error": ...}``.
        rounds: rounds that count.
        steps: steps of each arm in a round.
    """

    def __init__(
        self, device: str, clock: Clock, attempt: Attempt, *, rounds: int, steps: int
    ) -> None:
        self.device = device
        self.clock = clock
        self.attempt = attempt
        self.rounds = rounds
        self.steps = steps
        # tracing a model takes a CPU half a minute, so a rehearsal traces two, and generates no code
        self.backend = "inductor" if device == "cuda" else "eager"
        self.compiled_arms = COMPILED if device == "cuda" else (LORA_TARGET, AFTER_FUSED)

    def step_cost(self, case: GpuCase) -> dict[str, Any]:
        """All arms: time of a step, ratio to LoRA's, bytes that stay and bytes of one step above them."""
        base = base_model(case, self.device)
        return self._compare(
            {name: lambda a=arm: a(case, fresh(base)) for name, arm in ARMS.items()}
        )

    def compiled(self, case: GpuCase) -> dict[str, Any]:
        """Arms whose model is compiled; none is begun in the last 30 seconds."""
        base = base_model(case, self.device)

        def make(name: str) -> Training:
            if self.clock.left < 30:
                raise TimeoutError(f"{self.clock.left:.0f} s were left, too few to compile")
            training = ARMS[name](case, fresh(base))
            training.forward = torch.compile(
                training.model, backend=self.backend, dynamic=False
            )  # else another rank would make sizes symbolic
            return training

        torch._dynamo.reset()
        # all arms share the code of their models, and each of them is one compilation of it
        with torch._dynamo.config.patch(recompile_limit=64):
            return self._compare({name: lambda n=name: make(n) for name in self.compiled_arms})

    def quantised(self, case: GpuCase) -> dict[str, Any]:
        """LoRA on a 4-bit base by bitsandbytes, with PEFT's forward pass and with the fused update."""
        base = quantised_model(case, self.device)

        def make(*, is_fused: bool) -> Training:
            return lora(case, fresh(base), case.target_r, is_fused=is_fused)

        return self._compare(
            {
                LORA_TARGET: lambda: make(is_fused=False),
                LORA_FUSED: lambda: make(is_fused=True),
            }
        )

    def rank_0(self, case: GpuCase, *, checkpointing: bool) -> dict[str, Any]:
        """LoRA without some of its modules, from token ids.

        Embeddings that require gradients make the backward pass go down to them, whatever lives: users
        ask for it with ``enable_input_require_grads``, and PEFT does where gradient checkpointing is on.
        With checkpointing the last arms take that back.
        """
        base = base_model(case, self.device)
        names = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in case.shape.targets
        ]
        half = sorted(random.Random(0).sample(names, len(names) // 2))  # noqa: S311
        upper = [n for n in names if _layer(n) >= case.layers // 2]
        ids = torch.randint(0, 1000, (case.batch, case.length), device=self.device)
        without: dict[str, int] = {}

        def make(name: str, targets: list[str], requires: str) -> Training:
            model: Any = fresh(base)
            if checkpointing:
                _checkpoint(model)
            made = lora_model(case, model, case.target_r, target_modules=targets)
            if requires == "inputs require grad":
                model.enable_input_require_grads()
            if requires == "taken back":
                model.disable_input_require_grads()
            training = Training(made, case, adamw(made), ids=ids)
            training.gradients()
            trained = [p for p in made.parameters() if p.requires_grad]
            without[name] = sum(p.grad is None for p in trained)
            return training

        chosen = {"all modules": names, "a random half": half, "upper half of layers": upper}
        arms = {}
        other = "taken back" if checkpointing else "inputs require grad"
        for requires in ("as PEFT leaves it", other):
            for which, targets in chosen.items():
                if which == "a random half" and requires != "as PEFT leaves it":
                    continue
                name = f"{which}, {requires}"
                arms[name] = lambda n=name, t=targets, r=requires: make(n, t, r)
        peers = dict.fromkeys(arms, "all modules, as PEFT leaves it")
        return self._compare(arms, peers) | {"parameters_without_gradient": without}

    def _compare(
        self, makers: dict[str, Callable[[], Training]], peers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        peers = {name: PEERS.get(name, LORA_TARGET) for name in makers} if peers is None else peers
        arms, memory, failed = {}, {}, {}
        for name, make in makers.items():
            before = allocated_bytes(self.device)
            tried = self.attempt(lambda m=make: self._begun(m))
            if "error" in tried:
                failed[name] = tried["error"]
                continue
            arms[name], peak = tried["value"]
            after = allocated_bytes(self.device)
            memory[name] = {
                "resident_bytes": None if after is None or before is None else after - before,
                "step_peak_bytes": peak,
            }
        rows = compared(arms, peers, self.device, self.clock, rounds=self.rounds, steps=self.steps)
        result = {name: row | memory[name] for name, row in rows.items()}
        return {"arms": result} | ({"failed": failed} if failed else {})

    def _begun(self, make: Callable[[], Training]) -> tuple[Callable[[], Any], int | None]:
        training = make()
        training.step()
        training.step()  # moments are there
        return training.step, memory_of(training.step, self.device)

    def allocator_share(self, case: GpuCase) -> dict[str, Any]:
        """Kernels and host syncs of one step with and without the allocator, and its hooks' time."""
        base = base_model(case, self.device)
        kinds = {
            "without": lora(case, fresh(base), case.init_r),
            "with": allocated(case, fresh(base)),
            "in the window": ARMS[WINDOW](case, fresh(base)),
            "after the freeze": ARMS[AFTER](case, fresh(base)),
        }
        result: dict[str, Any] = {}
        for name, training in kinds.items():
            for _ in range(3):
                training.step()
            result[name] = {
                "kernels": self._kernels(training.step),
                "optimizer_step": self._kernels(self._optimizer_step(training)),
                "host_syncs": self._host_syncs(training.step),
            }
        arms = {name: kinds[name].step for name in ("without", "with")}
        step = compared(
            arms, dict.fromkeys(arms, "without"), self.device, self.clock,
            rounds=self.rounds, steps=self.steps,
        )  # fmt: skip
        hooks = {name: self._hooks(kinds[name]) for name in list(kinds)[1:]}
        whole = step["without"]
        share = {
            name: {
                "of_device_time": times["kernel_ms"] / whole["ms"],
                "of_host_time": times["host_ms"] / whole["host_ms"],
            }
            for name, times in hooks.items()
        }
        freeze_ms = self._freeze(kinds["with"])
        return result | {"step": step, "hooks": hooks, "share": share, "freeze_ms": freeze_ms}

    def _optimizer_step(self, training: Training) -> Callable[[], Any]:
        training.gradients()
        return training.optimizer.step

    def _kernels(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Kernels that the device ran, and calls that launched them; on a CPU, operators."""
        synchronize(self.device)
        with torch.profiler.profile() as seen:
            work()
            synchronize(self.device)
        events = seen.events() or []
        if self.device != "cuda":
            return {"operators": sum(e.name.startswith("aten::") for e in events)}
        launches = Counter(e.name for e in events if "Launch" in e.name)
        kernels = [e for e in events if e.device_type == _CUDA]
        return {"launches": dict(launches), "on_device": len(kernels)}

    def _host_syncs(self, work: Callable[[], Any]) -> dict[str, Any] | None:
        """Calls of one step in which the host waits for the device."""
        if self.device != "cuda":
            return None
        synchronize(self.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchronizing CUDA" in str(w.message)]
        where = Counter(f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}" for w in found)
        return {"count": len(found), "where": dict(where)}

    def _hooks(self, training: Training) -> dict[str, float]:
        """Milliseconds of the optimizer's hooks alone, and what of them the device computes."""
        optimizer = training.optimizer
        training.gradients()
        before = list(optimizer._optimizer_step_pre_hooks.values())
        after = list(optimizer._optimizer_step_post_hooks.values())

        def hooks() -> None:
            for hook in before + after:
                hook(optimizer, (optimizer,), {})

        hooks()
        ms, _ = milliseconds(hooks, self.device, times=2 * self.rounds)
        host_ms = statistics.median(
            milliseconds(hooks, self.device, times=1)[1] for _ in range(2 * self.rounds)
        )
        with torch.profiler.profile() as seen:
            hooks()
            synchronize(self.device)
        kernels = [e for e in seen.events() or [] if e.device_type == _CUDA]
        took = sum(e.time_range.elapsed_us() for e in kernels) / 1000
        kernel_ms = took if self.device == "cuda" else ms
        return {"ms": ms, "host_ms": host_ms, "kernel_ms": kernel_ms, "kernels": len(kernels)}

    def _freeze(self, training: Training) -> float:
        """Milliseconds of the freeze, which comes once in a run."""
        return milliseconds(lambda: freeze_(training.allocator), self.device, times=1)[0]


def _layer(name: str) -> int:
    return int(re.findall(r"\.(\d+)\.", f".{name}")[0])


def _checkpoint(model: Any) -> None:
    """Keep only the inputs of each layer; the method's name changed in transformers 5."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
