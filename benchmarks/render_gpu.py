"""The tables of all GPU checks, from the folders of their results, one a run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tables import table

TIMED = {
    "steps": "Steps",
    "compiled": "Compiled steps",
    "quantised": "4-bit base",
    "gain": "Modules of rank 0",
}
NOT_SHOWN = {"losses", "ranks", "seconds", "options", "found", "put_into"}
NOT_MEASURED = {"left_out", "error"}


class Case(NamedTuple):
    """What one run found in one case.

    Attributes:
        section: the file that it stands in.
        name: its key there.
        found: its result.
        run: what that file says of the run: date, commit, command, versions, machine.
        folder: the run's.
    """

    section: str
    name: str
    found: dict[str, Any]
    run: dict[str, Any]
    folder: Path

    @property
    def is_measured(self) -> bool:
        """Whether it was begun, and did not fail."""
        return not NOT_MEASURED & self.found.keys()


def newest(folder: Path) -> list[Case]:
    """Every case once, as the newest run that measured it found it, else as the newest run left it.

    Cases that no run measured are those of the newest run alone: older runs had other plans.
    """
    cases = [
        Case(path.stem, name, found, record, path.parent)
        for path in folder.glob("*/*.json")
        for record in [json.loads(path.read_text(encoding="utf-8"))]
        for name, found in record["cases"].items()
    ]
    cases.sort(key=lambda case: case.run["date"])  # what stands in one file keeps its order
    chosen: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = case.section, case.name
        if case.is_measured or (case.folder == cases[-1].folder and key not in chosen):
            chosen[key] = case
    return list(chosen.values())


def gpu_tables(folder: Path) -> str:
    """The newest result of every case, what no run measured, and where all of it comes from."""
    cases = newest(folder)
    measured = [case for case in cases if case.is_measured]
    parts = []
    for section, title in TIMED.items():
        for case in (c for c in measured if c.section == section):
            arms, failed = case.found["arms"], case.found.get("failed", {})
            parts.append(f"{_head(title, case)}\n\n{_timed(arms)}")
            parts += [f"*{title}: {case.name}: {arm} failed.*" for arm in failed]
    parts += [
        f"{_head('The allocator', case)}\n\n{_allocator(case.found)}"
        for case in measured
        if case.section == "allocator"
    ]
    promises = [case for case in measured if case.section == "promises"]
    if promises:
        parts.append(f"**Promises**\n\n{_promises(promises)}")
    parts += [
        f"*Not run: {case.section}: {case.name}: {case.found.get('left_out', 'it failed')}.*"
        for case in cases
        if not case.is_measured
    ]
    sources = {case.folder: case.run for case in measured}
    parts += [_source(run) for run in sorted(sources.values(), key=lambda run: run["date"])]
    return "\n\n".join(parts)


def _commit(run: dict[str, Any]) -> str:
    return (run["commit"] or "an unknown commit")[:10]


def _head(title: str, case: Case) -> str:
    return f"**{title}: {case.name}** (at {_commit(case.run)})"


def _timed(arms: dict[str, Any]) -> str:
    rows = [
        (
            arm,
            f"{row['ms']:.1f} ms",
            f"{row['host_ms']:.1f} ms",
            "{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["spread"]) if "ratio" in row else "",
            row["peer"],
            "" if row["step_peak_bytes"] is None else f"{row['step_peak_bytes'] / 2**30:.2f} GiB",
        )
        for arm, row in arms.items()
    ]  # fmt: skip
    return table(("arm", "device", "host", "ratio (range)", "to", "peak of a step"), rows)


def _allocator(case: dict[str, Any]) -> str:
    usual = (case["without"]["host_syncs"] or {"count": 0})["count"]
    rows = [
        (
            name,
            str(hooks["kernels"]),
            f"{hooks['kernel_ms']:.3f} ms, {case['share'][name]['of_device_time']:.2%}",
            f"{hooks['host_ms']:.2f} ms, {case['share'][name]['of_host_time']:.2%}",
            str((case[name]["host_syncs"] or {"count": 0})["count"] - usual),
        )
        for name, hooks in case["hooks"].items()
    ]
    return table(
        ("state", "kernels", "device time, share", "host time, share", "waits for the device"), rows
    )


def _promises(cases: list[Case]) -> str:
    rows = [(case.name, _answer(case.found), _commit(case.run)) for case in cases]
    return table(("question", "answer", "at"), rows)


def _answer(found: dict[str, Any]) -> str:
    """What a check of a promise found; of a message the first sentence, and equal answers together."""
    shown = {key: value for key, value in found.items() if key not in NOT_SHOWN}
    if "found" in found:
        shown["budget"] = found["found"]["budget"]
    answers: dict[str, list[str]] = {}
    for key, value in shown.items():
        text = value.partition(". ")[0] if isinstance(value, str) else str(value)
        answers.setdefault(text, []).append(key)
    return "; ".join(f"{', '.join(keys)}: {text}" for text, keys in answers.items())


def _source(run: dict[str, Any]) -> str:
    versions, machine = run["versions"], run["machine"]
    command, _, _ = run["command"].partition(" --until ")  # that end is a worker's, not the user's
    return (
        f"*`{command}` at {_commit(run)}, {run['date']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; {machine['device']}, "
        f"{machine['cores']} cores.*"
    )
