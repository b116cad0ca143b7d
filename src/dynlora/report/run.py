"""One run as a report needs it, read from history.jsonl and, where there is one, run.json."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from dynlora.history import HISTORY_FILE, Event, read_history

RUN_FILE = "run.json"

Points = list[tuple[float, float]]

T = TypeVar("T")

_NO_METRIC = ("_runtime", "_per_second", "_model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class Run:
    """What happened, as the history and the record of a run tell it.

    Attributes:
        name: short name, distinct among the runs of one report.
        folder: where it was read from.
        events: the history, oldest first.
        record: run.json, {} if there is none.
    """

    name: str
    folder: Path
    events: list[Event]
    record: dict[str, Any]

    def of(self, kind: str) -> list[Event]:
        """Events of one kind: start, prune, log or end."""
        return [event for event in self.events if event["event"] == kind]

    @cached_property
    def start(self) -> Event:
        """How the run was set up; {} where the history does not say."""
        return next(iter(self.of("start")), {})

    @cached_property
    def states(self) -> list[tuple[int, dict[str, int]]]:
        """Step and ranks by module, at the start, after each prune event, and at the end if they differ."""
        told = [event for event in [self.start, *self.of("prune")] if "ranks" in event]
        ends = [event for event in self.of("end") if event.get("ranks")]
        if told and ends and ends[-1]["ranks"] != told[-1]["ranks"]:
            told.append(ends[-1])  # load_best_model_at_end took an earlier checkpoint
        return [(event["step"], event["ranks"]) for event in told]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name as far as the run has come; {} without ranks."""
        return self.states[-1][1] if self.states else {}

    @property
    def init_r(self) -> int:
        """Largest rank at the start, 0 without ranks."""
        return max(self.states[0][1].values(), default=0) if self.states else 0

    @property
    def unit(self) -> str:
        """What the budget counts, parameters or components."""
        return str(self.start.get("budget", "components"))

    def cost(self, ranks: Mapping[str, int]) -> int:
        """What ranks cost in the unit of the budget."""
        return self.parameters(ranks) if self.unit == "parameters" else sum(ranks.values())

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the adapter's factors at these ranks; 0 where sizes are not on record."""
        sizes = self.start.get("component_sizes", {})
        return sum(rank * sizes.get(name, 0) for name, rank in ranks.items())

    def lora_rank(self, ranks: Mapping[str, int]) -> float:
        """Rank of the plain LoRA on the same modules that has as many parameters; 0 if not known."""
        return self.parameters(ranks) / (self.parameters(dict.fromkeys(ranks, 1)) or 1)

    @property
    def auto(self) -> dict[str, Any] | None:
        """What ``target_r="auto"`` tried and chose; None if the budget was given."""
        found = (e["auto"] for e in reversed(self.of("prune")) if "without" in e.get("auto", ()))
        return next(found, None)  # records of the first version know of no gain

    @property
    def method(self) -> str:
        """Name of the method; dynlora where nothing says another."""
        recipe = self.record.get("recipe", {})
        return str(recipe.get("method", "dynlora" if self.states else "?"))

    @property
    def last_step(self) -> int:
        """Optimizer steps done."""
        return max((event["step"] for event in self.events), default=0)

    @property
    def total_steps(self) -> int:
        """Planned optimizer steps, 0 if unknown."""
        return int(self.start.get("total_steps", self.record.get("steps", 0)))

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.of("end")) or self.record.get("status") == "done"

    @property
    def seconds(self) -> float:
        """Wall time of all parts of the run; waiting between them does not count."""
        pairs = itertools.pairwise(self.events)
        spent = sum(
            later.get("time", 0) - earlier.get("time", 0)
            for earlier, later in pairs
            if later["event"] != "start"
        )
        return spent or float(self.record.get("train_s", 0))

    @property
    def peak_bytes(self) -> int:
        """Most memory that was seen in use: CUDA's peak where there is one, else the process's."""
        seen = [event.get("memory_bytes") or {} for event in self.events]
        return max((m.get("cuda_peak") or m.get("process") or 0 for m in seen), default=0)

    def series(self, key: str) -> Points:
        """Step and value of one logged name; null and text are left out."""
        logs = [(event["step"], event["logs"].get(key)) for event in self.of("log")]
        return [(step, float(v)) for step, v in logs if isinstance(v, int | float)]

    def score(self, name: str) -> float:
        """The last value of a metric, in a finished run at the step whose weights were kept."""
        kept = next((event.get("kept_step") for event in reversed(self.of("end"))), None)
        series = self.series(name)
        known = [value for step, value in series if kept is None or step <= kept]
        return known[-1] if known else series[-1][1]

    def metrics(self) -> list[str]:
        """Names of what evaluations measured, the loss first; run times are no metric."""
        names = {k for event in self.of("log") for k in event["logs"] if k.startswith("eval_")}
        found = (n for n in names if not n.endswith(_NO_METRIC) and self.series(n))
        return sorted(found, key=lambda n: ("loss" not in n, n))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, the first and the last among them.

    >>> evenly(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs and give them distinct names."""
    return [
        read_run(path, name)
        for path, name in zip(paths, _short_names([Path(p) for p in paths]), strict=True)
    ]


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read one run by its folder or its history.jsonl; it is called like the folder if not given a name."""
    folder = _folder(Path(path))
    history, record = folder / HISTORY_FILE, folder / RUN_FILE
    if not history.is_file() and not record.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {HISTORY_FILE} nor {RUN_FILE}: name the output_dir of a run with "
            "DynLoraCallback, or of dynlora train."
        )
    told = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if not isinstance(told, dict):
        raise ValueError(f"{record} is not a JSON object, so no run wrote it.")
    if history.is_file():
        events = read_history(folder)
    else:
        measured = [e for e in told.get("evaluations", []) if "step" in e]
        events = [{"event": "log", "step": e["step"], "logs": e} for e in measured]
    return Run(name or folder.resolve().name, folder, events, told)


def _folder(path: Path) -> Path:
    return path.parent if path.name == HISTORY_FILE else path


def _short_names(paths: list[Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    folders = [_folder(path).resolve() for path in paths]
    for depth in range(1, max(len(f.parts) for f in folders)):
        names = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{f.name} ({number})" for number, f in enumerate(folders, start=1)]
