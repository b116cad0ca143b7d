"""A pytest plugin that gives every LoRA trained in PEFT's tests a RankAllocator.

scripts/peft_suite.py loads it three times, with ``ALLOCATE`` in the environment as

- ``none``: stock PEFT; only rows that are not about LoRA are left out,
- ``read``: an allocator on each optimizer that holds a LoRA adapter; no test is long enough for a cut,
- ``every``: the same, and one on every trainable LoRA from its creation, with an optimizer of its own,
- ``cut``: as ``read``, but pruned to half and compacted at the second step.

What happened to each test goes to ``OUTCOMES``, one JSON object a line.
"""

import functools
import gc
import importlib
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import CodeType
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dynlora import RankAllocator
from dynlora.lora.components import find_components, is_lora

VARIANT = os.environ["ALLOCATE"]
STEPS = 10_000
"""Of the run that each allocator is told of; PEFT's tests make fewer than 5,000."""
WINDOWS: dict[str, dict[str, Any]] = {
    "read": {"prune_start": 0.5, "prune_end": 0.9},
    "every": {"prune_start": 0.5, "prune_end": 0.9},
    "cut": {"prune_start": 1 / STEPS, "prune_end": 2 / STEPS, "prune_interval": 1},
}
REFUSALS = ("cannot be combined with rank allocation", "is a convolution with groups=")
"""In the messages by which a RankAllocator refuses variants of LoRA without components, by design."""
OTHER_METHODS = {
    c for c in vars(peft).values() if isinstance(c, type) and issubclass(c, peft.PeftConfig)
} - {peft.LoraConfig, peft.PeftConfig}

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_running: list[RankAllocator] = []
_seen: list[RankAllocator] = []
_refused: list[str] = []
_outcomes: dict[str, dict[str, Any]] = {}


def values_of(item: pytest.Item) -> Iterator[Any]:
    """The values of a test's parameters, one level of lists and tuples opened."""
    call = getattr(item, "callspec", None)
    for value in call.params.values() if call is not None else ():
        yield from value if isinstance(value, list | tuple) else (value,)


def mentions(item: pytest.Item, configs: set[type]) -> bool:
    """Whether a test's parameters hold one of the config classes or an instance of one."""
    return any(v in configs if isinstance(v, type) else type(v) in configs for v in values_of(item))


def names_in(code: CodeType) -> set[str]:
    """The global names and attributes that a function uses, inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(names_in, inner))


def stay_offline(model_id: str) -> AbstractContextManager[None]:
    """Stands where PEFT's tests go online for a model, unless it is one of their own tiny networks."""
    if "/" in model_id:
        pytest.skip(f"needs {model_id} from the hub")
    return nullcontext()


def pytest_sessionstart() -> None:
    """Keep PEFT's tests offline."""
    testing_utils: Any = importlib.import_module("tests.testing_utils")
    testing_utils.hub_online_once = stay_offline


def is_about_lora(item: pytest.Item) -> bool:
    """Whether a test has a LoRA among its parameters, or no config there and no other method inside.

    Rows with a model of the hub are left out.
    """
    if any(isinstance(value, str) and "/" in value for value in values_of(item)):
        return False
    if mentions(item, {peft.LoraConfig}):
        return True
    used = names_in(item.function.__code__) if isinstance(item, pytest.Function) else set()
    others = {c.__name__ for c in OTHER_METHODS}
    return not mentions(item, OTHER_METHODS) and ("LoraConfig" in used or not used & others)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rows of other methods."""
    dropped = [item for item in items if not is_about_lora(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if is_about_lora(item)]


def adapters_held(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, str]]:
    """The models and adapter names of the LoRAs that an optimizer trains."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    models = [m for m in _models if any(id(p) in held for p in m.parameters())]
    if not models:  # a deep copy or an unpickled model: no one saw it being adapted
        models = [
            o.model
            for o in gc.get_objects()
            if isinstance(o, BaseTuner) and any(id(p) in held for p in o.model.parameters())
        ]
    for model in models:
        for name, config in getattr(model, "peft_config", {}).items():
            modules = find_components(model, name) if is_lora(config) else []
            factors = [f.parameter for m in modules for f in m.factors]
            if any(p.requires_grad and id(p) in held for p in factors):
                yield model, name


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Attach an allocator for each LoRA that ``optimizer`` trains, as a user's script would."""
    for model, adapter in list(adapters_held(optimizer)):
        layers = {id(m.layer) for m in find_components(model, adapter)}
        for earlier in [a for a in _running if a.adapter == adapter]:
            if any(id(m.layer) in layers for m in earlier.modules):
                earlier.detach()
                _running.remove(earlier)
        ranks = [m.rank for m in find_components(model, adapter)]
        half = sum(ranks) / len(ranks) / 2
        try:
            allocator = RankAllocator(
                model,
                optimizer,
                adapter=adapter,
                total_steps=STEPS,
                target_r=half,
                **WINDOWS[VARIANT],
            )
        except ValueError as error:
            if not any(text in str(error) for text in REFUSALS):
                raise
            _refused.append(str(error))
        else:
            _running.append(allocator)
            _seen.append(allocator)


def watch_models() -> None:
    """Remember every model that PEFT adapts."""
    init = BaseTuner.__init__

    @functools.wraps(init)
    def remembered(self: BaseTuner, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _models.add(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if VARIANT == "every" and trained:
            torch.optim.SGD(trained, lr=0.1)  # kept alive by the allocator that it gets

    BaseTuner.__init__ = remembered


def watch_optimizers() -> None:
    """Attach an allocator to every new optimizer; its groups are there when the base class returns."""
    init = torch.optim.Optimizer.__init__

    @functools.wraps(init)
    def attached(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        allocate(self)

    torch.optim.Optimizer.__init__ = attached  # type: ignore[method-assign]  # of every optimizer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note which allocators a test had, and detach those that are left."""
    try:
        yield
    except OSError as error:
        if "huggingface.co" not in str(error):
            raise
        pytest.skip("needs a model from the hub")
    finally:
        _outcomes[item.nodeid] = {
            "allocators": len(_seen),
            "steps": sum(a.step for a in _seen),
            "frozen": sum(a.is_frozen for a in _seen),
            "refused": sorted({*_refused}),
        }
        for allocator in _running:
            allocator.detach()
        for notes in (_running, _seen, _refused):
            notes.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what came out of a test."""
    if report.when != "call" and report.passed:
        return
    noted = _outcomes.pop(report.nodeid, {})
    reason = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
    line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason, **noted}
    with Path(os.environ["OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


watch_models()
if VARIANT != "none":
    watch_optimizers()
