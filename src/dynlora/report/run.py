"""One run as a report needs it, read from history.jsonl and, where there is one, run.json."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora.history import HISTORY_FILE, Event, read_history

RUN_FILE = "run.json"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class RankState:
    """Ranks of all modules after a step, and what they cost in the unit of the budget."""

    step: int
    cost: int
    ranks: dict[str, int]

    @property
    def live(self) -> int:
        """Components of all modules."""
        return sum(self.ranks.values())


@dataclass(frozen=True)
class Run:
    """What happened, oldest first.

    Attributes:
        name: short name, distinct among the runs of one report.
        folder: where it was read from.
        states: ranks at the start and after each prune event; empty for methods without ranks.
        prunes: prune events as the history has them.
        unit: what the budget counts, parameters or components.
        schedule: step and budget of each planned prune event, in that unit.
        window: first and last step of the pruning window, or None.
        total_steps: planned optimizer steps, 0 if unknown.
        logs: step and logged values.
        memory: step and bytes: CUDA's peak where there is one, else the process.
        seconds: wall time of all parts of the run; waiting between them does not count.
        init_r: largest rank at the start, 0 without ranks.
        importance: what components were ranked by; "" where the history does not say.
        component_sizes: parameters of one component by module name.
        lora: fields of the LoraConfig that the run began with; {} where the history does not say.
        is_finished: whether the run came to its end.
        record: run.json, {} if there is none.
    """

    name: str
    folder: Path
    states: list[RankState] = field(default_factory=list)
    prunes: list[Event] = field(default_factory=list)
    unit: str = "components"
    schedule: list[tuple[int, int]] = field(default_factory=list)
    window: tuple[int, int] | None = None
    total_steps: int = 0
    logs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    memory: Points = field(default_factory=list)
    seconds: float = 0.0
    init_r: int = 0
    importance: str = ""
    component_sizes: dict[str, int] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    is_finished: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name as far as the run has come; {} without ranks."""
        return self.states[-1].ranks if self.states else {}

    @property
    def auto(self) -> dict[str, Any] | None:
        """What ``target_r="auto"`` tried and chose; None if the budget was given."""
        found = [event["auto"] for event in self.prunes if isinstance(event.get("auto"), dict)]
        return found[-1] if found else None

    @property
    def method(self) -> str:
        """Name of the method; dynlora where nothing says another."""
        recipe = self.record.get("recipe", {})
        return str(recipe.get("method", "dynlora" if self.states else "?"))

    @property
    def seed(self) -> int | None:
        """Seed of the run, if it is on record."""
        seed = self.record.get("seed")
        return seed if isinstance(seed, int) else None

    def parameters_at(self, state: RankState) -> int:
        """Parameters of the adapter's factors, by the ranks of a state."""
        sizes = self.component_sizes
        return sum(rank * sizes.get(name, 0) for name, rank in state.ranks.items())

    @property
    def parameters_of_rank_one(self) -> int:
        """Parameters of a LoRA of rank 1 on the same modules; 0 where sizes are not on record."""
        return sum(self.component_sizes.values())

    def series(self, key: str) -> Points:
        """Step and value of one logged name."""
        return [(step, logs[key]) for step, logs in self.logs if key in logs]

    def metrics(self) -> list[str]:
        """Names of what evaluations measured, the loss first; run times are no metric."""
        skip = ("_runtime", "_per_second", "_model_preparation_time", "jit_compilation_time")
        names = {k for _, logs in self.logs for k in logs if k.startswith("eval_")}
        return sorted(
            (n for n in names if not n.endswith(skip)), key=lambda n: ("loss" not in n, n)
        )


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs and give them distinct names.

    Raises:
        FileNotFoundError: a path holds neither history.jsonl nor run.json.
        ValueError: no path is given, or a file is damaged.
    """
    if not paths:
        raise ValueError("paths is empty: name the folder of at least one run.")
    return [
        read_run(path, name)
        for path, name in zip(paths, _short_names([Path(p) for p in paths]), strict=True)
    ]


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: the run's folder, or its history.jsonl.
        name: how to call it; the folder's name if not given.

    Raises:
        FileNotFoundError: there is neither history.jsonl nor run.json.
        ValueError: a file is damaged.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == HISTORY_FILE else folder
    has_history = (folder / HISTORY_FILE).is_file()
    if not has_history and not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {HISTORY_FILE} nor {RUN_FILE}: name the output_dir of a run with "
            "DynLoraCallback, or of dynlora train."
        )
    record = _record(folder / RUN_FILE)
    events = read_history(folder) if has_history else []
    return _from_events(events, name or folder.resolve().name, folder, record)


def _record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object, so no run wrote it.")
    return content


def _from_events(events: list[Event], name: str, folder: Path, record: dict[str, Any]) -> Run:
    starts = [e for e in events if e["event"] == "start"]
    first = starts[0] if starts else {}
    unit = str(first.get("budget", "components"))
    sizes = dict(first.get("component_sizes", {}))
    prunes = [e for e in events if e["event"] == "prune"]
    costs = sizes if unit == "parameters" else {}
    states = [_state(e, costs) for e in [first, *prunes] if "ranks" in e]
    ends = [e for e in events if e["event"] == "end" and e.get("ranks")]
    if ends and states and ends[-1]["ranks"] != states[-1].ranks:  # the best checkpoint was another
        states.append(_state(ends[-1], costs))
    logs = [(e["step"], _numbers(e.get("logs", {}))) for e in events if e["event"] == "log"]
    if not events:
        logs = [(e["step"], _numbers(e)) for e in record.get("evaluations", []) if "step" in e]
    return Run(
        name=name,
        folder=folder,
        states=states,
        prunes=prunes,
        unit=unit,
        schedule=[(step, budget) for step, budget in first.get("schedule", [])],
        window=tuple(first["window"]) if "window" in first else None,
        total_steps=int(first.get("total_steps", record.get("steps", 0))),
        logs=logs,
        memory=[(e["step"], _memory(e)) for e in events if e.get("memory_bytes")],
        seconds=_seconds(events) or float(record.get("train_s", 0)),
        init_r=max(first["ranks"].values(), default=0) if "ranks" in first else 0,
        importance=str(first.get("importance", "")),
        component_sizes=sizes,
        lora=dict(first.get("lora", {})),
        is_finished=any(e["event"] == "end" for e in events) or record.get("status") == "done",
        record=record,
    )


def _state(event: Event, costs: dict[str, int]) -> RankState:
    """The ranks that an event tells; each component costs 1 where ``costs`` does not say."""
    ranks = event["ranks"]
    cost = sum(rank * costs.get(name, 1) for name, rank in ranks.items())
    return RankState(event["step"], cost, ranks)


def _numbers(logs: dict[str, Any]) -> dict[str, float]:
    """The values that can be drawn: numbers, not null and not yes or no."""
    return {
        key: float(value)
        for key, value in logs.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _memory(event: Event) -> float:
    memory = event["memory_bytes"]
    return float(memory.get("cuda_peak") or memory.get("process") or 0)


def _seconds(events: list[Event]) -> float:
    """Time between events, but not from the last one of a part to the start of the next."""
    times = [(e.get("time", 0.0), e["event"]) for e in events]
    return sum(
        later - earlier
        for (earlier, _), (later, kind) in itertools.pairwise(times)
        if kind != "start"
    )


def _short_names(folders: list[Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    resolved = [(f.parent if f.name == HISTORY_FILE else f).resolve() for f in folders]
    for depth in range(1, max(len(f.parts) for f in resolved)):
        names = ["/".join(f.parts[-depth:]) for f in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{f.name} ({number})" for number, f in enumerate(resolved, start=1)]
